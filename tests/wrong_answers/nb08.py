"""Typical wrong answers to notebook 08, and words that the checker's message must hold."""

from minicpt.core.projection import project


def refuse(outside):
    if outside:
        raise ValueError("outside its ball")


def recover(
    centre=lambda words, ids: words[ids],
    slack=0.01,
    norms=lambda delta, limit: (delta > limit).any(),
    sign=1,
):
    def recover_delta(saved, ids, words, radius):
        middle = centre(words, ids)
        delta = sign * (saved - middle)
        refuse(norms(delta.norm(dim=1), radius + slack * (middle.norm(dim=1) + radius)))
        return delta

    return recover_delta


def without_labels(saved, ids, words, radius):
    delta = saved - words[ids]
    refuse(
        (delta.norm(dim=1) > radius + 0.01 * (words[ids].norm(dim=1) + radius))[radius > 1e-6].any()
    )
    return delta


def asserted(saved, ids, words, radius):
    delta = saved - words[ids]
    assert (delta.norm(dim=1) <= radius + 0.01 * (words[ids].norm(dim=1) + radius)).all()
    return delta


WRONG = {
    "recover_delta": [
        (lambda saved, ids, words, radius: saved, "the saved sum itself"),
        (recover(sign=-1), "the sign is turned"),
        (lambda saved, ids, words, radius: saved - words[: len(ids)], "first P rows"),
        (lambda saved, ids, words, radius: saved - words[ids], "is not refused"),
        (lambda saved, ids, words, radius: project(saved - words[ids], radius), "back in silence"),
        (recover(slack=0), "allow 1 %"),
        (
            recover(norms=lambda delta, limit: delta.norm() > limit.norm()),
            "not the norm of the whole",
        ),
        (without_labels, "a label that moved"),
        (asserted, "must raise ValueError"),
        (
            lambda saved, ids, words, radius: (saved - words[: len(ids)]) / radius[:, None],
            "embeddings of the tokens",
        ),
    ],
}

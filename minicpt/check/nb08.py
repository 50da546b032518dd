"""Checker of notebook 08: delta from a saved sum, refused where it lies outside its ball."""

import torch

from ..core.projection import project
from .engine import NotYet, checker, expect, same
from .smallest import Case


def refusal(student, *arguments):
    """Call the student's function: what it returns, or the name of the error that it raised."""
    try:
        return student(*arguments)
    except NotYet as wrong:
        if "your function raised " not in str(wrong):
            raise
        return str(wrong).split("your function raised ")[1].split(":")[0]


def saved_prompt(delta, ids, words, radius) -> dict:
    """The arguments of `recover_delta`, from the delta that it should find."""
    return {"saved": words[ids] + delta, "ids": ids, "words": words, "radius": radius}


def recovery_steps(delta, ids, words, radius) -> dict:
    """The words' embeddings, and delta."""
    return {"embeddings of the tokens": words[ids], "delta": delta}


def inside(delta, ids, words, radius) -> bool:
    """Is no token outside its ball by more than rounding?"""
    room = radius + 0.01 * (words[ids].norm(dim=1) + radius)
    return len(ids) > 0 and bool(((radius > 0) & (delta.norm(dim=1) <= room)).all())


@checker("08.1")
def recover_delta(student, generator):
    """The saved sum minus the words' embeddings; ValueError if a row is well outside its ball."""
    import matplotlib.pyplot as plt

    V, P, D = 20, 9, 6
    words = torch.randn(V, D, generator=generator)
    ids = torch.randperm(V, generator=generator)[:P]
    ids[torch.arange(P) == ids] += (
        1  # no id is its own place, or the first rows would be a right answer there
    )
    ids = ids % V
    centre = words[ids]
    frozen = torch.arange(P) % 3 == 2  # labels and separators
    radius = torch.where(frozen, 1e-10, 0.5 + torch.rand(P, generator=generator))
    share = torch.zeros(P)
    free = (~frozen).nonzero()[:, 0]
    order = torch.randperm(len(free), generator=generator)
    share[free[order]] = torch.linspace(0.2, 1, len(free))  # 1: on the surface
    delta = torch.randn(P, D, generator=generator)
    delta = delta / delta.norm(dim=1, keepdim=True) * (share * radius)[:, None]
    cases = {
        "it refuses a prompt whose deltas are all inside their balls or on "
        "the surface, where rounding puts some a hair outside: allow 1 % of "
        "the centre's norm plus the radius.": centre + delta,
        "it refuses a prompt saved in bfloat16, because of its rounding: "
        "even a label, of radius 10⁻¹⁰, is then a little off; allow 1 % of "
        "the centre's norm plus the radius.": (centre + delta).bfloat16().float(),
    }
    for words_for_it, saved in cases.items():
        want = saved - centre
        wrong = {
            "it is the saved sum itself: take the embeddings of the context's tokens away.": saved,
            "the sign is turned: the sum minus the embeddings is delta.": -want,
            "the centre is the first P rows of the embedding matrix; it is the "
            "rows of the context's ids, words[ids].": saved - words[:P],
            "the embeddings are added; the saved tensor is already embedding plus delta.": saved
            + centre,
            "it is measured in radii: delta is the plain difference.": want / radius[:, None],
            "it is projected: that would also pull a delta from far outside back in silence. "
            "Return the difference, or raise ValueError.": project(want, radius),
        }
        got = refusal(student, saved, ids, words, radius)
        expect(
            not isinstance(got, str) or got == "ValueError",
            f"your function raised {got} on a good prompt.",
        )
        expect(not isinstance(got, str), words_for_it)
        case = Case(
            student,
            recovery_steps,
            {"delta": want, "ids": ids, "words": words, "radius": radius},
            {"delta": "P D", "ids": "P", "words": "V D", "radius": "P"},
            inside,
            saved_prompt,
        )
        same(got, want, wrong, "delta", case=case)
    for far in (1.4, 3.0):  # the first one only: the rest is zero, so the whole delta is short
        at = int(free[int(torch.randint(len(free), (1,), generator=generator))])
        one = torch.zeros(P, D)
        one[at] = (
            far
            * radius[at]
            * torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
        )
        got = refusal(student, centre + one, ids, words, radius)
        if isinstance(got, torch.Tensor) and got.shape == one.shape:
            expect(
                got[at].norm() > 0.95 * one[at].norm(),
                "a token outside its ball is pulled back in silence: that is another prompt than "
                "the one saved. Raise ValueError instead.",
            )
            raise NotYet(
                "a token outside its own ball is not refused: raise ValueError if *any* row's norm "
                "is above its radius, not the norm of the whole, and not their mean."
            )
        expect(
            got == "ValueError",
            f"a prompt outside its ball must raise ValueError; here it gave {got!r}.",
        )
    moved = centre.clone()
    moved[frozen] += 0.5 * moved[frozen] / moved[frozen].norm(dim=1, keepdim=True)
    expect(
        refusal(student, moved, ids, words, radius) == "ValueError",
        "a label that moved is not refused: its radius is 10⁻¹⁰, "
        "and its row counts like every other.",
    )
    figure, panel = plt.subplots(figsize=(5, 2.4), layout="constrained")
    x = torch.arange(P).numpy()
    panel.bar(x, student(centre + delta, ids, words, radius).norm(dim=1).tolist(), color="#0072B2")
    panel.hlines(radius.tolist(), x - 0.45, x + 0.45, color="black", label="radius")
    panel.plot(
        x[frozen.numpy()],
        [0] * int(frozen.sum()),
        "x",
        color="#777777",
        clip_on=False,
        label="frozen",
    )
    panel.set(xlabel="token of the context", ylabel="norm of delta", ylim=(0, 2))
    panel.legend(frameon=False, ncols=2)
    plt.close(figure)
    return (
        figure,
        "Norm of each token's recovered delta as a bar under its radius; frozen tokens have none.",
    )

"""Typical wrong answers to notebook 02, and words that the checker's message must hold."""

import torch


def by_class(reduce):
    """Scores (N, C) of a reduction over each class's words."""
    return lambda log_p, class_of, n_classes: torch.stack(
        [reduce(log_p[:, class_of == c]) for c in range(n_classes)], -1
    )


def divided(prior):
    """Probabilities divided by a prior made of the content-free scores, rows adding up to 1."""

    def calibrated(scores, content_free):
        q = scores.softmax(-1) / prior(content_free)
        return q / q.sum(-1, keepdim=True)

    return calibrated


WRONG = {
    "class_scores": [
        (by_class(lambda words: words.sum(-1)), "multiplies the probabilities"),
        (by_class(lambda words: words.mean(-1)), "sink its whole class"),
        (by_class(lambda words: words.amax(-1)), "best word"),
        (by_class(lambda words: words.exp().sum(-1)), "return their logarithms"),
        (
            lambda *args: by_class(lambda words: words.logsumexp(-1))(*args).T,
            "one row for each query",
        ),
        (by_class(lambda words: words.logsumexp(0)), "shape"),
        (by_class(lambda words: words.amax(-1).exp()), "probability of each class"),
    ],
    "calibrated": [
        (divided(lambda content_free: 1 / content_free.softmax(-1).mean(0)), "Divide"),
        (divided(lambda content_free: content_free.softmax(-1)[0]), "only the first"),
        (divided(lambda content_free: content_free.mean(0).softmax(-1)), "probabilities first"),
        (
            divided(lambda content_free: content_free.exp().mean(0)),
            "not normalised over the labels",
        ),
        (lambda scores, content_free: scores.softmax(-1), "nothing is calibrated"),
        (
            lambda scores, content_free: scores.softmax(-1) / content_free.softmax(-1).mean(0),
            "add up to 1",
        ),
        (
            lambda scores, content_free: (
                scores.log_softmax(-1) - content_free.softmax(-1).mean(0).log()
            ),
            "last softmax",
        ),
        (
            lambda scores, content_free: scores.softmax(0).log() - content_free.mean(0),
            "mean probability of each label",
        ),
    ],
}

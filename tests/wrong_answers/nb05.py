"""Typical wrong answers to notebook 05, and words that the checker's message must hold."""

import torch
from torch.nn.functional import cross_entropy


def loss(shift=1, exponent=lambda n: torch.arange(n).flip(0), zeros=False, mean=False):
    def row_loss(logits, ids, types, gamma):
        at = ((types % 4 == 0) & ((types > 0) | zeros)).nonzero()[:, 0]
        back = exponent(len(at))
        terms = gamma ** back.float() * cross_entropy(logits[at - shift], ids[at], reduction="none")
        return terms.mean() if mean else terms.sum()

    return row_loss


def separators_too(exponent):
    """No `types > 0`: every type that is a multiple of 4 is taken for a label."""

    def row_loss(logits, ids, types, gamma):
        at = (types % 4 == 0).nonzero()[:, 0]
        terms = cross_entropy(logits[at - 1], ids[at], reduction="none")
        return (gamma ** exponent(types, at).float() * terms).sum()

    return row_loss


def labels_after(types, at):
    return torch.tensor([int(((types[s + 1 :] > 0) & (types[s + 1 :] % 4 == 0)).sum()) for s in at])


def training_label_only(logits, ids, types, gamma):
    at = (types == types.max()).nonzero()[0, 0]
    return cross_entropy(logits[at - 1], ids[at])


def freeze_in_place(gradient, types):
    gradient[types % 4 == 0] = 0
    return gradient


def each(delta, epsilon):
    return delta * (epsilon / torch.maximum(delta.norm(dim=1), epsilon))[:, None]


def together(delta, epsilon):
    return delta * (epsilon.norm() / torch.maximum(delta.norm(), epsilon.norm()))


def divided_by_norm(delta, epsilon):
    norm = delta.norm(dim=1)
    return delta / norm[:, None] * torch.minimum(norm, epsilon)[:, None]


def free(types):
    return (types % 4 > 0)[:, None]


WRONG = {
    "row_loss": [
        (loss(shift=0), "off by one"),
        (loss(exponent=torch.arange), "wrong way round"),
        (loss(exponent=lambda n: torch.arange(n).flip(0) + 1), "it must weigh 1"),
        (loss(zeros=True), "separators count as labels"),
        (
            separators_too(lambda types, at: (types.max() - types[at]) // 4),
            "separators count as labels",
        ),
        (separators_too(labels_after), "separators count as labels"),
        (loss(mean=True), "the mean over the labels"),
        (training_label_only, "only the training example's label"),
        (
            lambda logits, ids, types, gamma: -loss()(logits, ids, types, gamma),
            "the sign is turned",
        ),
        (loss(mean=True, exponent=torch.arange), "positions of the labels: [1, 2]"),
    ],
    "freeze": [
        (
            lambda gradient, types: gradient * (types > 0)[:, None],
            "the labels still have a gradient",
        ),
        (
            lambda gradient, types: gradient * ((types == 0) | (types % 4 > 0))[:, None],
            "separators still have",
        ),
        (lambda gradient, types: gradient[types % 4 > 0], "cut out"),
        (lambda gradient, types: gradient * (types % 4 == 0)[:, None], "wrong way round"),
        (lambda gradient, types: gradient * (types % 4)[:, None], "multiplied by their role"),
        (freeze_in_place, "in place"),
        (lambda gradient, types: -gradient * (types > 0)[:, None], "gradient = [[1]]"),
    ],
    "project_tokens": [
        (together, "projected together"),
        (
            lambda delta, epsilon: delta / delta.norm(dim=1, keepdim=True) * epsilon[:, None],
            "also those inside",
        ),
        (lambda delta, epsilon: delta.clamp(-epsilon[:, None], epsilon[:, None]), "that is a box"),
        (divided_by_norm, "0/0"),
        (lambda delta, epsilon: delta, "nothing was projected"),
        (lambda delta, epsilon: each(delta, epsilon[:1]), "first row's radius"),
        (
            lambda delta, epsilon: delta.clamp(-epsilon[:, None], epsilon[:, None]) / 2,
            "delta = [[1]]",
        ),
    ],
    "training_step": [
        (
            lambda delta, g, types, epsilon, lr: each(delta + lr * g * free(types), epsilon),
            "it goes up",
        ),
        (
            lambda delta, g, types, epsilon, lr: each(delta - lr * g, epsilon),
            "labels and separators moved",
        ),
        (
            lambda delta, g, types, epsilon, lr: delta - lr * g * free(types),
            "nothing was projected",
        ),
        (
            lambda delta, g, types, epsilon, lr: delta + each(-lr * g * free(types), epsilon),
            "the step is projected",
        ),
        (
            lambda delta, g, types, epsilon, lr: together(delta - lr * g * free(types), epsilon),
            "all tokens are projected",
        ),
        (
            lambda delta, g, types, epsilon, lr: each(delta - g * free(types), epsilon),
            "learning rate is not used",
        ),
        (
            lambda delta, g, types, epsilon, lr: each(delta + lr * g, epsilon),
            "gradient after freezing",
        ),
    ],
}


def gradients(share=1.0, h=1e-5, sides=2, error=1.0, decay=True):
    """Both gradients of 05.5, right unless told otherwise."""

    def decayed_gradient(loss, vectors, readout, ids, types, gamma):
        derived, measured = torch.zeros_like(vectors), torch.zeros_like(vectors)
        at = ((types > 0) & (types % 4 == 0)).nonzero()[:, 0].tolist()
        for after, s in enumerate(reversed(at)):
            p = (readout @ vectors[:s].mean(0)).softmax(0)
            p[ids[s]] -= error
            derived[:s] += share * (gamma**after if decay else 1) / s * (p @ readout)
        for one in torch.eye(vectors.numel()).to(vectors).view(-1, *vectors.shape):
            below = loss(vectors - h * one) if sides == 2 else loss(vectors)
            measured += one * (loss(vectors + h * one) - below) / (sides * h)
        return derived, measured

    return decayed_gradient


def by_autograd(loss, vectors, readout, ids, types, gamma):
    leaf = vectors.clone().requires_grad_()
    return torch.autograd.grad((leaf**2).sum(), leaf) * 2


WRONG["decayed_gradient"] = [
    (gradients(decay=False), "the decay is missing"),
    (gradients(error=0), "the one-hot vector is missing"),
    (gradients(share=-1), "the sign is turned"),
    (gradients(sides=1), "one-sided"),
    (gradients(h=0.3), "the curvature shows"),
    (lambda *given: (gradients()(*given)[0],) * 2, "is not measured"),
    (by_autograd, "with a pencil"),
    (gradients(share=3.0, error=2.0), "softmax minus one-hot, at each: [["),
]

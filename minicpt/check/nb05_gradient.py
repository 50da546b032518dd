"""Checker of exercise 05.5: the gradient of the decayed loss, by hand and by differences."""

from unittest import mock

import torch
from torch import Tensor

from ..core import masks
from .engine import NotYet, checker, describe, expect, same
from .nb04 import coloured, types_of
from .smallest import Case
from .steps import whole_examples


def no_autograd(*args, **kwargs):
    raise NotYet("this is autograd's work: derive the gradient with a pencil, and write it down.")


def gradient_steps(vectors, readout, ids, types, gamma) -> dict:
    """What each label sends back to the tokens before it, and the sum for each token."""
    at = masks.is_label(types).nonzero()[:, 0].tolist()
    gradient, errors, shares = torch.zeros_like(vectors), [], []
    for after, s in enumerate(reversed(at)):
        error = (readout @ vectors[:s].mean(0)).softmax(0)  # (V,)
        error[ids[s]] -= 1
        errors.insert(0, error)
        shares.insert(0, gamma**after / s)
        gradient[:s] += shares[0] * (error @ readout)
    return {
        "positions of the labels": at,
        "softmax minus one-hot, at each": errors,
        "weight / number of tokens before it": shares,
        "gradient": gradient,
    }


def wrong_gradients(vectors, readout, ids, types, gamma) -> dict:
    """What the known mistakes give, by their words."""
    at = masks.is_label(types).nonzero()[:, 0].tolist()

    def summed(weight=None, share=None, reach=slice, read=0, error=None, chosen=at):
        gradient = torch.zeros_like(vectors)
        for s in chosen:
            after = len(at) - 1 - at.index(s)
            p = (readout @ vectors[: s + read].mean(0)).softmax(0)
            e = p.clone()
            e[ids[s]] -= 1
            e = error(p, ids[s]) if error else e
            w = weight(after) if weight else gamma**after
            gradient[reach(s)] += w / (share(s) if share else s) * (e @ readout)
        return gradient

    def minus_one_hot(p, token):
        return -torch.nn.functional.one_hot(token, len(p)).to(p)

    right = summed()
    return {
        "the decay is missing: the loss weighs each label by a power of gamma, and so does its "
        "gradient.": summed(weight=lambda after: 1.0),
        "the decay is the wrong way round: the last label weighs 1.": summed(
            weight=lambda after: gamma ** (len(at) - 1 - after)
        ),
        "the last label weighs gamma; it must weigh 1.": gamma * right,
        "the mean is forgotten: a token counts one part in s of the mean of s tokens.": summed(
            share=lambda s: 1.0
        ),
        "a label at s is predicted from the s tokens before it, so the mean has s terms and not "
        "s + 1.": summed(share=lambda s: s + 1),
        "the label's own token is among those that predict it: read one place earlier.": summed(
            read=1, share=lambda s: s + 1, reach=lambda s: slice(s + 1)
        ),
        "only the token right before a label gets its gradient; the mean holds all tokens before "
        "it.": summed(reach=lambda s: slice(s - 1, s)),
        "only the last label counts; all of them are in the loss.": summed(chosen=at[-1:]),
        "the softmax is missing: the derivative of a cross-entropy is softmax minus "
        "one-hot.": summed(error=minus_one_hot),
        "the one-hot vector is missing: the derivative of a cross-entropy is softmax minus "
        "one-hot.": summed(error=lambda p, token: p),
        "the sign is turned: softmax minus one-hot, not the other way round.": -right,
    }


class Loss:
    """The decayed loss of one row as a function of its vectors; it remembers where it was asked."""

    def __init__(self, vectors, readout, ids, types, gamma):
        self.vectors, self.given = vectors, (readout, ids, types, gamma)
        self.steps: list[Tensor] = []

    def __call__(self, vectors) -> float:
        readout, ids, types, gamma = self.given
        self.steps.append(vectors.detach() - self.vectors)
        at = masks.is_label(types).nonzero()[:, 0]
        with torch.no_grad():
            means = vectors.cumsum(0) / torch.arange(1, len(vectors) + 1)[:, None]  # (S, D)
            terms = -(means @ readout.T).log_softmax(-1)[at - 1, ids[at]]
        weights = gamma ** torch.arange(len(at)).flip(0).double()
        return float((weights * terms).sum())


def by_differences(numerical, by_hand, exact: Tensor, loss: Loss) -> None:
    """Raise `NotYet` unless the second answer is made of central differences of the loss."""
    expect(
        isinstance(numerical, Tensor) and numerical.shape == exact.shape,
        f"the second of the two is {describe(numerical)}; return {tuple(exact.shape)}, as the "
        "first.",
    )
    expect(
        bool(loss.steps) and not torch.equal(numerical, by_hand),
        "the second of the two is not measured: call `loss` a little to both sides of each number.",
    )
    single = [step for step in loss.steps if int((step != 0).sum()) == 1]
    expect(
        len(single) >= exact.numel(),
        "the differences move several numbers at once, or too few of them: each of the "
        f"{exact.numel()} numbers is moved alone.",
    )
    upward = sum(float(step.sum()) > 0 for step in single)
    expect(
        0 < upward < len(single),
        "the differences are one-sided, (loss(x + h) - loss(x)) / h, with an error like h. Use both "
        "sides, (loss(x + h) - loss(x - h)) / (2 h): its error is like h².",
    )
    if torch.allclose(numerical, exact, atol=1e-6, rtol=1e-5):
        return
    if torch.allclose(numerical, 2 * exact, atol=1e-5, rtol=1e-4):
        raise NotYet("the differences are twice too large: the two sides are 2 h apart, not h.")
    h = max(float(step.abs().max()) for step in single)
    raise NotYet(
        f"the differences are off by {float((numerical - exact).abs().max()):.1e}. Your h is "
        f"{h:.0e}: with a large one the curvature shows, with a tiny one rounding; in double "
        "precision 1e-5 is a good one."
    )


@checker("05.5")
def decayed_gradient(student, generator):
    """Each label sends its weight / s times (softmax - one-hot) through the read-out to the s tokens before it."""
    import matplotlib.pyplot as plt

    for shots in (1, 2, 4):  # the smallest first
        types, V, D = types_of(generator, shots), 5, 3
        S = len(types)
        vectors = torch.randn(S, D, generator=generator, dtype=torch.float64)
        readout = torch.randn(V, D, generator=generator, dtype=torch.float64)
        ids = torch.randint(0, V, (S,), generator=generator)
        gamma = float(0.4 + 0.4 * torch.rand(1, generator=generator))
        given = {"vectors": vectors, "readout": readout, "ids": ids, "types": types, "gamma": gamma}
        loss = Loss(**given)
        with (
            mock.patch("torch.autograd.grad", no_autograd),
            mock.patch("torch.Tensor.backward", no_autograd),
        ):
            got = student(loss, *given.values())
        expect(
            isinstance(got, (tuple, list)) and len(got) == 2,
            f"the answer is {describe(got)}; return two tensors: by hand, and by differences.",
        )
        case = Case(
            lambda *given: student(lambda vectors: 0.0, *given)[0],
            gradient_steps,
            given,
            {"vectors": "S D", "readout": "V D", "ids": "S", "types": "S"},
            readable_row,
        )
        exact = gradient_steps(**given)["gradient"]
        what = "the gradient by hand"
        same(got[0], exact, wrong_gradients(**given), what, atol=1e-6, case=case)
        by_differences(got[1], got[0], exact, loss)
    figure, panel = plt.subplots(figsize=(7, 2.4), layout="constrained")
    coloured(panel, got[0].norm(dim=1), types)
    panel.set(xlabel="position in the row", ylabel="norm of the gradient", title=f"γ = {gamma:.2f}")
    plt.close(figure)
    return (
        figure,
        "Norm of your gradient by token: bars of one height up to each label, then of another, and "
        "none from the last label on, where nothing is asked any more.",
    )


def readable_row(vectors, readout, ids, types, gamma) -> bool:
    """Has each example a label of one token, and are its ids in the vocabulary?"""
    once = int(masks.is_label(types).sum()) == int(types.max()) // 4 if len(types) else False
    return once and whole_examples(types) and int(ids.max()) < len(readout) and 0 < gamma < 1

"""Checkers of notebook 07: pooling without padding and answer; the learned rational activation."""

import torch
import torch.nn.functional as F

from ..dropin import iapt
from .engine import checker, expect, same

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"


def pool_case(generator: torch.Generator, T: int) -> tuple:
    """Draw z (B, T, m), queries (m, S), mask and answer (B, T); one row has no answer."""
    B, m, S = 3, 5, 2
    order = torch.randperm(B, generator=generator)
    end = T - torch.tensor([0, 1, 3])[order]  # rows differ in their padding
    # an answer of 1 or 2 tokens, more text behind it
    begin = end - 2 - torch.randint(1, 3, (B,), generator=generator)
    place = torch.arange(T)
    mask = place < end[:, None]
    answer = mask & (place >= begin[:, None]) & (place < end[:, None] - 2) & (order < 2)[:, None]
    z = 1.5 * torch.randn(B, T, m, generator=generator)
    return z, torch.randn(m, S, generator=generator), mask, answer


@checker("07.1")
def pool_instruction(student, generator):
    """Softmax over the tokens before the answer, no padding; a weighted mean for each query."""
    import matplotlib.pyplot as plt

    for T in (9, 12):
        z, queries, mask, answer = pool_case(generator, T)
        before = mask & (answer.cumsum(1) == 0)
        scores = z @ queries  # (B, T, S)
        m = z.shape[2]

        def pooled(allowed, scores=scores, dim=1, z=z):
            return (
                scores.masked_fill(~allowed[:, :, None], -torch.inf).softmax(dim).nan_to_num().mT
                @ z
            )

        want = iapt.pool(z, queries, before)
        mean = (z * before[:, :, None]).sum(1, keepdim=True) / before.sum(1)[:, None, None]
        wrong = {
            "padding is pooled, in the row that has no answer: leave out "
            "the tokens at which `mask` is False.": pooled(answer.cumsum(1) == 0),
            "the answer is pooled: a generator that reads it learns to copy "
            "it. Pool only what stands before it.": pooled(mask),
            "only the answer's own tokens are left out; what stands behind them has read them. "
            "Pool only what stands before the first of them.": pooled(mask & ~answer),
            "padding and answer are both pooled: use `mask` and `answer`.": pooled(
                torch.ones_like(mask)
            ),
            "the softmax runs over the queries; each query spreads "
            "its weights over the tokens, dim=1.": pooled(before, dim=2),
            "it is the plain mean of the tokens: weigh "
            "them by the softmax of z @ queries.": mean.expand(-1, queries.shape[1], -1),
            "tokens that are left out get a score of 0, but exp(0) is 1, not 0: set their "
            "score to -inf before the softmax.": (scores * before[:, :, None]).softmax(1).mT @ z,
            "the weights are set to zero after the softmax, so they do not add up to 1 any more: "
            "set the scores to -inf before it.": (scores.softmax(1) * before[:, :, None]).mT @ z,
            "there is no softmax: the scores are used as weights.": (scores * before[:, :, None]).mT
            @ z,
            "the scores are divided by √m, as in attention; this formula does not.": pooled(
                before, scores / m**0.5
            ),
            "it is (B, m, S); the result is (B, S, m), one row for each soft token.": want.mT,
        }
        got = student(z, queries, mask, answer)
        expect(
            not torch.is_tensor(got) or not got.isnan().any(),
            "there are NaNs: a softmax over nothing but -inf. The "
            "softmax must run over the tokens, dim=1, not over the queries.",
        )
        same(got, want, wrong, "the result")
    # tokens that are unit vectors give the weights themselves
    eye = torch.eye(T).expand(len(z), T, T)
    A = student(eye, 1.5 * torch.randn(T, 2, generator=generator), mask, answer)  # (B, S, T)
    figure, panels = plt.subplots(len(z), 1, figsize=(6, 3), sharex=True, layout="constrained")
    for row, panel in enumerate(panels):
        panel.imshow(A[row].tolist(), cmap="Blues", vmin=0, aspect="auto")
        for t in range(T):
            sign = (
                "pad"
                if not mask[row, t]
                else "answer"
                if answer[row, t]
                else ""
                if before[row, t]
                else "behind"
            )
            panel.text(t, 0.5, sign, ha="center", va="center", fontsize=8, color=GREY)
        panel.set(yticks=[0, 1], ylabel=f"text {row + 1}")
    panels[-1].set(xlabel="token", xticks=range(T))
    panels[0].set_title("weight of each token, one line for each query")
    plt.close(figure)
    return figure, (
        "Weights of your pooling for three texts, two queries each: dark cells only before the "
        "answer; answer, what stands behind it, and padding are white."
    )


@checker("07.2")
def rational(student, generator):
    """A polynomial over 1 + |another without constant term|, in float32."""
    import matplotlib.pyplot as plt

    for n, d in ((7, 5), (4, 3)):
        x = torch.linspace(-2, 2, 8).view(2, 4) + 0.2 * torch.rand(2, 4, generator=generator)
        a = torch.randn(n, generator=generator)
        b = 0.3 + torch.rand(d, generator=generator)
        # signs that alternate: the terms' absolute values are another sum
        b = b * (1 - 2 * (torch.arange(d) % 2))

        def powers(c, first, x=x):
            return sum(c[i] * x ** (first + i) for i in range(len(c)))

        top, bottom = powers(a, 0), powers(b, 1)
        want = iapt.rational(x, a, b)
        each = sum((b[i] * x ** (1 + i)).abs() for i in range(d))
        wrong = {
            "the 1 in the denominator is missing: near x = 0 you divide by almost nothing.": top
            / bottom.abs(),
            "the absolute value is missing: where the sum is -1 the denominator is zero.": top
            / (1 + bottom),
            "each term of the denominator has its own absolute value; here "
            "it is the absolute value of the sum.": top / (1 + each),
            "the absolute value is around the whole denominator: 1 + "
            "|…| is at least 1, |1 + …| may be 0.": top / (1 + bottom).abs(),
            "the numerator's coefficients are reversed: a[0] is the constant term.": powers(
                a.flip(0), 0
            )
            / (1 + bottom.abs()),
            "the denominator's coefficients are reversed: b[0] belongs to x.": top
            / (1 + powers(b.flip(0), 1).abs()),
            "both lists of coefficients are reversed: a[0] is "
            "the constant term, b[0] belongs to x.": powers(a.flip(0), 0)
            / (1 + powers(b.flip(0), 1).abs()),
            "the denominator begins with a constant: b[0] belongs to x¹, not to x⁰.": top
            / (1 + powers(b, 0).abs()),
            "the numerator begins with x: a[0] is the constant term.": powers(a, 1)
            / (1 + bottom.abs()),
            "there is no denominator: it is the numerator alone.": top,
            "it is multiplied by the denominator: divide.": top * (1 + bottom.abs()),
        }
        same(student(x, a, b), want, wrong, "the result")
    half = torch.tensor([-9.0, -3.0, 0.0, 3.0, 9.0], dtype=torch.float16)
    a, b = torch.tensor(iapt.GELU_NUMERATOR), torch.tensor(iapt.GELU_DENOMINATOR)
    got = student(half, a, b)
    expect(
        got.dtype == torch.float32 and torch.allclose(got, iapt.rational(half, a, b), atol=1e-3),
        "in half precision x⁶ overflows from x = 6.4 on (the largest "
        "number is 65504): begin with x.float().",
    )
    x = torch.linspace(-8, 8, 200)
    figure, panel = plt.subplots(figsize=(5, 2.6), layout="constrained")
    panel.plot(x, student(x, a, b), color=BLUE, linewidth=4, alpha=0.5, label="your function")
    panel.plot(x, F.gelu(x), "--", color="black", label="GELU")
    panel.plot(x, student(x, a, 2 * b), ":", color=ORANGE, label="b doubled")
    panel.set(xlabel="x", ylabel="g(x)")
    panel.legend(frameon=False)
    plt.close(figure)
    return (
        figure,
        "Your function with the library's coefficients lies on GELU; with "
        "another denominator it bends away.",
    )

"""Typical wrong answers to notebook 07, and words that the checker's message must hold."""

import torch


def pool(
    keep=lambda mask, answer: mask & (answer.cumsum(1) == 0),
    dim=1,
    fill=-torch.inf,
    scale=1.0,
    nan=False,
):
    def pool_instruction(z, queries, mask, answer):
        scores = (z @ queries * scale).masked_fill(~keep(mask, answer)[:, :, None], fill)
        weights = scores.softmax(dim)
        return (weights if nan else weights.nan_to_num()).mT @ z

    return pool_instruction


def plain_mean(z, queries, mask, answer):
    keep = mask & (answer.cumsum(1) == 0)
    mean = (z * keep[:, :, None]).sum(1) / keep.sum(1, keepdim=True)
    return mean[:, None].repeat(1, queries.shape[1], 1)


def zeroed_afterwards(z, queries, mask, answer):
    return ((z @ queries).softmax(1) * (mask & (answer.cumsum(1) == 0))[:, :, None]).mT @ z


def fraction(
    top=lambda a: a,
    bottom=lambda b: b,
    first=1,
    denominator=lambda s: 1 + s.abs(),
    cast=torch.Tensor.float,
):
    def rational(x, a, b):
        x, a, b = cast(x), top(a), bottom(b)
        above = sum(a[i] * x**i for i in range(len(a)))
        return above / denominator(sum(b[i] * x ** (i + first) for i in range(len(b))))

    return rational


def own_absolute_values(x, a, b):
    x = x.float()
    return sum(c * x**i for i, c in enumerate(a)) / (
        1 + sum((c * x ** (i + 1)).abs() for i, c in enumerate(b))
    )


def flipped(c):
    return c.flip(0)


WRONG = {
    "pool_instruction": [
        (pool(lambda mask, answer: answer.cumsum(1) == 0), "padding is pooled"),
        (pool(lambda mask, answer: mask), "the answer is pooled"),
        (pool(lambda mask, answer: mask & ~answer), "has read them"),
        (pool(dim=2), "runs over the queries"),
        (pool(dim=2, nan=True), "must run over the tokens"),
        (plain_mean, "plain mean"),
        (pool(fill=0.0), "exp(0) is 1"),
        (zeroed_afterwards, "do not add up to 1"),
    ],
    "rational": [
        (fraction(denominator=lambda s: s.abs()), "the 1 in the denominator is missing"),
        (fraction(denominator=lambda s: 1 + s), "the absolute value is missing"),
        (fraction(top=flipped, bottom=flipped), "both lists of coefficients are reversed"),
        (fraction(bottom=flipped), "b[0] belongs to x"),
        (fraction(first=0), "begins with a constant"),
        (own_absolute_values, "its own absolute value"),
        (fraction(cast=lambda x: x), "overflows"),
    ],
}

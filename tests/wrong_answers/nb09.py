"""Typical wrong answers to notebook 09, and words that the checker's message must hold."""

import torch


def cache(
    factor=2,
    heads_kept=lambda heads, kv_heads: kv_heads,
    rows_count=True,
    bytes_each=lambda itemsize: itemsize,
    head=lambda width, heads: width // heads,
    power=1,
):
    def cache_size(layers, width, heads, kv_heads, rows, tokens, itemsize):
        sequences = (rows if rows_count else 1) * tokens**power
        numbers = layers * sequences * heads_kept(heads, kv_heads) * head(width, heads)
        return factor * numbers * bytes_each(itemsize)

    return cache_size


def gather(term, divide=lambda n, rows: n, keep=True):
    def accumulated_gradient(weight, rows, losses_of):
        weight, n = weight.detach().requires_grad_(), 0
        for row in rows:
            if not keep:
                weight.grad = None
            losses = losses_of(weight, row)
            term(losses).backward()
            n += len(losses)
        return weight.grad / divide(n, len(rows))

    return accumulated_gradient


def all_at_once(weight, rows, losses_of):
    weight = weight.detach().requires_grad_()
    return torch.autograd.grad(torch.cat([losses_of(weight, row) for row in rows]).mean(), weight)[
        0
    ]


def without_gradient(weight, rows, losses_of):
    return sum(losses_of(weight, row).sum() for row in rows)


WRONG = {
    "cache_size": [
        (cache(factor=1), "keys and values"),
        (cache(heads_kept=lambda heads, kv_heads: heads), "grouped heads"),
        (cache(rows_count=False), "the rows are missing"),
        (cache(bytes_each=lambda itemsize: 1), "you counted numbers"),
        (cache(bytes_each=lambda itemsize: 4), "not always 4"),
        (cache(head=lambda width, heads: width), "as wide as the model"),
        (cache(power=2), "squared"),
    ],
    "accumulated_gradient": [
        (gather(torch.mean, lambda n, rows: rows), "mean of the rows' means"),
        (gather(torch.mean, lambda n, rows: 1), "means are added up"),
        (gather(torch.sum, lambda n, rows: 1), "divide by their number"),
        (gather(torch.sum, lambda n, rows: rows), "divided by the number of rows"),
        (gather(torch.sum, keep=False), "only the last row"),
        (all_at_once, "kept at once"),
        (without_gradient, "have no gradient"),
    ],
}

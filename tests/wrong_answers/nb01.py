"""Typical wrong answers to notebook 01, and words that the checker's message must hold."""

import torch


def prompt(template, shots, query, end=str.rstrip):
    rows = [
        template.input.format(x) + template.intra + template.output.format(y) + template.inter
        for x, y in shots
    ]
    return (
        "".join(rows)
        + template.input.format(query)
        + template.intra
        + end(template.output.split("{}")[0])
    )


def without_separators(template, shots, query):
    """Two mistakes: no `intra`, and no `inter` either."""
    rows = [template.input.format(x) + template.output.format(y) for x, y in shots]
    return "".join(rows) + template.input.format(query) + template.output.split("{}")[0].rstrip(" ")


def off_by_one_and_the_mean(logits, n_prompt, label_ids):
    at = range(n_prompt, n_prompt + len(label_ids))
    return logits.log_softmax(-1)[[min(i, len(logits) - 1) for i in at], label_ids].mean() - 1


def tokens_at(logits, first, label_ids):
    return torch.stack(
        [logits.log_softmax(-1)[first + t, token] for t, token in enumerate(label_ids[:1])]
    ).mean()


WRONG = {
    "write_prompt": [
        (
            lambda template, shots, query: prompt(
                template, shots, query, lambda text: text.rstrip() + " "
            ),
            "space",
        ),
        (lambda template, shots, query: prompt(template, shots[::-1], query), "reversed order"),
        (
            lambda template, shots, query: prompt(template, [(y, x) for x, y in shots], query),
            "(text, label)",
        ),
        (lambda template, shots, query: prompt(template, [], query), "examples are missing"),
        (
            lambda template, shots, query: prompt(template, shots, query) + template.inter,
            "where the label begins",
        ),
        (lambda template, shots, query: None, "is the `return` missing"),
        (
            without_separators,
            """
    shots = []
    query = '""",
        ),
    ],
    "label_score": [
        (
            lambda logits, n_prompt, label_ids: tokens_at(logits[1:], n_prompt - 1, label_ids),
            "off by one",
        ),
        (
            lambda logits, n_prompt, label_ids: logits[
                range(n_prompt - 1, len(logits) - 1), label_ids
            ].mean(),
            "log_softmax",
        ),
        (
            lambda logits, n_prompt, label_ids: logits.log_softmax(-1)[
                range(n_prompt - 1, len(logits) - 1), label_ids
            ].mean(),
            "it is the mean",
        ),
        (
            lambda logits, n_prompt, label_ids: logits.log_softmax(-1)[
                n_prompt - 1, label_ids
            ].sum(),
            "position of its own",
        ),
        (lambda logits, n_prompt, label_ids: logits[n_prompt - 1 :, label_ids], "has shape"),
        (off_by_one_and_the_mean, "positions to read: [0]"),
    ],
}

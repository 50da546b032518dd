"""Checkers of notebook 14: a label's probability, and a set of hyper-parameters that spoils CPT."""

import numpy as np
import torch

from ..engine.scores import reduce_tokens
from ..methods.registry import hyperparameters
from .engine import checker, describe, expect, same
from .smallest import Case


def label_case(generator: torch.Generator, lengths: list[int], N: int) -> list[torch.Tensor]:
    """Draw the log-probabilities of each label's tokens (N, its length).

    First tokens are unlikely, later ones likely: once a word has begun, its end is easy to guess.
    """
    tokens = []
    for n in lengths:
        log_p = -0.3 * torch.rand(N, n, generator=generator)
        log_p[:, 0] -= 1 + 3 * torch.rand(N, generator=generator)
        tokens.append(log_p)
    return tokens


def probability_steps(tokens) -> dict:
    """Each word's log-probability, and the probabilities among the labels."""
    sums = torch.stack([log_p.sum(1) for log_p in tokens], dim=1)  # (N, C)
    return {"log-probability of each word": sums, "result": sums.softmax(-1)}


@checker("14.1")
def label_probabilities(student, generator):
    """Sum the log-probabilities of a label's tokens, then softmax over the labels."""
    import matplotlib.pyplot as plt

    for lengths, N in (([3, 1, 1, 2], 5), ([1, 1], 3), ([2, 4, 1], 6)):
        tokens = label_case(generator, lengths, N)
        sums = reduce_tokens(tokens, "sum")  # (N, C)
        means = reduce_tokens(tokens, "mean")
        want = sums.softmax(-1)
        added = torch.stack([log_p.exp().sum(1) for log_p in tokens], dim=1)
        last = torch.stack([log_p[:, -1] for log_p in tokens], dim=1)
        products = torch.stack([log_p.prod(1) for log_p in tokens], dim=1)
        wrong = {
            "you take the mean over a label's tokens, so a long label gains from its easy last "
            "tokens. The word's log-probability is the sum.": means.softmax(-1),
            "only each label's first token counts; the others belong to the word, "
            "too.": reduce_tokens(tokens, "first").softmax(-1),
            "only each label's last token counts; add up all of them.": last.softmax(-1),
            "the probabilities of the tokens are added. They follow one another, so they are "
            "multiplied, and their logarithms are added.": added / added.sum(1, keepdim=True),
            "the probabilities of the tokens are added, and then softmax takes them for "
            "log-probabilities.": added.softmax(-1),
            "the log-probabilities are multiplied: logarithms are added where probabilities are "
            "multiplied.": products.softmax(-1),
            "these are the sums of log-probabilities; what is asked for are probabilities among "
            "the labels, rows that add up to 1.": sums,
            "these are means of log-probabilities: take the sum, and then make each row add up "
            "to 1.": means,
            "these are each word's own probabilities, and most of the probability goes to words "
            "that are no label. Divide each row by its sum.": sums.exp(),
            "these are logarithms: softmax, not log_softmax.": sums.log_softmax(-1),
            "softmax runs over the queries; it belongs over the labels, the last "
            "dimension.": sums.softmax(0),
            "labels and queries are the wrong way round: a row is a query.": want.T,
        }
        case = Case(
            student,
            probability_steps,
            {"tokens": tokens},
            {"tokens": "C N *"},
            lambda tokens: (
                len(tokens) > 0
                and all(log_p.numel() > 0 and bool((log_p <= 0).all()) for log_p in tokens)
            ),
        )
        same(student(tokens), want, wrong, "the matrix of probabilities", case=case)
        if N == 5:
            first = want[0], means.softmax(-1)[0], lengths
    by_sum, by_mean, lengths = first
    x = np.arange(len(lengths))
    figure, panel = plt.subplots(figsize=(6, 2.6), layout="constrained")
    panel.bar(x - 0.2, by_sum.tolist(), 0.38, color="#0072B2", label="yours: the sum")
    panel.bar(
        x + 0.2, by_mean.tolist(), 0.38, color="#C8C8C8", edgecolor="#555555", label="the mean"
    )
    panel.set_xticks(x, [f"{n} token{'s' * (n > 1)}" for n in lengths])
    panel.set(ylabel="probability", xlabel="label word")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    plt.close(figure)
    return (
        figure,
        "Bars for one query: each label's probability by the sum, yours, beside what the mean "
        "would give; labels of several tokens gain from the mean.",
    )


def check_values(hp: dict) -> None:
    """Raise `NotYet` where a training of CPT could start and would have nothing to do."""
    for name in ("epsilon", "epsilon_format"):
        expect(hp[name] > 0, f"`{name}` is 0: a ball needs a radius. A tiny one keeps ICL.")


@checker("14.2")
def make_worse(student, generator):
    """The changed hyper-parameters are valid, and both accuracies were measured, not typed."""
    hp = hyperparameters("cpt", "micro")
    measured = []

    def accuracy_of(values):
        expect(
            isinstance(values, dict),
            f"`accuracy_of` takes a dictionary of hyper-parameters, not {describe(values)}.",
        )
        whole = {**hp, **hyperparameters("cpt", "micro", values)}
        check_values(whole)
        measured.append((whole, 100 * torch.rand(1, generator=generator).item()))
        return measured[-1][1]

    answer = student(accuracy_of, dict(hp))
    expect(
        isinstance(answer, (tuple, list)) and len(answer) == 3,
        f"the answer is {describe(answer)}; return three things: the changed hyper-parameters, "
        "the accuracy before, the accuracy after.",
    )
    changed, before, after = answer
    expect(isinstance(changed, dict), f"the first of the three is {describe(changed)}, not a dict.")
    changed = {**hp, **hyperparameters("cpt", "micro", changed)}
    check_values(changed)
    expect(changed != hp, "nothing is changed: the hyper-parameters are those that you were given.")
    of_before = [value for whole, value in measured if whole == hp]
    of_after = [value for whole, value in measured if whole == changed]
    turned = before in of_after and after in of_before
    expect(not turned, "the two accuracies are the wrong way round: before comes first.")
    expect(
        before in of_before,
        "the accuracy before does not come from `accuracy_of(hp)`: measure it on the "
        "hyper-parameters that you were given.",
    )
    expect(
        after in of_after,
        "the accuracy after does not come from `accuracy_of` on the changed hyper-parameters: "
        "measure it, a guess is no result.",
    )
    return drawn_changes(hp, changed)


def drawn_changes(hp: dict, changed: dict):
    """A table of what was changed, as a figure, and its alt text."""
    import matplotlib.pyplot as plt

    rows = [(name, hp[name], value) for name, value in changed.items() if value != hp[name]]
    figure, panel = plt.subplots(figsize=(5, 0.32 * len(rows) + 0.5), layout="constrained")
    panel.axis("off")
    text = [[name, str(old), str(new)] for name, old, new in rows]
    table = panel.table(text, colLabels=["hyper-parameter", "before", "yours"], loc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    plt.close(figure)
    names = ", ".join(name for name, _, _ in rows)
    return figure, f"A table of the hyper-parameters that you changed, old and new: {names}."

"""Checker of notebook 05: the loss of a row."""

import torch

from ..core import masks
from ..core.loss import IGNORE, label_loss
from .engine import checker, equal, same
from .nb04 import types_of
from .smallest import Case
from .steps import loss_steps, one_token_labels


def loss_case(generator: torch.Generator, shots: int) -> tuple:
    """Draw a row: the student's arguments, the terms, their loss, wrong losses by their words."""
    types, V = types_of(generator, shots + 1), 11
    S = len(types)
    gamma = float(0.4 + 0.5 * torch.rand(1, generator=generator))
    ids = torch.randint(0, V, (S,), generator=generator)
    logits = 2 * torch.randn(S, V, generator=generator)
    at = masks.is_label(types).nonzero()[:, 0]
    zeros = (~masks.is_updated(types)).nonzero()[:, 0]  # labels and separators
    example = masks.example_of(types)
    back = torch.arange(len(at)).flip(0)

    def losses(where=at, shift=1):
        log_p = logits.log_softmax(-1)
        return -log_p[where - shift].gather(1, ids[where][:, None])[:, 0]

    def weighed(terms, exponent=back):
        return (gamma ** exponent.float() * terms).sum()

    labels = ids.masked_fill(~masks.is_label(types), IGNORE)
    want = label_loss(logits[None], labels[None], types[None], gamma, "sum")
    wrong = {
        "off by one: the logits at position s speak about token s + "
        "1, so a label at s is read at s - 1.": weighed(losses(shift=0)),
        "off by one to the other side: a label at s is read at s - 1, not s - 2.": weighed(
            losses(shift=2)
        ),
        "the decay is the wrong way round: the last label weighs "
        "1, and the farther back, the less.": weighed(losses(), back.flip(0)),
        "the last label, the training example's, weighs gamma; it must weigh 1.": weighed(
            losses(), back + 1
        ),
        "gamma is not used: earlier labels weigh less.": losses().sum(),
        "only the training example's label counts; the "
        "context's labels belong to the loss, too.": losses()[-1],
        "the training example's label is missing: it is the last one of the row.": want
        - losses()[-1],
        "it is the mean over the labels (PEFT's variant); the paper's loss is the sum.": want
        / len(at),
        "it is divided by the sum of the weights; the paper's loss is the plain weighted sum.": want
        / (gamma ** back.float()).sum(),
        "all tokens count; only the labels are targets.": losses(torch.arange(1, S)).sum(),
        "all tokens count, averaged; only the labels are targets, and they are summed.": losses(
            torch.arange(1, S)
        ).mean(),
        "the separators count as labels: type 0 is a multiple of 4, but no label.": weighed(
            losses(zeros), example.max() - example[zeros]
        ),
        "the separators count as labels, each as one that "
        "comes later: ask for types > 0, too.": weighed(
            losses(zeros), torch.arange(len(zeros)).flip(0)
        ),
        "the separators count as labels, weighed by the labels "
        "after them: ask for types > 0, too.": weighed(losses(zeros), (at > zeros[:, None]).sum(1)),
        "the sign is turned: a loss is positive, it is the negative log-probability.": -want,
    }
    return (logits, ids, types, gamma), gamma ** back.float() * losses(), want, wrong


@checker("05.1")
def row_loss(student, generator):
    """Sum of gamma^(labels after it) times each label's cross-entropy, read one place before."""
    import matplotlib.pyplot as plt

    given, terms, want, wrong = zip(*(loss_case(generator, shots) for shots in (4, 2, 3)))
    got = [student(*arguments) for arguments in given]
    # all rows at once: one number alone may hit a wrong one by chance
    same(
        got,
        list(want),
        {words: [case[words] for case in wrong] for words in wrong[0]},
        "the list of three rows' losses",
        case=next(
            (
                Case(
                    student,
                    loss_steps,
                    dict(zip(("logits", "ids", "types", "gamma"), arguments)),
                    {"logits": "S V", "ids": "S", "types": "S"},
                    one_token_labels,
                )
                for arguments, x, y in zip(given, got, want)
                if not equal(x, y, 1e-4)
            ),
            None,
        ),
    )
    names = ["context label"] * (len(terms[0]) - 1) + ["training label"]
    figure, panel = plt.subplots(figsize=(6.5, 1.9), layout="constrained")
    left = 0.0
    for k, (name, term) in enumerate(zip(names, terms[0].tolist())):
        panel.barh(
            0,
            term,
            left=left,
            color="#D55E00" if name == names[-1] else "#56B4E9",
            edgecolor="black",
            label=name if name not in names[:k] else None,
        )
        left += term
    panel.set(xlabel="weighted cross-entropy, summed up", yticks=[])
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    plt.close(figure)
    return (
        figure,
        "Your loss as one bar: a blue part for each context label, an "
        "orange one for the training label.",
    )

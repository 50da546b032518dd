"""Checkers of notebook 02: several words for one class; contextual calibration."""

import torch

from .engine import checker, same
from .smallest import Case


def word_input(log_p, class_of) -> dict:
    """The arguments of `class_scores`."""
    return {"log_p": log_p, "class_of": class_of, "n_classes": int(class_of.max()) + 1}


def class_steps(log_p, class_of) -> dict:
    """The words' probabilities, the classes', and their logarithms."""
    p = log_p.exp()  # (N, W)
    classes = range(int(class_of.max()) + 1)
    of_class = torch.stack([p[:, class_of == c].sum(-1) for c in classes], dim=-1)  # (N, C)
    return {
        "probability of each word": p,
        "probability of each class": of_class,
        "score": of_class.log(),
    }


def words_of_classes(log_p, class_of) -> bool:
    """Are these probabilities of words, and has each class one?"""
    every = set(class_of.tolist()) == set(range(int(class_of.max()) + 1))
    return len(log_p) > 0 and every and bool((log_p.exp().sum(-1) <= 1).all())


@checker("02.1")
def class_scores(student, generator):
    """The probability of a class is the sum over its words, in logarithms."""
    import matplotlib.pyplot as plt

    for N, C, words_per_class in ((4, 3, 2), (5, 2, 3)):
        log_p = (2 * torch.randn(N, 30, generator=generator)).log_softmax(-1)
        log_p = log_p[:, : C * words_per_class]  # (N, W)
        class_of = torch.arange(C).repeat(words_per_class)[
            torch.randperm(C * words_per_class, generator=generator)
        ]
        words = [log_p[:, class_of == c] for c in range(C)]
        p = torch.stack([w.exp().sum(-1) for w in words], dim=-1)  # (N, C)
        want = p.log()
        wrong = {
            "log-probabilities are summed: that multiplies the probabilities, as if all words had "
            "to come at once. Add probabilities, and take the logarithm of the sum.": torch.stack(
                [w.sum(-1) for w in words], -1
            ),
            "these are means of log-probabilities: one word that never comes would sink its whole "
            "class. Add probabilities, and take the logarithm of the sum.": torch.stack(
                [w.mean(-1) for w in words], -1
            ),
            "these are means of probabilities; add them: the class is "
            "right whichever of its words comes.": (
                torch.stack([w.exp().mean(-1) for w in words], -1).log()
            ),
            "only the best word of each class counts; the others' "
            "probability belongs to the class too.": torch.stack([w.amax(-1) for w in words], -1),
            "these are probabilities; return their logarithms.": p,
            "the result is normalised over the classes; leave it as it "
            "is, log-probabilities of the words.": (want.log_softmax(-1)),
            "rows are classes and columns are queries; it should be (N, C), one row for each query.": want.T,
        }
        given = {"log_p": log_p, "class_of": class_of}
        axes = {"log_p": "N W", "class_of": "W"}
        case = Case(student, class_steps, given, axes, words_of_classes, word_input)
        same(student(log_p, class_of, C), want, wrong, "the result", case=case)
    figure, panel = plt.subplots(figsize=(6, 3), layout="constrained")
    blues = ["#9FD3F2", "#56B4E9", "#BFE0F5", "#7CC4EE"]
    for c in range(C):
        low = 0
        for shade, probability in zip(blues, words[c][0].exp().tolist()):
            panel.bar(c, probability, 0.6, bottom=low, color=shade, edgecolor="white")
            low += probability
    scored = student(log_p, class_of, C)[0].exp().tolist()
    mark = {"color": "#D55E00", "linewidth": 4, "label": "your class score"}
    panel.hlines(scored, [c - 0.4 for c in range(C)], [c + 0.4 for c in range(C)], **mark)
    panel.bar(0, 0, color=blues[1], label="one block for each word")
    panel.set_xticks(range(C), [f"class {c}" for c in range(C)])
    panel.set(ylabel="probability after one query", ylim=(0, 1.1 * max(scored)))
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    plt.close(figure)
    return (
        figure,
        "For one query, the probabilities of each class's words as stacked "
        "blocks; your score is a line at their top.",
    )


def calibration_steps(scores, content_free) -> dict:
    """Probabilities before, the labels' mean probability without content, the quotient, its rows made to sum to 1."""
    p, prior = scores.softmax(-1), content_free.softmax(-1).mean(0)  # (N, C), (C,)
    divided = p / prior
    return {
        "probabilities before": p,
        "mean probability of each label after content-free inputs": prior,
        "divided": divided,
        "calibrated": divided / divided.sum(-1, keepdim=True),
    }


@checker("02.2")
def calibrated(student, generator):
    """Divide by the labels' mean probability after content-free inputs."""
    import matplotlib.pyplot as plt

    for N, C, M in ((4, 2, 3), (6, 3, 2)):
        scores = 2 * torch.randn(N, C, generator=generator) - 3
        content_free = 2 * torch.randn(M, C, generator=generator) - 3
        p, prior = scores.softmax(-1), content_free.softmax(-1)  # (N, C), (M, C)
        divided = p / prior.mean(0)
        want = divided / divided.sum(-1, keepdim=True)
        wrong = {
            name: q / q.sum(-1, keepdim=True)
            for name, q in {
                "multiplied by the content-free probabilities: "
                "that makes the bias stronger. Divide.": p * prior.mean(0),
                "nothing is calibrated: these are the probabilities before.": p,
                "only the first content-free input is used; take the "
                "mean probability over all of them.": p / prior[0],
                "only the last content-free input is used; take the "
                "mean probability over all of them.": p / prior[-1],
                "the content-free log-scores are averaged; turn them into "
                "probabilities first, then take the mean.": (p / content_free.mean(0).softmax(-1)),
                "the content-free scores are exponentiated, but not "
                "normalised over the labels: each input counts by how "
                "likely labels are after it at all.": p / content_free.exp().mean(0),
                "softmax runs over the queries; it belongs "
                "over the labels, the last dimension.": scores.softmax(0) / prior.mean(0),
            }.items()
        } | {
            "right up to the last step: the rows do not add up to 1 after the division.": divided,
            "these are logarithms; return probabilities.": want.log(),
            "log-scores, without the last softmax.": divided.log(),
            "log-scores are divided by probabilities: make them probabilities first.": scores
            / prior.mean(0),
        }
        case = Case(
            student,
            calibration_steps,
            {"scores": scores, "content_free": content_free},
            {"scores": "N C", "content_free": "M C"},
            lambda scores, content_free: scores.numel() > 0 and content_free.numel() > 0,
        )
        same(student(scores, content_free), want, wrong, "the result", case=case)
    figure, panels = plt.subplots(1, 3, figsize=(8, 3), sharey=True, layout="constrained")
    maps = {
        "before": p,
        "divide by": prior.mean(0)[None],
        "after": student(scores, content_free),
    }
    for panel, (title, rows) in zip(panels, maps.items()):
        panel.imshow(rows.tolist(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for n, row in enumerate(rows.tolist()):
            for c, share in enumerate(row):
                colour = "white" if share > 0.6 else "black"
                panel.text(c, n, f"{share:.2f}", ha="center", va="center", color=colour)
        panel.set(title=title, xlabel="label", xticks=range(C))
        panel.spines[:].set_visible(False)
    panels[0].set(ylabel="query", ylim=(N - 0.5, -0.5))
    panels[1].text(1, 1, "the mean after\ncontent-free inputs", ha="center", va="center")
    plt.close(figure)
    return (
        figure,
        "Three maps of probabilities, one column per label: six queries before calibration, the mean "
        "after content-free inputs, and the queries after your division.",
    )

"""Checkers of notebook 01: a prompt is a string; a label's score is the log-probability of the whole label."""

import torch

from ..core.templates import Template
from .engine import checker, same
from .smallest import Case

WORDS = [
    "red",
    "green",
    "blue",
    "stone",
    "river",
    "cloud",
    "seven",
    "lamp",
    "paper",
    "glass",
    "winter",
    "apple",
]


def pick(generator: torch.Generator, n: int) -> list[str]:
    """Draw n different words."""
    return [WORDS[i] for i in torch.randperm(len(WORDS), generator=generator)[:n]]


def written(template: Template, shots: list[tuple[str, str]], query: str) -> str:
    """Write the prompt up to where the query's label begins; the space before it is the label's token's."""
    pieces = [piece for shot in shots for piece, _ in template.pieces(*shot)]
    open_pieces = [piece for piece, _ in template.pieces(query, "")[:5]]
    return "".join(pieces + open_pieces).rstrip(" ")


def filled(input, output, intra, inter, shots, query) -> dict:
    """The arguments of `write_prompt`, from the strings that a template is made of."""
    return {
        "template": Template(input, output, intra, inter),
        "shots": [tuple(shot) for shot in shots],
        "query": query,
    }


def prompt_steps(input, output, intra, inter, shots, query) -> dict:
    """The pieces of a prompt, and the prompt."""
    rows = [input.format(x) + intra + output.format(y) + inter for x, y in shots]
    last = input.format(query) + intra + output.split("{}")[0].rstrip()
    return {"each shot": rows, "the query": last, "prompt": "".join([*rows, last])}


def well_formed(input, output, intra, inter, shots, query) -> bool:
    """Does each template hold its place once, and is no text empty?"""
    once = input.count("{}") == output.count("{}") == 1
    words = [query, *(word for shot in shots for word in shot)]
    return once and all(word.strip() == word and word for word in words)


@checker("01.1")
def write_prompt(student, generator):
    """Every example in full, then the query up to where its label begins."""
    from ..pictures import context_roles

    for input, output, intra, inter in [
        ("text: {}", "class: {}", "\n", "\n"),
        ("{}", "-> {}", " ", " ||\n"),
    ]:
        words = pick(generator, 9)
        shots = [(f"{words[0]} {words[1]}", words[2]), (f"{words[3]} {words[4]}", words[5])]
        query, template = f"{words[6]} {words[7]}", Template(input, output, intra, inter)
        want = written(template, shots, query)
        no_intra, no_inter = Template(input, output, "", inter), Template(input, output, intra, "")
        swapped = [(label, text) for text, label in shots]
        stop = want.rindex(output.split("{}")[0].rstrip())
        wrong = {
            "it ends in a space. Tokens carry their space in front (' red'), so a space at the end "
            "becomes a token of its own, which hardly any text has there: strip it.": want + " ",
            "the query's output template is missing: without it the model "
            "does not know that a label comes next.": (want[:stop]),
            "the query's output template is missing, and so is the separator before it.": want[
                :stop
            ].removesuffix(intra),
            "`template.intra`, between text and output template, is missing.": written(
                no_intra, shots, query
            ),
            "`template.inter`, after each example, is missing.": written(no_inter, shots, query),
            "`template.intra` and `template.inter` are the wrong way round.": written(
                Template(input, output, inter, intra), shots, query
            ),
            "the examples come in reversed order.": written(template, shots[::-1], query),
            "text and label of the examples are the wrong "
            "way round: a shot is (text, label).": written(template, swapped, query),
            "the examples are missing, only the query is there.": written(template, [], query),
            "the query is followed by an example's separator: the "
            "prompt must stop where the label begins.": (want + template.inter),
            "the braces are still there: fill the templates with `.format`.": want.replace(
                query, "{}"
            ),
        }
        strings = {"input": input, "output": output, "intra": intra, "inter": inter}
        given = {**strings, "shots": shots, "query": query}
        case = Case(student, prompt_steps, given, {"shots": "K"}, well_formed, filled)
        same(student(template, shots, query), want, wrong, "the prompt", case=case)
    rows = [*(template.pieces(*shot) for shot in shots), template.pieces(query, "")[:5]]
    boxes = [
        (piece, role + 4 * i if role else 0)
        for i, row in enumerate(rows)
        for piece, role in row
        if piece
    ]
    return context_roles(
        *zip(*boxes)
    ), "Your prompt as boxes coloured by role; the last line, the query, has no label."


def label_input(logits, label_ids) -> dict:
    """The arguments of `label_score`: the label's tokens stand at the end of the positions."""
    return {"logits": logits, "n_prompt": len(logits) - len(label_ids), "label_ids": label_ids}


def score_steps(logits, label_ids) -> dict:
    """Where each of the label's tokens is read, what it says, and the sum."""
    first = len(logits) - len(label_ids) - 1
    positions = [first + t for t in range(len(label_ids))]
    log_p = logits.log_softmax(-1)[positions, label_ids]
    return {"positions to read": positions, "log-probability of each": log_p, "score": log_p.sum()}


@checker("01.2")
def label_score(student, generator):
    """The log-probability of the label: the sum over its tokens, each read one position before it."""
    import matplotlib.pyplot as plt

    for n_label in (1, 3, 2):
        n_prompt, V = int(torch.randint(4, 9, (1,), generator=generator)), 12
        logits = 3 * torch.randn(n_prompt + n_label, V, generator=generator)
        label = torch.randperm(V, generator=generator)[:n_label].tolist()
        log_p = logits.log_softmax(-1)

        def at(first, values=log_p, label=label):
            return torch.stack(
                [values[min(first + t, len(values) - 1), token] for t, token in enumerate(label)]
            )

        want = at(n_prompt - 1).sum()
        wrong = {
            "off by one: the logits at position t say what comes at t + 1, so the label's first "
            "token is read at the prompt's last position.": at(n_prompt).sum(),
            "off by one to the other side: you read two positions before the label.": at(
                n_prompt - 2
            ).sum(),
            "it is the mean over the label's tokens. The probability of the whole label is the product of its "
            "tokens' probabilities, so add up the logarithms.": want / n_label,
            "these are logits: make them log-probabilities first, "
            "with log_softmax over the vocabulary.": at(n_prompt - 1, logits).sum(),
            "log_softmax runs over the positions; it belongs over "
            "the vocabulary, the last dimension.": at(n_prompt - 1, logits.log_softmax(0)).sum(),
            "these are probabilities, not their logarithms.": at(
                n_prompt - 1, logits.softmax(-1)
            ).sum(),
            "this is the label's probability; return its logarithm.": want.exp(),
            "only the label's first token counts; add up all of them.": at(n_prompt - 1)[0],
            "only the label's last token counts; add up all of them.": at(n_prompt - 1)[-1],
            "the sign is turned: a log-probability is "
            "negative, the more likely the closer to 0.": -want,
            "every label token is read at the prompt's last "
            "position; each has a position of its own.": log_p[n_prompt - 1, label].sum(),
        }
        case = Case(
            student,
            score_steps,
            {"logits": logits, "label_ids": label},
            {"logits": "S V", "label_ids": "n"},
            lambda logits, label_ids: (
                len(logits) > len(label_ids) > 0 and max(label_ids) < logits.shape[1]
            ),
            label_input,
        )
        same(student(logits, n_prompt, label), want, wrong, "the score", case=case)
    figure, panel = plt.subplots(figsize=(5, 2.6), layout="constrained")
    panel.imshow(log_p.exp().tolist(), cmap="Blues", aspect="auto")
    panel.plot(
        label,
        range(n_prompt - 1, n_prompt - 1 + n_label),
        "s",
        color="#D55E00",
        markerfacecolor="none",
        ms=14,
    )
    panel.set(xlabel="token of the vocabulary", ylabel="position", title="what your function reads")
    plt.close(figure)
    return (
        figure,
        "Probabilities by position and token; squares mark one cell "
        "for each label token, a row apart.",
    )

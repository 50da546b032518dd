"""Checkers of notebook 04: roles of an example, types of a context, who moves, label weights."""

import re

import torch

from ..core import masks, templates
from ..core.loss import IGNORE, token_weights
from .engine import checker, expect, same
from .smallest import Case
from .steps import (
    decay_steps,
    one_role_each,
    role_steps,
    tokens_of,
    type_steps,
    updated_steps,
    whole_examples,
)

WORDS = "red green blue stone river cloud seven lamp paper glass".split()


def lengths(generator: torch.Generator, n: int, low: int = 1, high: int = 4) -> list[int]:
    """Draw n whole numbers from low to high."""
    return torch.randint(low, high + 1, (n,), generator=generator).tolist()


def roles_of(generator: torch.Generator, label_tokens: int = 1) -> torch.Tensor:
    """Draw the roles of one complete example, (T,): separators in the middle and at the end."""
    before, text, after = lengths(generator, 3)
    return torch.tensor([1] * before + [2] * text + [0] + [3] * after + [4] * label_tokens + [0])


def types_of(generator: torch.Generator, shots: int, label_tokens: int = 1) -> torch.Tensor:
    """Draw the types of a context of `shots` examples, (P,)."""
    examples = [roles_of(generator, label_tokens) for _ in range(shots)]
    return torch.cat([torch.where(roles > 0, roles + 4 * i, 0) for i, roles in enumerate(examples)])


@checker("04.1")
def roles_of_tokens(student, generator):
    """Each token has the role of the piece that gives it most characters other than spaces."""
    from ..pictures import context_roles

    for output, intra in (("kind: {}", "\n"), ("is {}.", " "), ("{}", " ")):
        text, other, label = [WORDS[i] for i in torch.randperm(10, generator=generator)[:3]]
        template = templates.Template("odd text: {}!", output, intra, "\n")
        pieces = template.pieces(f"a {text} {other}", label)
        string = "".join(piece for piece, _ in pieces)
        spans = [found.span() for found in re.finditer(r" ?\w+| ?[^\w\s]|\s", string)]
        of_character = [role for piece, role in pieces for _ in piece]
        most = [of_character[end - 1] for _, end in spans]  # these tokens have one letter or more
        same(
            student(pieces, spans),
            most,
            {
                "the first character decides. A token often begins with a space that another piece "
                "wrote: 'Ġgood' is the label, though its space is the template's. Count the "
                "characters that are no spaces.": [of_character[start] for start, _ in spans],
                "there is one role for each piece; there must be one for each token: a piece of three "
                "tokens gives its role three times.": [role for piece, role in pieces if piece],
                "there is one role for each character; there must be one for each token.": of_character,
                "spaces are counted like letters, so that in ' a' the space and the letter are even. "
                "Leave spaces out, unless the token has nothing else.": counted(
                    of_character, spans
                ),
                "the label has the output template's role, 3: it needs its "
                "own, 4, or nothing will be a target.": [min(role, 3) for role in most],
                "the separators have the role of what stands before them; theirs is 0.": carried(
                    most
                ),
            },
            "the list of roles",
            case=Case(
                student, role_steps, {"pieces": pieces}, {"pieces": "K"}, one_role_each, tokens_of
            ),
        )
    return context_roles(
        [string[start:end] for start, end in spans], most
    ), "The tokens of the last example as boxes in the colours of their roles."


def counted(of_character: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """Give each token the role of most of its characters, spaces too, on a tie the first."""
    parts = [of_character[start:end] for start, end in spans]
    return [max(part, key=part.count) for part in parts]


def carried(roles: list[int]) -> list[int]:
    """Give each 0 the number before it."""
    result = []
    for role in roles:
        result.append(role or result[-1])
    return result


@checker("04.2")
def join_types(student, generator):
    """Example i, counted from 0, adds 4*i; separators stay 0."""
    import matplotlib.pyplot as plt

    for shots in (3, 5, 1):
        examples = [roles_of(generator) for _ in range(shots)]
        want = torch.cat(
            [torch.where(roles > 0, roles + 4 * i, 0) for i, roles in enumerate(examples)]
        )
        largest = int(want.max())
        wrong = {
            "the separators were shifted, too: 0 stays 0, in every example.": torch.cat(
                [roles + 4 * i for i, roles in enumerate(examples)]
            ),
            "off by one: the first example adds "
            "nothing, so count the examples from 0.": torch.where(want > 0, want + 4, 0),
            "example i adds i; it must add 4*i, for there "
            "are four roles besides the separator.": torch.cat(
                [torch.where(roles > 0, roles + i, 0) for i, roles in enumerate(examples)]
            ),
            "example i adds 3*i; it must add 4*i, so that one example's "
            "label is not the next one's template.": torch.cat(
                [torch.where(roles > 0, roles + 3 * i, 0) for i, roles in enumerate(examples)]
            ),
            "example i adds 5*i; it must add 4*i: the "
            "separator's 0 is shared and needs no room.": torch.cat(
                [torch.where(roles > 0, roles + 5 * i, 0) for i, roles in enumerate(examples)]
            ),
            "nothing was added: every example still has the types of the first.": torch.cat(
                examples
            ),
            "the examples are numbered from the end: the first "
            "one adds nothing, the last one most.": torch.cat(
                [
                    torch.where(roles > 0, roles + 4 * (shots - 1 - i), 0)
                    for i, roles in enumerate(examples)
                ]
            ),
            "the examples come in reversed order: join them as they are given.": torch.cat(
                [
                    torch.where(roles > 0, roles + 4 * i, 0)
                    for i, roles in reversed(list(enumerate(examples)))
                ]
            ),
        }
        got = student(examples)
        expect(
            not isinstance(got, list),
            "the result is a list: join the tensors into one with torch.cat.",
        )
        case = Case(
            student,
            type_steps,
            {"examples": examples},
            {"examples": "K *"},
            lambda examples: len(examples) > 0 and all(map(len, examples)),
        )
        same(got, want, wrong, "the tensor of types", case=case)
        if shots == 5:
            drawn, top = got, largest
    figure, panel = plt.subplots(figsize=(7, 2.8), layout="constrained")
    coloured(panel, drawn, drawn)
    panel.set(xlabel="position in the context", ylabel="type", yticks=range(0, top + 1, 4))
    panel.grid(axis="y", alpha=0.3)
    plt.close(figure)
    return (
        figure,
        "Your types against the position: each example climbs four steps, the separators lie at 0.",
    )


def coloured(panel, heights, types) -> None:
    """One bar per token in the colour of its role; a separator shows as a mark on the ground."""
    from ..pictures import ROLE_COLOURS

    roles = masks.role_of(types).tolist()
    colours = [ROLE_COLOURS[role][1] for role in roles]
    panel.bar(
        range(len(types)),
        [float(h) for h in heights],
        color=colours,
        edgecolor="#555555",
        linewidth=0.5,
    )
    at = [i for i, role in enumerate(roles) if role == masks.SEPARATOR]
    panel.plot(at, [0] * len(at), "|", color="#555555")
    panel.spines[["top", "right"]].set_visible(False)


@checker("04.3")
def updated_tokens(student, generator):
    """Inputs and templates of every example move; labels and separators never."""
    import matplotlib.pyplot as plt

    for shots in (4, 1, 3):
        types = types_of(generator, shots, label_tokens=2)
        want = masks.is_updated(types)
        got = student(types)
        roles = masks.role_of(types)
        labels, separators, inputs = masks.is_label(types), types == 0, masks.is_input(types)
        wrong = {
            "the label tokens are marked: they are what the "
            "loss asks for and must never move.": want | labels,
            "the separators are marked (type 0): they never move.": want | separators,
            "these are roles: return booleans, True where CPT may move the token.": roles * want,
            "every token is marked: labels and separators must not move.": want
            | labels
            | separators,
            "it is the wrong way round: True is for what moves.": ~want,
            "only the inputs are marked: the templates around them move, too.": inputs,
            "only the templates are marked: the inputs move, too.": masks.is_template(types),
            "the output templates are missing: types 3, 7, 11, ... move, too.": want
            & (roles != masks.OUTPUT_TEMPLATE),
            "the input templates are missing: types 1, 5, 9, ... move, too.": want
            & (roles != masks.INPUT_TEMPLATE),
            "only the first example is marked: take the types modulo 4.": (types > 0) & (types < 4),
            "the first example's label is frozen, but not those of "
            "the others: labels are 4, 8, 12, ...": ((types > 0) & (types != 4)),
        }
        case = Case(student, updated_steps, {"types": types}, {"types": "P"})
        same(got, want, wrong, "the mask", case=case)
    figure, panel = plt.subplots(figsize=(7, 1.8), layout="constrained")
    coloured(panel, [1.0 if m else 0.35 for m in got], types)
    panel.set(xlabel="position in the context")
    panel.set_yticks([0.35, 1], ["never moves", "moves"])
    plt.close(figure)
    return (
        figure,
        "One bar per token in the colour of its role: tall where your "
        "mask lets it move, short where not.",
    )


@checker("04.4")
def decay_weights(student, generator):
    """The last label weighs 1, each earlier one gamma times the next; its tokens weigh alike."""
    import matplotlib.pyplot as plt

    for shots, tokens in ((5, 1), (4, 2), (2, 3)):
        types = types_of(generator, shots, tokens)
        gamma = float(0.3 + 0.6 * torch.rand(1, generator=generator))
        label = masks.is_label(types)
        forth = masks.example_of(types)
        back = forth.max() - forth  # labels after this one
        tokens_after = label.flip(0).cumsum(0).flip(0) - 1

        def powers(exponent, where=label, base=gamma):
            return torch.where(where, base ** exponent.float(), 0.0)

        want = powers(back)
        wrong = {
            "the decay is the wrong way round: the last label weighs "
            "1, and the farther back, the less.": powers(forth),
            "the decay is the wrong way round and off by one: the last label weighs 1.": powers(
                forth + 1
            ),
            "off by one: the last label, the training example's, weighs 1, not gamma.": powers(
                back + 1
            ),
            "it counts label tokens; count labels: all tokens "
            "of one label have the same weight.": powers(tokens_after),
            "the separators have a weight: type 0 is a multiple of 4, but no label.": powers(
                back, ~masks.is_updated(types)
            ),
            "every token has a weight: only label tokens count, all others get 0.": powers(
                back, types >= 0
            ),
            "every token but the separators has a weight: only label tokens count.": powers(
                back, types > 0
            ),
            "the weights fall in a straight line; each is gamma "
            "times the next one: a power of gamma.": torch.where(
                label, (1 - (1 - gamma) * back).clamp(min=0), 0.0
            ),
            "all labels weigh 1: gamma is not used.": label.float(),
            "the weights are scaled to sum to 1; the last label weighs 1.": want / want.sum(),
            "the exponent counts types instead of labels: divide the difference by 4.": powers(
                types.max() - types
            ),
        }
        got = student(types, gamma)
        case = Case(
            student,
            decay_steps,
            {"types": types, "gamma": gamma},
            {"types": "S"},
            lambda types, gamma: whole_examples(types) and 0 < gamma < 1,
        )
        same(got, want, wrong, "the tensor of weights", case=case)
        library = (
            token_weights(types.masked_fill(~label, IGNORE)[None], types[None], gamma, "sum")[0]
            * tokens
        )
        expect(
            torch.allclose(want, library),
            "the checker disagrees with the library: please report it.",
        )
        if tokens == 2:
            drawn = types, got, gamma
    types, got, gamma = drawn
    figure, panel = plt.subplots(figsize=(7, 2.4), layout="constrained")
    coloured(panel, got, types)
    panel.set(xlabel="position in the row", ylabel="weight", title=f"γ = {gamma:.2f}")
    plt.close(figure)
    return (
        figure,
        "Your weights by position: a staircase of labels that rises to "
        "1 at the right, nothing elsewhere.",
    )

"""Templates: from (text, label) to token ids and their roles, and from K examples to one context."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import MiniCPTError
from .masks import INPUT, INPUT_TEMPLATE, LABEL, OUTPUT_TEMPLATE, SEPARATOR

# ---- templates, on text --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """How an example is written: `input.format(text) + intra + output.format(label) + inter` (paper 3.1)."""

    input: str = "input: {}"
    output: str = "output: {}"
    intra: str = "\n"
    inter: str = "\n"

    def __post_init__(self):
        for name in ("input", "output"):
            if getattr(self, name).count("{}") != 1:
                raise MiniCPTError(
                    f"The {name} template must hold exactly one '{{}}', for the "
                    f"{'text' if name == 'input' else 'label'}; got {getattr(self, name)!r}."
                )

    def pieces(self, text: str, label: str | None = None) -> list[tuple[str, int]]:
        """Cut one example into (string, role) pieces; without a label the example stops where it would begin.

        A space between two pieces goes to the second one, because that is how a byte-level tokenizer sees it: the
        pieces, each tokenised alone, then give the ids of the whole string.
        """
        (before_text, after_text), (before_label, after_label) = (
            t.split("{}") for t in (self.input, self.output)
        )
        pieces = [
            (before_text, INPUT_TEMPLATE),
            (text, INPUT),
            (after_text, INPUT_TEMPLATE),
            (self.intra, SEPARATOR),
            (before_label, OUTPUT_TEMPLATE),
        ]
        if label is not None:
            pieces += [(label, LABEL), (after_label, OUTPUT_TEMPLATE), (self.inter, SEPARATOR)]
        carried, result = "", []
        for piece, role in pieces:
            piece = carried + piece
            stripped = piece.rstrip(" ")
            carried = piece[len(stripped) :]
            if stripped:
                result.append((stripped, role))
        return result

    def label_text(self, label: str) -> str:
        """Return the label with the space that the template puts before it, ready to be tokenised."""
        before = self.intra + self.output.split("{}")[0]
        return " " * (len(before) - len(before.rstrip(" "))) + label


@dataclass(frozen=True)
class Encoded:
    """Token ids and their roles or types, two lists of one length, and how many text tokens were cut off."""

    ids: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    cut: int = 0

    def __post_init__(self):
        if len(self.ids) != len(self.types):
            raise MiniCPTError(
                f"ids and types must have one length, got {len(self.ids)} and {len(self.types)}."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: "Encoded") -> "Encoded":
        return Encoded(self.ids + other.ids, self.types + other.types, self.cut + other.cut)


def tokenize(tokenizer, strings: Sequence[str]) -> list[list[int]]:
    """Tokenise strings without special tokens, in one call."""
    return tokenizer(list(strings), add_special_tokens=False)["input_ids"] if strings else []


def encode(
    tokenizer,
    template: Template,
    examples: Sequence[tuple[str, str | None]],
    max_text_tokens: int | None = None,
) -> list[Encoded]:
    """Encode (text, label) pairs by roles 0-4; label `None` leaves the example open, as for a query.

    Texts longer than `max_text_tokens` tokens are cut at their end, labels and templates never.
    """
    rows = [template.pieces(text, label) for text, label in examples]
    ids = iter(tokenize(tokenizer, [piece for row in rows for piece, _ in row]))
    result = []
    for row in rows:
        encoded = Encoded()
        for (_, role), piece in zip(
            row, ids
        ):  # row first: zip must not eat the next row's first piece
            kept = piece[:max_text_tokens] if role == INPUT else piece
            encoded += Encoded(kept, [role] * len(kept), len(piece) - len(kept))
        result.append(encoded)
    return result


def build_context(examples: Sequence[Encoded], instruction: Sequence[int] = ()) -> Encoded:
    """Join K encoded examples into one context: example i adds 4*i to its roles; separators stay 0.

    `instruction` token ids may stand in front as input-template tokens (our reading of the paper's CPT†).
    """
    context = Encoded(list(instruction), [INPUT_TEMPLATE] * len(instruction))
    for i, example in enumerate(examples):
        context += Encoded(example.ids, [t + 4 * i if t else 0 for t in example.types], example.cut)
    return context


def fit_text_length(
    fixed: int, shots: list[Encoded], queries: list[Encoded], limit: int
) -> int | None:
    """Largest number of tokens a text may keep so that context, longest query and label fit into `limit`.

    None if nothing has to be cut. Raises `MiniCPTError` if templates and labels alone do not fit.
    """
    texts = [[sum(t == INPUT for t in e.types) for e in group] for group in (shots, queries)]
    rest = [[len(e) - n for e, n in zip(group, ns)] for group, ns in zip((shots, queries), texts)]

    def total(cap: int) -> int:
        in_context = sum(r + min(n, cap) for r, n in zip(rest[0], texts[0]))
        return fixed + in_context + max(r + min(n, cap) for r, n in zip(rest[1], texts[1]))

    longest = max(max(ns, default=0) for ns in texts)
    if total(longest) <= limit:
        return None
    low, high = 0, longest  # total(low) fits, total(high) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= limit else (low, middle)
    if low == 0:
        raise MiniCPTError(
            f"The prompt does not fit: templates, labels and prompt tokens take {total(0)} of {limit} tokens and leave "
            "no room for the texts. Use fewer shots, shorter labels or a model with a longer context."
        )
    return low


def collate(
    rows: Sequence[Encoded],
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Pad rows on the right to one length T: ids, attention mask and types (all 0 on padding), each (B, T)."""
    T = max(map(len, rows))
    ids = [r.ids + [0] * (T - len(r)) for r in rows]
    mask = [[1] * len(r) + [0] * (T - len(r)) for r in rows]
    types = [r.types + [SEPARATOR] * (T - len(r)) for r in rows]
    # .long(): rows without any token give an empty tensor, which torch takes for floats
    return tuple(torch.tensor(x).long() for x in (ids, mask, types))

"""Templates and token roles: from (text, label) to token ids, and from K examples to one context.

Every token of an example has a role (PEFT's `cpt_tokens_type_mask`): 0 separator, 1 input template, 2 input,
3 output template, 4 label. Example i of a context adds 4*i, so one integer per token says both *what* the token is
(`type % 4`) and *whose* (`type // 4`). A label is `type > 0 and type % 4 == 0`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .errors import MiniCPTError

SEPARATOR, INPUT_TEMPLATE, INPUT, OUTPUT_TEMPLATE, LABEL = range(5)


# ---- roles, on tensors ---------------------------------------------------------------------------------------------


def is_label(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark the label tokens: `types` (any shape) -> mask of the same shape. Source: PEFT `_cpt_forward`."""
    return (types > 0) & (types % 4 == 0)


def is_input(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark the tokens of the input text itself: `types` -> mask of the same shape."""
    return types % 4 == INPUT


def is_template(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark input- and output-template tokens ("format" tokens): `types` -> mask of the same shape."""
    return (types % 4 == INPUT_TEMPLATE) | (types % 4 == OUTPUT_TEMPLATE)


def is_updated(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark what CPT may change: input and templates, never labels or separators (paper 3.2.2, PEFT's code)."""
    return is_input(types) | is_template(types)


def shift_types(prefix_types: Int[Tensor, "P"], types: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Number a query's types after those of the prefix, in a new tensor (PEFT changes its caller's).

    Raises `MiniCPTError` if the prefix's largest type is no multiple of 4: the query's roles would shift by one and
    PEFT would take output-template tokens for labels (loss NaN or wrong).
    """
    largest = int(prefix_types.max()) if prefix_types.numel() else 0
    if largest % 4:
        raise MiniCPTError(
            f"cpt_tokens_type_mask ends in an unfinished example: its largest type is {largest}, not a multiple of 4, "
            "so the roles of everything after it would shift. Types run 1 (input template), 2 (input), 3 (output "
            "template), 4 (label) per example, +4 for each further one, 0 for separators; give the last example a label."
        )
    return torch.where(types > 0, types + largest, types)


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
        (before_text, after_text), (before_label, after_label) = (t.split("{}") for t in (self.input, self.output))
        pieces = [(before_text, INPUT_TEMPLATE), (text, INPUT), (after_text, INPUT_TEMPLATE),
                  (self.intra, SEPARATOR), (before_label, OUTPUT_TEMPLATE)]  # fmt: skip
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
            raise MiniCPTError(f"ids and types must have one length, got {len(self.ids)} and {len(self.types)}.")

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: "Encoded") -> "Encoded":
        return Encoded(self.ids + other.ids, self.types + other.types, self.cut + other.cut)


def tokenize(tokenizer, strings: Sequence[str]) -> list[list[int]]:
    """Tokenise strings without special tokens, in one call."""
    return tokenizer(list(strings), add_special_tokens=False)["input_ids"] if strings else []


def encode(
    tokenizer, template: Template, examples: Sequence[tuple[str, str | None]], max_text_tokens: int | None = None
) -> list[Encoded]:
    """Encode (text, label) pairs by roles 0-4; label `None` leaves the example open, as for a query.

    Texts longer than `max_text_tokens` tokens are cut at their end, labels and templates never.
    """
    rows = [template.pieces(text, label) for text, label in examples]
    ids = iter(tokenize(tokenizer, [piece for row in rows for piece, _ in row]))
    result = []
    for row in rows:
        encoded = Encoded()
        for (_, role), piece in zip(row, ids):  # row first: zip must not eat the next row's first piece
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


def fit_text_length(fixed: int, shots: list[Encoded], queries: list[Encoded], limit: int) -> int | None:
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


def collate(rows: Sequence[Encoded]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Pad rows on the right to one length T: ids, attention mask and types (all 0 on padding), each (B, T)."""
    T = max(map(len, rows))
    ids = torch.tensor([r.ids + [0] * (T - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (T - len(r)) for r in rows])
    types = torch.tensor([r.types + [SEPARATOR] * (T - len(r)) for r in rows])
    return ids, mask, types

"""Templates: from (text, label) to token ids and their roles, and from K examples to one context.

A prompt is one string. It is tokenised once, the way the tokenizer does by default, and the roles are laid over the
ids afterwards, by the characters that each token stands for. A token may cross the border between two parts: in
"label: good" most tokenizers make one token of the space, which is the template's, and of the word, which is the label.
The rule for such a token:

1. A token that holds a character of a label, other than a space, is the label's.
2. Otherwise it belongs to the part that gives it most characters other than spaces, on a tie to the first of them.
3. A token of spaces alone belongs to the part that gives it most spaces, on a tie to the first of them; but right
   before a label that has no space in its first token it is the label's. For " good" may be one token where " 1" is
   two, and what comes before the answer must be the same for both.

The seam. All queries share one context, so its ids must not depend on the query that follows. They are those that the
context has before a query whose text is "a"; a token that reaches into the query is the query's. Every query is then
tokenised together with the context, and its ids are those from the seam on. Only where a query's text makes the
tokenizer merge characters across the seam is the string cut there and the rest tokenised on its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import MiniCPTError, check_characters
from .masks import INPUT, INPUT_TEMPLATE, LABEL, OUTPUT_TEMPLATE, SEPARATOR

ANY = "a"  # stands for a text or a label where only what is around it matters
Part = tuple[str, int]  # a piece of the string, and its type


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

    def pieces(self, text: str, label: str) -> list[Part]:
        """Cut one example into (string, role) pieces, which joined give the whole example."""
        before_text, after_text = self.input.split("{}")
        before_label, after_label = self.output.split("{}")
        return [
            (before_text, INPUT_TEMPLATE),
            (text, INPUT),
            (after_text, INPUT_TEMPLATE),
            (self.intra, SEPARATOR),
            (before_label, OUTPUT_TEMPLATE),
            (label, LABEL),
            (after_label, OUTPUT_TEMPLATE),
            (self.inter, SEPARATOR),
        ]


@dataclass(frozen=True)
class Encoded:
    """Token ids and their roles or types, two lists of one length."""

    ids: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)

    def __post_init__(self):
        if len(self.ids) != len(self.types):
            raise MiniCPTError(
                f"ids and types must have one length, got {len(self.ids)} and {len(self.types)}."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: "Encoded") -> "Encoded":
        return Encoded(self.ids + other.ids, self.types + other.types)


@dataclass(frozen=True)
class Context(Encoded):
    """What stands before every query: its ids and types, and the string that queries are written behind.

    `text`: the string; `end`: how many of its characters the ids stand for (the rest is the queries');
    `n_instruction`: how many of the first tokens are the instruction's, with BOS before it.
    """

    text: str = ""
    end: int = 0
    n_instruction: int = 0


def tokenize(tokenizer, strings: Sequence[str]) -> list[list[int]]:
    """Tokenise strings without special tokens, in one call."""
    for string in strings:
        check_characters(string)
    return tokenizer(list(strings), add_special_tokens=False)["input_ids"] if strings else []


def leading_ids(tokenizer) -> list[int]:
    """The ids that the tokenizer puts before any text by default: BOS in Llama 3 or Gemma, none in GPT-2 or BLOOM."""
    encoded = tokenizer(ANY, return_special_tokens_mask=True)
    n = encoded["special_tokens_mask"].index(0)
    return encoded["input_ids"][:n]


def _owner(chunk: str, owners: Sequence[int], parts: Sequence[Part]) -> int:
    """Which of the parts that a token's characters come from has the token: the rule at the top of this file."""
    visible = [owner for char, owner in zip(chunk, owners) if not char.isspace()]
    for owner in visible:
        if parts[owner][1] and parts[owner][1] % LABEL == 0:
            return owner
    voters = visible or owners
    return max(voters, key=lambda owner: (voters.count(owner), -owner))


def lay_roles(tokenizer, rows: Sequence[Sequence[Part]], start: int = 0) -> list[tuple]:
    """Tokenise the parts of each row as one string; of the tokens that begin at character `start` or later give
    the ids, the types, the (start, end) of each, and whether another token reaches across `start`.
    """
    if not rows:
        return []
    if not tokenizer.is_fast:
        raise MiniCPTError(
            f"{type(tokenizer).__name__} does not say which characters its tokens stand for, and the roles are laid "
            "over them by that. Load the fast version of the tokenizer (a model folder with a tokenizer.json)."
        )
    strings = ["".join(string for string, _ in parts) for parts in rows]
    for string in strings:
        check_characters(string)
    tokens = tokenizer(strings, add_special_tokens=False, return_offsets_mapping=True)
    result = []
    for string, parts, ids, offsets in zip(
        strings, rows, tokens["input_ids"], tokens["offset_mapping"]
    ):
        owner_of = []  # of each character, the number of its part
        for number, (part, _) in enumerate(parts):
            owner_of += [number] * len(part)
        first = next((i for i, (begin, _) in enumerate(offsets) if begin >= start), len(ids))
        types = []
        for begin, end in offsets[first:]:
            owners = owner_of[begin : max(end, begin + 1)] or owner_of[-1:]
            same = owners[0] == owners[-1]
            owner = owners[0] if same else _owner(string[begin:end], owners, parts)
            types.append(parts[owner][1])
        for i in range(len(types) - 1, 0, -1):
            starts_with_letter = string[offsets[first + i][0]] != " "
            is_label = types[i] > 0 and types[i] % LABEL == 0
            if (
                is_label
                and starts_with_letter
                and set(string[slice(*offsets[first + i - 1])]) == {" "}
            ):
                types[i - 1] = types[i]
        crossing = first > 0 and offsets[first - 1][1] > start
        result.append((ids[first:], types, offsets[first:], crossing))
    return result


def encode(
    tokenizer,
    template: Template,
    examples: Sequence[tuple[str, str | None]],
    after: Context | None = None,
    next_label: str = ANY,
) -> list[Encoded]:
    """Encode (text, label) pairs by roles 0-4, as they are written behind the context `after`, or at the beginning.

    Label `None` leaves the example open, as for a query: it stops before the first token of the label, where the label
    is `next_label` (for most templates any word will do; where a tokenizer merges the label with what stands before it,
    it matters). A row may be empty then, if the template puts nothing before the label but spaces.
    """
    before = after or Context()
    rows = []
    for text, label in examples:
        word = next_label if label is None else label
        rows.append([(before.text, SEPARATOR), *template.pieces(text, word)])
    result = []
    for row, (_, label), laid in zip(rows, examples, lay_roles(tokenizer, rows, before.end)):
        ids, types, _, merged_across_the_seam = laid
        if merged_across_the_seam:
            rest = (before.text[before.end :], SEPARATOR)
            ((ids, types, _, _),) = lay_roles(tokenizer, [[rest, *row[1:]]])
        end = types.index(LABEL) if label is None else len(ids)
        result.append(Encoded(ids[:end], types[:end]))
    return result


def build_context(
    tokenizer,
    template: Template,
    examples: Sequence[tuple[str, str]],
    instruction: str = "",
    leading: Sequence[int] = (),
) -> Context:
    """Write K examples one after the other and encode them: example i adds 4*i to its roles; separators stay 0.

    An `instruction` may stand in front as an input template (our reading of the paper's CPT†), and before everything
    the ids that the tokenizer puts there by default, BOS, as `leading`: of type 0, so that CPT leaves them as they are.
    """
    parts = [(instruction + template.inter, INPUT_TEMPLATE)] if instruction else []
    for i, (text, label) in enumerate(examples):
        for string, role in template.pieces(text, label):
            parts.append((string, role + 4 * i if role else SEPARATOR))
    if not parts:
        return Context(list(leading), [SEPARATOR] * len(leading))
    text = "".join(string for string, _ in parts)
    query = template.pieces(ANY, ANY)
    ((ids, types, offsets, _),) = lay_roles(tokenizer, [[*parts, *query]])
    n = sum(end <= len(text) for _, end in offsets)
    end = max((end for _, end in offsets[:n]), default=0)
    n_instruction = 0
    if instruction:
        n_instruction = len(leading) + sum(begin < len(parts[0][0]) for begin, _ in offsets[:n])
    context = Encoded([*leading, *ids[:n]], [SEPARATOR] * len(leading) + types[:n])
    if examples:
        # queries are tokenised behind the last example alone where that gives the same tokens, which is quicker
        last = template.pieces(*examples[-1])
        skipped = len(text) - sum(len(string) for string, _ in last)
        ((short, short_types, _, _),) = lay_roles(tokenizer, [[*last, *query]])
        m = len(short) - short_types.index(LABEL)
        if ids[-m:] == short[-m:]:
            text = text[skipped:]
            end -= skipped
    return Context(context.ids, context.types, text, end, n_instruction)


def label_ids(tokenizer, template: Template, words: Sequence[str]) -> list[list[int]]:
    """The ids of each label word where the template puts it: the same in a context, a training row, as a candidate.

    Raises `MiniCPTError` if what stands before the label has other tokens before one word than before another.
    """
    rows = encode(tokenizer, template, [(ANY, word) for word in words])
    first = rows[0].types.index(LABEL)
    for word, row in zip(words, rows):
        if row.ids[: row.types.index(LABEL)] != rows[0].ids[:first]:
            raise MiniCPTError(
                f"Before {word!r} the output template {template.output!r} has other tokens than before "
                f"{words[0]!r}: the tokenizer merges it with the label. Put a space or a line end before the {{}}."
            )
    return [[i for i, t in zip(row.ids, row.types) if t == LABEL] for row in rows]


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

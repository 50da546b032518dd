"""All that is done before anything is trained: texts become token ids, what is too long is cut, memory is planned.

This is the only module of the wing that calls a tokenizer. `Prompt` knows how one base model reads one task with one
method; it stays with the fitted method, because queries are read as the training rows were. A `Job` is what training
starts from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.loss import IGNORE
from ..core.masks import INPUT, LABEL, SEPARATOR
from ..core.templates import (
    ANY,
    Context,
    Encoded,
    Template,
    build_context,
    collate,
    encode,
    label_ids,
    lay_roles,
    tokenize,
)
from ..core.train import Recipe
from ..data import Row, Split
from ..engine.base_models import BaseModel
from ..engine.memory import rows_that_fit
from ..engine.prefix import why_not_shared
from ..engine.scores import LABEL_SCORES, check_candidates
from ..errors import MiniCPTError, unknown, warn
from .registry import METHODS

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # ids, mask, types, labels, each (B, T)
Pair = tuple[str, str | None]  # text, label word


@dataclass(frozen=True)
class Prompt:
    """From text to token ids, for one base model, one task and one method.

    - `words`: the C label words; `candidates`: the ids of each
    - `limit`: tokens of the longest sequence, label included
    - `before`: tokens that stand before a query (before the context, while there is none yet)
    - `first`: ids that every row begins with: BOS, for the methods that put nothing before a row
    - `instruction`: ids that the soft prompt of a † method starts from
    - `text_tokens`: tokens that the caller wants a text to have at most; None for no such cap
    - `context`: what rows are written behind
    - `longest_text`: tokens that a text may keep so that the prompt fits; None where none had to be cut
    """

    tokenizer: Any
    template: Template
    words: list[str]
    limit: int
    candidates: list[list[int]]
    before: int
    first: Sequence[int] = ()
    instruction: Sequence[int] = ()
    text_tokens: int | None = None
    context: Context = Context()
    longest_text: int | None = None

    @property
    def taken(self) -> int:
        """Tokens of a sequence that are not the row's: what stands before, and the longest label."""
        return self.before + max(map(len, self.candidates))

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """Encode (text, label word) pairs, nothing cut; without a word the row ends where its label would begin."""
        rows = encode(self.tokenizer, self.template, pairs, self.context, self.words[0])
        self.require_labels(rows, pairs)
        first = Encoded(list(self.first), [SEPARATOR] * len(self.first))
        return [first + row for row in rows] if self.first else rows

    def require_labels(self, rows: Sequence[Encoded], pairs: Sequence[Pair]) -> None:
        """Raise `MiniCPTError` if a label of these pairs has other ids than as an answer."""
        ids_of = dict(zip(self.words, self.candidates))
        require_labels(rows, [word for _, word in pairs if word is not None], ids_of)

    def cut(self, pairs: Sequence[Pair], longest: int | None) -> list[Pair]:
        """Shorten texts of more than `longest` tokens at their end; None keeps them all as they are."""
        if longest is None:
            return list(pairs)
        return cut_texts(self.tokenizer, self.template, pairs, longest)

    def encode_queries(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode texts as queries; those for which the model has no room are cut at their end, with a warning."""
        given = self.cut([(text, None) for text in texts], self.text_tokens)
        pairs = self.cut(given, self.longest_text)
        rows = self.encode(pairs)
        # each row by itself: what is left of a text must not depend on its company
        for i, row in enumerate(rows):
            longest = fit_text_length(self.taken, [], [row], self.limit)
            while self.taken + len(rows[i]) > self.limit:
                pairs[i : i + 1] = self.cut(pairs[i : i + 1], longest)
                rows[i : i + 1] = self.encode(pairs[i : i + 1])
                longest -= 1
        n_cut = sum(a != b for a, b in zip(given, pairs))
        if n_cut:
            where = f"so that the prompt fits into {self.limit} tokens"
            warn(f"{n_cut} of {len(rows)} texts were cut at their end, {where}.")
        return rows


def require_labels(
    rows: Sequence[Encoded], words: Sequence[str], ids: dict[str, list[int]]
) -> None:
    """Raise `MiniCPTError` if a row's (or a context's) labels have other ids than these words have as candidates."""
    labels = [i for row in rows for i, t in zip(row.ids, row.types) if t and t % LABEL == 0]
    if labels != [i for word in words for i in ids[word]]:
        raise MiniCPTError(
            "The tokenizer merges a label with the text beside it, and it has other tokens than as an answer. Put a "
            "space or a line end into the template on both sides of the label, or leave the row out."
        )


def cut_texts(tokenizer, template: Template, examples: Sequence[Pair], most: int) -> list[Pair]:
    """Shorten the texts of more than `most` tokens at their end; labels and templates are never cut."""
    result = list(examples)
    pending = list(range(len(result)))
    while pending:  # again, since a shortened text may have other tokens at its end
        rows = [template.pieces(result[i][0], result[i][1] or ANY) for i in pending]
        too_long = []
        for i, row, (_, types, offsets, _) in zip(pending, rows, lay_roles(tokenizer, rows)):
            ends = [end for (_, end), role in zip(offsets, types) if role == INPUT]
            if len(ends) > most:
                text, label = result[i]
                kept = ends[most - 1] - len(row[0][0])
                result[i] = (text[: min(kept, len(text) - 1)], label)
                too_long.append(i)
        pending = too_long
    return result


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


def until_label(row: Encoded) -> Encoded:
    """A training row ends with its label: what follows it in the context has no say in the loss."""
    end = len(row) - row.types[::-1].index(LABEL)
    return Encoded(row.ids[:end], row.types[:end])


def read_task(
    method: str,
    base: BaseModel,
    split: Split,
    hp: dict,
    label_score: str,
    max_length: int | None,
    text_tokens: int | None = None,
) -> Prompt:
    """Say how the base model reads the task's labels and instruction; no example is looked at yet.

    Raises `MiniCPTError` for labels that the label score could not tell apart, and if an instruction is missing.
    """
    spec, tokenizer, template = METHODS[method], base.tokenizer, split.template
    if text_tokens is not None and text_tokens < 1:
        raise MiniCPTError(f"text_tokens must be at least 1, or None; got {text_tokens}.")
    if label_score not in LABEL_SCORES:
        raise unknown("label score", label_score, LABEL_SCORES)
    words = [split.verbalizers[c] for c in split.classes]
    candidates = label_ids(tokenizer, template, words)
    check_candidates(dict(zip(words, candidates)), label_score)
    lengths = {len(ids) for ids in candidates}
    if label_score == "mean" and len(lengths) > 1:
        warn(
            f"The label words of {split.task} have {min(lengths)} to {max(lengths)} tokens, and the mean over "
            "a label's tokens favours the long ones, whose later tokens are easy once the first is given. "
            "Use label_score='sum', the label's probability."
        )
    if spec.instruction and not split.instruction:
        raise MiniCPTError(
            f"{method} needs an instruction, a sentence that says what to do; give the task (in its file) or the "
            'FewShotClassifier an instruction="...".'
        )
    instruction = []
    if spec.instruction and spec.trains == "prompt":
        (instruction,) = tokenize(tokenizer, [split.instruction + template.inter])
    soft = len(instruction)
    if not soft and spec.trains in ("prompt", "iapt"):
        soft = hp["tokens"]
    in_rows = not spec.context and spec.trains != "prompt"  # nothing else could hold BOS
    limit = int(min(base.max_length, max_length or base.max_length))
    before = soft if in_rows else soft + len(base.leading)
    first = base.leading if in_rows else ()
    return Prompt(
        tokenizer, template, words, limit, candidates, before, first, instruction, text_tokens
    )


@dataclass(frozen=True)
class Job:
    """What there is to train on: a context (empty for some), training rows up to their labels, hyper-parameters.

    `recipe` says how long and how fast; `instruction` holds the ids of the † methods' instruction; `generator` draws
    the order of the rows.
    """

    base: BaseModel
    context: Context
    rows: list[Encoded]
    hp: dict
    recipe: Recipe
    instruction: Sequence[int]
    generator: torch.Generator

    def batch(self, chosen: list[int]) -> Batch:
        """The chosen rows as ids, mask, types and labels (-100 but on label tokens), each (B, T) on the CPU."""
        ids, mask, types = collate([self.rows[i] for i in chosen])
        return ids, mask, types, ids.masked_fill(types != LABEL, IGNORE)

    def embedded_context(self) -> Tensor | None:
        """The context's embeddings, (1, P, D), or None if it is empty."""
        return self.base.embed(self.context.ids) if len(self.context) else None


def prepare(
    method: str,
    base: BaseModel,
    split: Split,
    hp: dict,
    label_score: str,
    max_length: int | None,
    extra: Sequence[Row],
    rows_at_once: int,
    text_tokens: int | None = None,
) -> tuple[Prompt, Job]:
    """Read the split's rows and the `extra` ones, cut them to fit, and plan memory; parameters as of `fit`.

    The recipe's `at_once` says how many rows may go through the model together, for methods that train nothing too.
    """
    spec = METHODS[method]
    if not split.shots and method != "zero":
        raise MiniCPTError(
            f"{method} needs at least one shot; without any, only the method 'zero' works."
        )
    plain = read_task(method, base, split, hp, label_score, max_length, text_tokens)
    given = [(text, None) for text, _ in split.queries]
    given += [(text, split.verbalizers[c]) for text, c in [*split.shots, *extra]]
    given = plain.cut(given, text_tokens)
    n, K = len(split.queries), len(split.shots) if spec.context else 0
    instruction = split.instruction if spec.instruction and spec.trains == "context" else ""

    def read(longest: int | None) -> tuple[Prompt, list[Encoded]]:
        """Cut the texts, write the context, and the rows behind it."""
        pairs = plain.cut(given, longest)
        shots = pairs[n : n + K]
        leading = () if plain.first else base.leading
        context = build_context(base.tokenizer, split.template, shots, instruction, leading)
        plain.require_labels([context], shots)
        before = plain.before + len(context) - len(leading)
        prompt = replace(plain, context=context, before=before, longest_text=longest)
        # zero-shot with no query yet: an empty one
        return prompt, prompt.encode(pairs or [("", None)])

    prompt, rows = read(None)
    if prompt.taken + max(map(len, rows)) > prompt.limit:
        alone = plain.encode(given)
        before = prompt.before - sum(map(len, alone[n : n + K]))
        fixed = before + prompt.taken - prompt.before
        longest = fit_text_length(fixed, alone[n : n + K], alone, prompt.limit) or len(alone)
        prompt, rows = read(longest)
        # a context may have a token more than its parts
        while prompt.taken + max(map(len, rows)) > prompt.limit:
            longest -= 1
            prompt, rows = read(longest)
        n_cut = sum(a != b for a, b in zip(given, plain.cut(given, longest)))
        warn(
            f"{split.task}, {method}, {len(split.shots)} shots: {n_cut} of {len(rows)} texts were cut to "
            f"{longest} tokens, so that the prompt fits into {prompt.limit}; labels are never cut."
        )
    trained = [until_label(row) for row in rows[n:]] if spec.trains else []
    longest_row = max(map(len, rows)) + prompt.taken - prompt.before
    recipe = Recipe(lr=0.0, epochs=0)
    if spec.trains:
        recipe = Recipe(hp["lr"], hp["epochs"], hp["batch_size"])
    batch = min(recipe.batch_size or len(trained), len(trained))  # 0 where nothing is trained
    # rows that do not all see the same prefix cannot share it
    shared = not (hp.get("leave_one_out") or hp.get("token_dropout") or why_not_shared(base.model))
    logits = (1 + K) * max(map(len, prompt.candidates))  # at a row's label, and the context's
    if spec.trains in ("lora", "iapt"):  # at all of a row's tokens
        logits = longest_row
    sizes = prompt.before, longest_row, batch, rows_at_once, shared, logits
    recipe = replace(recipe, at_once=rows_that_fit(base.model, base.device, *sizes))
    order = torch.Generator().manual_seed(split.seed)
    return prompt, Job(base, prompt.context, trained, hp, recipe, prompt.instruction, order)

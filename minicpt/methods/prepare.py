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
from ..core.masks import INPUT, LABEL
from ..core.templates import (
    Encoded,
    Template,
    build_context,
    collate,
    encode,
    fit_text_length,
    tokenize,
)
from ..core.train import Recipe
from ..data import Row, Split
from ..engine.base_models import BaseModel
from ..engine.memory import rows_that_fit
from ..engine.prefix import obstacle
from ..engine.scores import LABEL_SCORES, check_candidates
from ..errors import MiniCPTError, unknown, warn
from .registry import METHODS

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # ids, mask, types, labels, each (B, T)


@dataclass(frozen=True)
class Prompt:
    """From text to token ids, for one base model, one task and one method.

    - `limit`: tokens of the longest sequence, label included
    - `candidates`: C lists, the ids of each class's label word as it follows a query
    - `before`: tokens that stand before a query (before the context, while there is none yet)
    - `instruction`: ids of the written instruction of the † methods
    - `longest_text`: tokens that a text may keep at most; None where none had to be cut
    """

    tokenizer: Any
    template: Template
    limit: int
    candidates: list[list[int]]
    before: int
    instruction: Sequence[int] = ()
    longest_text: int | None = None

    @property
    def taken(self) -> int:
        """Tokens of a sequence that are not the examples': what stands before, and the longest label."""
        return self.before + max(map(len, self.candidates))

    def encode(self, pairs: Sequence[tuple[str, str | None]]) -> list[Encoded]:
        """Encode (text, label word) pairs, nothing cut; without a word the example ends where its label would begin."""
        return encode(self.tokenizer, self.template, pairs)

    def encode_queries(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode texts as queries; those for which the model has no room are cut at their end, with a warning."""
        rows = []
        for row in self.encode([(text, None) for text in texts]):
            row = cut(row, self.longest_text)
            # each row by itself: what is left of a text must not depend on its company
            rows.append(cut(row, fit_text_length(self.taken, [], [row], self.limit)))
        n_cut = sum(row.cut > 0 for row in rows)
        if n_cut:
            warn(
                f"{n_cut} of {len(rows)} texts were cut at their end, so that the prompt fits into {self.limit} tokens."
            )
        return rows


def cut(row: Encoded, longest: int | None) -> Encoded:
    """Keep the first `longest` tokens of a row's text, and all of its templates and label; None keeps everything."""
    n = row.types.count(INPUT)
    if longest is None or n <= longest:
        return row
    start = row.types.index(INPUT)
    kept, rest = slice(start + longest), slice(start + n, None)
    return Encoded(
        row.ids[kept] + row.ids[rest],
        row.types[kept] + row.types[rest],
        row.cut + n - longest,
    )


def until_label(row: Encoded) -> Encoded:
    """A training row ends with its label: what follows it in the context has no say in the loss."""
    end = len(row) - row.types[::-1].index(LABEL)
    return Encoded(row.ids[:end], row.types[:end], row.cut)


def read_task(
    method: str,
    base: BaseModel,
    split: Split,
    hp: dict,
    label_score: str,
    max_length: int | None,
) -> Prompt:
    """Say how the base model reads the task's labels and instruction; no example is looked at yet.

    Raises `MiniCPTError` for labels that the label score could not tell apart, and if an instruction is missing.
    """
    spec, tokenizer, template = METHODS[method], base.tokenizer, split.template
    if label_score not in LABEL_SCORES:
        raise unknown("label score", label_score, LABEL_SCORES)
    words = [split.verbalizers[c] for c in split.classes]
    candidates = tokenize(tokenizer, [template.label_text(word) for word in words])
    scored = [ids[:1] for ids in candidates] if label_score == "first" else candidates
    check_candidates(dict(zip(words, scored)))
    if spec.instruction and not split.instruction:
        raise MiniCPTError(
            f"{method} needs an instruction, a sentence that says what to do; give the task (in its file) or the "
            'FewShotClassifier an instruction="...".'
        )
    instruction = []
    if spec.instruction:
        (instruction,) = tokenize(tokenizer, [split.instruction + template.inter])
    before = len(instruction)
    if not before and spec.trains in ("prompt", "iapt"):
        before = hp["tokens"]
    limit = int(min(base.max_length, max_length or base.max_length))
    return Prompt(tokenizer, template, limit, candidates, before, instruction)


@dataclass(frozen=True)
class Job:
    """What there is to train on: a context (empty for some), training rows up to their labels, hyper-parameters.

    `recipe` says how long and how fast; `instruction` holds the ids of the † methods' instruction; `generator` draws
    the order of the rows.
    """

    base: BaseModel
    context: Encoded
    rows: list[Encoded]
    hp: dict
    recipe: Recipe
    instruction: Sequence[int]
    generator: torch.Generator

    def batch(self, chosen: list[int]) -> Batch:
        """The chosen rows as ids, mask, types and labels (-100 but on label tokens), each (B, T)."""
        rows = [self.rows[i] for i in chosen]
        ids, mask, types = (tensor.to(self.base.device) for tensor in collate(rows))
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
) -> tuple[Prompt, Job]:
    """Read the split's rows and the `extra` ones, cut them to fit, and plan memory; parameters as of `fit`.

    The recipe's `at_once` says how many rows may go through the model together, for methods that train nothing too.
    """
    spec = METHODS[method]
    if not split.shots and method != "zero":
        raise MiniCPTError(
            f"{method} needs at least one shot; without any, only the method 'zero' works."
        )
    prompt = read_task(method, base, split, hp, label_score, max_length)
    pairs = [(text, None) for text, _ in split.queries]
    pairs += [(text, split.verbalizers[c]) for text, c in [*split.shots, *extra]]
    rows = prompt.encode(pairs or [("", None)])  # zero-shot with no query yet: an empty one
    n, K = len(split.queries), len(split.shots) if spec.context else 0

    longest_text = fit_text_length(prompt.taken, rows[n : n + K], rows, prompt.limit)
    rows = [cut(row, longest_text) for row in rows]
    if longest_text is not None:
        n_cut = sum(row.cut > 0 for row in rows)
        warn(
            f"{split.task}, {method}, {len(split.shots)} shots: {n_cut} of {len(rows)} texts were cut to "
            f"{longest_text} tokens, so that the prompt fits into {prompt.limit}; labels are never cut."
        )
    examples = rows[n : n + K]
    context = build_context(examples, prompt.instruction if spec.trains == "context" else [])
    trained = [until_label(row) for row in rows[n:]] if spec.trains else []
    prompt = replace(
        prompt, before=prompt.before + sum(map(len, examples)), longest_text=longest_text
    )

    longest_row = max(map(len, rows)) + prompt.taken - prompt.before
    recipe = Recipe(lr=0.0, epochs=0)
    if spec.trains:
        recipe = Recipe(hp["lr"], hp["epochs"], hp["batch_size"])
    batch = min(recipe.batch_size or len(trained), len(trained))  # 0 where nothing is trained
    # rows that do not all see the same prefix cannot share it
    shared = not (hp.get("leave_one_out") or hp.get("token_dropout") or obstacle(base.model))
    at_once = rows_that_fit(
        base.model, base.device, prompt.before, longest_row, batch, rows_at_once, shared
    )
    generator = torch.Generator().manual_seed(split.seed)
    recipe = replace(recipe, at_once=at_once)
    return prompt, Job(base, context, trained, hp, recipe, prompt.instruction, generator)

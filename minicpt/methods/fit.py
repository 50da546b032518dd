"""Every method behind one `fit(method, base, split) -> Predictor`: zero-shot, ICL, PT, IPT, LoRA, CPT and relatives.

All of them end in the same thing: a model, and a prompt that stands before every query. † ("_instr") puts a written
instruction to use; how the paper does that is not known, so this is our reading: PT† and IPT† start their soft prompt
from the instruction's tokens, CPT† puts the instruction before the context as input-template tokens.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.templates import Encoded
from ..data import Row, Split
from ..engine.base_models import BaseModel
from ..engine.memory import ROWS
from ..engine.prefix import Prefix
from ..engine.scores import CONTENT_FREE, calibrate, label_scores
from ..errors import MiniCPTError, whole_number
from .inputs import read_texts
from .prepare import Prompt, prepare
from .registry import METHODS, hyperparameters, warn_of_unread
from .trainers import Fitted, train_cache, train_context, train_iapt, train_lora, train_prompt

# torch's random state is one for all threads, and so is what transformers sets while it loads a model
ONE_AT_A_TIME = threading.RLock()
TRAINERS = {
    "prompt": train_prompt,
    "lora": train_lora,
    "context": train_context,
    "cache": train_cache,
    "iapt": train_iapt,
}


@dataclass(frozen=True)
class Predictor:
    """A fitted method: scores texts by label, from any number of threads, and leaves the base model as it was.

    `prefix` stands before every query: embeddings (1, P, D), a prefix that has been run (CT-KV), or nothing; `history`
    holds the losses of the training steps.
    """

    model: Any
    prefix: Tensor | Prefix | None
    prompt: Prompt
    classes: list[str]
    label_score: str
    history: list[float]
    rows_at_once: int = ROWS

    @property
    def candidates(self) -> list[list[int]]:
        """Token ids of each class's label word."""
        return self.prompt.candidates

    @property
    def prefix_length(self) -> int:
        """Tokens that stand before every query."""
        return self.prompt.before

    def encode_queries(self, texts: Sequence[str]) -> list[Encoded]:
        """Token ids and roles of the texts as queries; texts that are too long are cut, with a warning."""
        return self.prompt.encode_queries(texts)

    def scores(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-scores of the texts, (N, C) raw and (N, C) calibrated, from one pass."""
        texts = read_texts(texts)
        queries = self.encode_queries([*texts, *CONTENT_FREE])
        scores = label_scores(
            self.model, self.prefix, queries, self.candidates, self.label_score, self.rows_at_once
        )
        raw, content_free = scores[: len(texts)], scores[len(texts) :]
        return raw, calibrate(raw, content_free)

    def close(self) -> None:
        """Do nothing: LoRA has modules of its own, so there is nothing to undo. Older programs call it."""

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The class of each text."""
        return [self.classes[i] for i in self.scores(texts)[0].argmax(-1).tolist()]


def fit(
    method: str,
    base: BaseModel,
    split: Split,
    hp: dict | None = None,
    label_score: str = "sum",
    max_length: int | None = None,
    extra: Sequence[Row] = (),
    rows_at_once: int = ROWS,
    text_tokens: int | None = None,
) -> Predictor:
    """Fit a method on the split's shots.

    `hp` overrides the chosen hyper-parameters; `max_length` caps prompts below the model's own limit; `extra` rows are
    trained on as the shots are, but stand in no context; `rows_at_once` caps what goes through the model together, and
    is lowered where the estimate of memory says so: the numbers stay the same. Texts are cut where the prompt would not
    fit with the longest of the split's queries, with a warning; `text_tokens` cuts each to that many from the start.
    Seeded by the split; the global random state is left alone. Threads that fit at once train one after the other, for
    torch has one random state for all of them.
    """
    values = hyperparameters(method, base.name, hp)
    warn_of_unread(method, hp or {})
    if METHODS[method].trains and base.model.dtype == torch.float16:
        raise MiniCPTError(
            f"{method} is not trained in float16, where small gradients become zero without a word. Load the model in "
            "bfloat16 or float32 (--dtype); zero-shot and ICL run in float16."
        )
    split = replace(split, seed=whole_number("seed", split.seed))
    if max_length is not None:
        max_length = whole_number("max_length", max_length, 1)
    limits = rows_at_once, text_tokens
    prompt, job = prepare(method, base, split, values, label_score, max_length, extra, *limits)
    with ONE_AT_A_TIME, torch.random.fork_rng():
        torch.manual_seed(split.seed)
        trainer = TRAINERS.get(METHODS[method].trains)
        fitted = trainer(job) if trainer else Fitted(base.model, job.embedded_context())
    return Predictor(
        fitted.model,
        fitted.prefix,
        prompt,
        split.classes,
        label_score,
        fitted.history,
        job.recipe.at_once,
    )

"""Every method behind one `fit(method, base, split) -> Predictor`: zero-shot, ICL, PT, IPT, LoRA, CPT and relatives.

All of them end in the same thing: a model, and a prompt that stands before every query. † ("_instr") puts a written
instruction to use; how the paper does that is not known, so this is our reading: PT† and IPT† start their soft prompt
from the instruction's tokens, CPT† puts the instruction before the context as input-template tokens.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.templates import Encoded, build_context, encode, fit_text_length, tokenize
from ..core.train import Recipe
from ..data import Row, Split
from ..engine.base_models import BaseModel
from ..engine.memory import ROWS, rows_that_fit
from ..engine.prefix import Prefix, tokens_of, why_not_shared
from ..engine.scores import CONTENT_FREE, calibrate, check_candidates, label_scores
from ..errors import MiniCPTError
from .registry import METHODS, hyperparameters
from .trainers import TRAINERS, until_label


@dataclass
class Predictor:
    """A fitted method: scores texts by label. Call `close()` when done: LoRA then leaves the base model as it was."""

    model: object
    prefix: Tensor | Prefix | None  # embeddings (1, P, D), or a prefix that has been run (CT-KV)
    candidates: list[list[int]]
    classes: list[str]
    encode_queries: Callable[[Sequence[str]], list[Encoded]]
    label_score: str = "mean"
    history: list[float] = field(default_factory=list)
    close: Callable[[], None] = lambda: None
    rows_at_once: int = ROWS

    @property
    def prefix_length(self) -> int:
        """Tokens that stand before every query."""
        return getattr(self.model, "num_virtual_tokens", 0) + (
            0 if self.prefix is None else tokens_of(self.prefix)
        )

    def scores(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-scores of the texts, (N, C) raw and (N, C) calibrated, from one pass."""
        queries = self.encode_queries([*texts, *CONTENT_FREE])
        scores = label_scores(
            self.model, self.prefix, queries, self.candidates, self.label_score, self.rows_at_once
        )
        raw, content_free = scores[: len(texts)], scores[len(texts) :]
        return raw, calibrate(raw, content_free)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The class of each text."""
        return [self.classes[i] for i in self.scores(texts)[0].argmax(-1).tolist()]


def fit(
    method: str,
    base: BaseModel,
    split: Split,
    hp: dict | None = None,
    label_score: str = "mean",
    max_length: int | None = None,
    extra: Sequence[Row] = (),
    rows_at_once: int = ROWS,
) -> Predictor:
    """Fit a method on the split's shots.

    `hp` overrides the chosen hyper-parameters; `max_length` caps prompts below the model's own limit; `extra` rows are
    trained on as the shots are, but stand in no context; `rows_at_once` caps what goes through the model together, and
    is lowered where the estimate of memory says so: the numbers stay the same. Texts are cut where the prompt would not
    fit with the longest of the split's queries, with a warning.
    Seeded by the split; the global random state is left alone.
    """
    hp = hyperparameters(method, base.name, hp)
    spec = METHODS[method]
    if not split.shots and method != "zero":
        raise MiniCPTError(
            f"{method} needs at least one shot; without any, only the method 'zero' works."
        )
    tokenizer, template = base.tokenizer, split.template
    words = [split.verbalizers[c] for c in split.classes]
    candidates = tokenize(tokenizer, [template.label_text(w) for w in words])
    check_candidates(dict(zip(words, candidates)))

    instruction = (
        tokenize(tokenizer, [split.instruction + template.inter])[0] if spec.instruction else []
    )
    if spec.instruction and not split.instruction:
        raise MiniCPTError(
            f'{method} needs an instruction; add "instruction" to the task {split.task!r}.'
        )
    labelled, further = (
        [(text, split.verbalizers[c]) for text, c in rows] for rows in (split.shots, extra)
    )
    n_prompt = len(instruction) or (hp["tokens"] if spec.trains in ("prompt", "iapt") else 0)
    limit = int(min(base.max_length, max_length or base.max_length))
    rows = [(text, None) for text, _ in split.queries] + labelled + further
    sequences = encode(tokenizer, template, rows)
    fixed = n_prompt + max(map(len, candidates))
    cap = fit_text_length(
        fixed, encode(tokenizer, template, labelled) if spec.context else [], sequences, limit
    )
    shots, others = (
        encode(tokenizer, template, labelled, cap),
        encode(tokenizer, template, further, cap),
    )
    if cap is not None:
        sequences = encode(tokenizer, template, rows, cap)
        warnings.warn(
            f"{split.task}, {method}, {len(shots)} shots: {sum(e.cut > 0 for e in sequences)} of {len(rows)} texts were "
            f"cut to {cap} tokens, so that the prompt fits into {limit}; labels are never cut.",
            stacklevel=2,
        )
    context = build_context(
        shots if spec.context else [], instruction if spec.trains == "context" else []
    )
    trained = [until_label(row) for row in shots + others] if spec.trains else []
    in_prefix = len(context) + n_prompt * (spec.trains == "prompt")
    longest = max(map(len, sequences)) + max(map(len, candidates))
    batch = min(hp["batch_size"] or len(trained), len(trained)) if trained else 0
    shared = not (hp.get("leave_one_out") or hp.get("token_dropout") or why_not_shared(base.model))
    rows_at_once = rows_that_fit(
        base.model, base.device, in_prefix, longest, batch, rows_at_once, shared
    )
    predictor = Predictor(
        base.model,
        base.embed(context.ids) if len(context) else None,
        candidates,
        split.classes,
        lambda texts: encode(tokenizer, template, [(t, None) for t in texts], cap),
        label_score,
        rows_at_once=rows_at_once,
    )
    if spec.trains is None:
        return predictor
    with torch.random.fork_rng():
        torch.manual_seed(split.seed)
        recipe = Recipe(hp["lr"], hp["epochs"], hp["batch_size"], at_once=rows_at_once)
        generator = torch.Generator().manual_seed(split.seed)  # of the rows' order
        TRAINERS[spec.trains](predictor, base, context, trained, hp, recipe, instruction, generator)
    return predictor

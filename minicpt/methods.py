"""Every method behind one `fit(method, base, split) -> Predictor`: zero-shot, ICL, PT, IPT, LoRA, CPT and variants.

All of them end in the same thing: a model, and embeddings that stand before every query. † ("_instr") puts a written
instruction to use; how the paper does that is not known, so this is our reading: PT† and IPT† start their soft prompt
from the instruction's tokens, CPT† puts the instruction before the context as input-template tokens.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .base_models import BaseModel
from .data import ASSETS, Row, Split
from .errors import MiniCPTError, unknown
from .evaluate import CONTENT_FREE, calibrate, check_candidates, label_scores
from .loss import IGNORE, label_loss
from .masks import INPUT, LABEL, Encoded, build_context, collate, encode, tokenize
from .memory import ROWS, rows_that_fit
from .train import Recipe, train


@dataclass(frozen=True)
class Method:
    """What a method is made of: `trains` nothing, a soft "prompt", "lora" weights, or the "context" (CPT)."""

    title: str
    trains: str | None
    context: bool
    instruction: bool = False


METHODS = {
    "zero": Method("zero-shot", None, False),
    "icl": Method("ICL", None, True),
    "pt": Method("PT", "prompt", False),
    "ipt": Method("IPT", "prompt", True),
    "lora": Method("LoRA", "lora", False),
    "cpt": Method("CPT", "context", True),
    "pt_instr": Method("PT†", "prompt", False, True),
    "ipt_instr": Method("IPT†", "prompt", True, True),
    "cpt_instr": Method("CPT†", "context", True, True),
    # CPT again, with other values in hyperparameters.json
    "cpt_paper_eps": Method("CPT (paper's ε)", "context", True),
    "cpt_train_label": Method("CPT (training label only)", "context", True),
}


@lru_cache
def hyperparameter_file() -> dict:
    """The chosen values and how they were chosen: "micro" (tuned) and "hub" (the paper's where known)."""
    return json.loads((ASSETS / "hyperparameters.json").read_text(encoding="utf-8"))


def hyperparameters(method: str, model: str = "micro", changes: dict | None = None) -> dict:
    """Values of a method for the micro model, or for any other model; empty for methods that train nothing.

    `changes` replace chosen values; a name that no method knows raises `MiniCPTError`.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    chosen = hyperparameter_file()["micro" if model == "micro" else "hub"]
    known = {name for values in chosen.values() if isinstance(values, dict) for name in values}
    for name in changes or {}:
        if name not in known:
            raise unknown("hyper-parameter", name, sorted(known))
    return {**chosen.get(method, {}), **(changes or {})}


@dataclass
class Predictor:
    """A fitted method: scores texts by label. Call `close()` when done: LoRA then leaves the base model as it was."""

    model: object
    prefix: Tensor | None  # (1, P, D)
    candidates: list[list[int]]
    classes: list[str]
    encode_queries: Callable[[Sequence[str]], list[Encoded]]
    label_score: str = "mean"
    history: list[float] = field(default_factory=list)
    close: Callable[[], None] = lambda: None
    rows_at_once: int = ROWS

    def scores(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-scores of the texts, (N, C) raw and (N, C) calibrated, from one pass."""
        queries = self.encode_queries([*texts, *CONTENT_FREE])
        scores = label_scores(self.model, self.prefix, queries, self.candidates, self.label_score, self.rows_at_once)
        raw, content_free = scores[: len(texts)], scores[len(texts) :]
        return raw, calibrate(raw, content_free)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The class of each text."""
        return [self.classes[i] for i in self.scores(texts)[0].argmax(-1).tolist()]


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


def fit(
    method: str,
    base: BaseModel,
    split: Split,
    hp: dict | None = None,
    label_score: str = "mean",
    max_length: int | None = None,
    queries: Sequence[str] = (),
    extra: Sequence[Row] = (),
    rows_at_once: int = ROWS,
) -> Predictor:
    """Fit a method on the split's shots.

    `hp` overrides the chosen hyper-parameters; `max_length` caps prompts below the model's own limit; `queries` (by
    default the split's) tell how long a query gets; `extra` rows are trained on as the shots are, but stand in no
    context; `rows_at_once` caps what goes through the model together, and is lowered where the estimate of memory says
    so: the numbers stay the same. Texts are cut where the prompt would not fit, with a warning.
    Seeded by the split; the global random state is left alone.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    spec, hp = METHODS[method], hyperparameters(method, base.name, hp)
    if not split.shots and method != "zero":
        raise MiniCPTError(f"{method} needs at least one shot; without any, only the method 'zero' works.")
    tokenizer, template = base.tokenizer, split.template
    words = [split.verbalizers[c] for c in split.classes]
    candidates = tokenize(tokenizer, [template.label_text(w) for w in words])
    check_candidates(dict(zip(words, candidates)))

    instruction = tokenize(tokenizer, [split.instruction + template.inter])[0] if spec.instruction else []
    if spec.instruction and not split.instruction:
        raise MiniCPTError(f'{method} needs an instruction; add "instruction" to the task {split.task!r}.')
    labelled, further = ([(text, split.verbalizers[c]) for text, c in rows] for rows in (split.shots, extra))
    texts = list(queries) or [text for text, _ in split.queries]
    n_prompt = len(instruction) or (hp["tokens"] if spec.trains == "prompt" else 0)
    limit = min(base.max_length, max_length or base.max_length)
    rows = [(t, None) for t in texts] + labelled + further
    sequences = encode(tokenizer, template, rows)
    fixed = n_prompt + max(map(len, candidates))
    cap = fit_text_length(fixed, encode(tokenizer, template, labelled) if spec.context else [], sequences, limit)
    shots, others = encode(tokenizer, template, labelled, cap), encode(tokenizer, template, further, cap)
    if cap is not None:
        sequences = encode(tokenizer, template, rows, cap)
        warnings.warn(
            f"{split.task}, {method}, {len(shots)} shots: {sum(e.cut > 0 for e in sequences)} of {len(rows)} texts were "
            f"cut to {cap} tokens, so that the prompt fits into {limit}; labels are never cut.",
            stacklevel=2,
        )
    context = build_context(shots if spec.context else [], instruction if spec.trains == "context" else [])
    trained = [_until_label(row) for row in shots + others] if spec.trains else []
    in_prefix = len(context) + n_prompt * (spec.trains == "prompt")
    longest = max(map(len, sequences)) + max(map(len, candidates))
    batch = min(hp["batch_size"] or len(trained), len(trained)) if trained else 0
    rows_at_once = rows_that_fit(base.model, base.device, in_prefix, longest, batch, rows_at_once)
    predictor = Predictor(
        base.model, base.embed(context.ids) if len(context) else None, candidates, split.classes,
        lambda texts: encode(tokenizer, template, [(t, None) for t in texts], cap), label_score,
        rows_at_once=rows_at_once,
    )  # fmt: skip
    if spec.trains is None:
        return predictor
    with torch.random.fork_rng():
        torch.manual_seed(split.seed)
        recipe = Recipe(hp["lr"], hp["epochs"], hp["batch_size"], at_once=rows_at_once)
        _TRAINERS[spec.trains](predictor, base, context, trained, hp, recipe, instruction, split.seed)
    return predictor


def _until_label(row: Encoded) -> Encoded:
    """A training row ends with its label: what follows it in the context has no say in the loss."""
    end = len(row) - row.types[::-1].index(LABEL)
    return Encoded(row.ids[:end], row.types[:end])


def _batch(rows: list[Encoded], chosen: list[int], device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, mask, types and labels (-100 but on label tokens), each (B, T)."""
    ids, mask, types = (t.to(device) for t in collate([rows[i] for i in chosen]))
    return ids, mask, types, ids.masked_fill(types != LABEL, IGNORE)


def _train_context(predictor, base, context, rows, hp, recipe, instruction, seed):
    """CPT: the context's embeddings move inside their balls (paper 3.2)."""
    from .model import CPTConfig, TaskType, get_peft_model

    config = CPTConfig(
        task_type=TaskType.CAUSAL_LM,
        cpt_token_ids=context.ids,
        cpt_tokens_type_mask=context.types,
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=hp["decay"],
        opt_projection_epsilon=hp["epsilon"],
        opt_projection_format_epsilon=hp["epsilon_format"],
        opt_epsilon_unit=hp["epsilon_unit"],
        opt_loss_reduction="sum",
        opt_context_loss_weight=hp["context_weight"],
    )
    model = get_peft_model(base.model, config)
    encoder = model.prompt_encoder["default"]

    def loss_of(chosen):
        ids, mask, types, labels = _batch(rows, chosen, base.device)
        return model(input_ids=ids, attention_mask=mask, labels=labels, input_type_mask=types).loss

    weights = [encoder.delta_embedding.weight]
    predictor.history = train(loss_of, weights, len(rows), recipe, _generator(seed), encoder.project_)
    predictor.prefix = model.get_prompt(batch_size=1).detach()


def _train_prompt(predictor, base, context, rows, hp, recipe, instruction, seed):
    """PT and IPT: a soft prompt before the query, or before the fixed context and the query."""
    from .embeddings import rows_of
    from .model import PromptTuningConfig, TaskType, get_peft_model

    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=len(instruction) or hp["tokens"],
        prompt_tuning_init="RANDOM" if instruction else hp["init"],
    )
    model = get_peft_model(base.model, config)
    weight = model.prompt_encoder["default"].embedding.weight
    if instruction:  # the ids are at hand: PromptTuningInit.TEXT would load the tokenizer again
        weight.data = rows_of(base.model.get_input_embeddings(), instruction)
    fixed = Encoded(context.ids, [0] * len(context))
    rows = [fixed + row for row in rows]

    def loss_of(chosen):
        ids, mask, types, labels = _batch(rows, chosen, base.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, config.num_virtual_tokens :]
        return label_loss(logits, labels, types, reduction="sum")

    predictor.history = train(loss_of, [weight], len(rows), recipe, _generator(seed))
    prompt = model.get_prompt(batch_size=1).detach()
    predictor.prefix = prompt if predictor.prefix is None else torch.cat((prompt, predictor.prefix.to(prompt)), dim=1)


def _train_lora(predictor, base, context, rows, hp, recipe, instruction, seed):
    """LoRA on the query alone, by PEFT."""
    import peft

    from .model import get_peft_model

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=hp["rank"], lora_alpha=hp["alpha"])
    model = get_peft_model(base.model, config)

    def restore():
        model.unload()
        base.model.requires_grad_(False)

    predictor.model, predictor.close = model, restore

    def loss_of(chosen):
        ids, mask, types, labels = _batch(rows, chosen, base.device)
        return label_loss(model(input_ids=ids, attention_mask=mask).logits, labels, types, reduction="sum")

    try:
        weights = [p for p in model.parameters() if p.requires_grad]
        predictor.history = train(loss_of, weights, len(rows), recipe, _generator(seed))
    except BaseException:
        restore()
        raise
    model.eval()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


_TRAINERS = {"context": _train_context, "prompt": _train_prompt, "lora": _train_lora}

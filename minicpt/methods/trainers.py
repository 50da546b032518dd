"""How each kind of method trains: TRAINERS[kind](predictor, base, context, rows, hp, recipe, instruction, generator).

Each trains on `rows` and writes what came of it into the predictor: its prefix or model, and the losses of its steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.embeddings import epsilon_length, rows_of
from ..core.loss import IGNORE, label_loss
from ..core.masks import LABEL
from ..core.projection import project
from ..core.templates import Encoded, collate
from ..core.train import Recipe, train
from ..engine.prefix import loss_after, why_not_shared
from .context_tuning import OPTIONS, TunedCache, TunedContext

HOLD_OUT_FROM = 32  # rows


def until_label(row: Encoded) -> Encoded:
    """A training row ends with its label: what follows it in the context has no say in the loss."""
    end = len(row) - row.types[::-1].index(LABEL)
    return Encoded(row.ids[:end], row.types[:end])


def _batch(rows: list[Encoded], chosen: list[int], device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, mask, types and labels (-100 but on label tokens), each (B, T)."""
    ids, mask, types = (t.to(device) for t in collate([rows[i] for i in chosen]))
    return ids, mask, types, ids.masked_fill(types != LABEL, IGNORE)


def _train_context(predictor, base, context, rows, hp, recipe, instruction, generator):
    """CPT: the context's embeddings move inside their balls (paper 3.2)."""
    if OPTIONS.keys() & hp.keys():  # beyond what the drop-in classes can say
        tuned = TunedContext(base, context, len(instruction), hp)
        return _train_tuned(tuned, predictor, rows, recipe, generator)
    from ..dropin.model import CPTConfig, TaskType, get_peft_model

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
    predictor.history = train(loss_of, weights, len(rows), recipe, generator, encoder.project_)
    predictor.prefix = model.get_prompt(batch_size=1).detach()


def _train_cache(predictor, base, context, rows, hp, recipe, instruction, generator):
    """CT-KV: the context's keys and values."""
    _train_tuned(
        TunedCache(base, context, len(instruction), hp), predictor, rows, recipe, generator
    )


def _train_tuned(tuned, predictor, rows, recipe, generator):
    def loss_of(chosen):
        return tuned.loss(_batch(rows, chosen, tuned.base.device), chosen)

    predictor.history = train(loss_of, tuned.weights, len(rows), recipe, generator, tuned.project_)
    with torch.no_grad():
        predictor.prefix = tuned.prefix()


def _train_prompt(predictor, base, context, rows, hp, recipe, instruction, generator):
    """PT and IPT: a soft prompt before the query, or before the fixed context and the query.

    Given an `epsilon` (in `epsilon_unit`), every prompt token stays in a ball around its start, as CPT's tokens do.
    """
    from ..dropin.model import PromptTuningConfig, TaskType, get_peft_model

    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=len(instruction) or hp["tokens"],
        prompt_tuning_init="RANDOM" if instruction else hp["init"],
    )
    model = get_peft_model(base.model, config)
    weight = model.prompt_encoder["default"].embedding.weight
    if instruction:  # the ids are at hand: PromptTuningInit.TEXT would load the tokenizer again
        weight.data = rows_of(base.model.get_input_embeddings(), instruction)
    start = weight.detach().clone()
    fixed = Encoded(context.ids, [0] * len(context))
    rows = [fixed + row for row in rows]
    share = not why_not_shared(base.model)

    def loss_of(chosen):
        ids, mask, types, labels = _batch(rows, chosen, base.device)
        return loss_after(
            base.model, model.get_prompt(batch_size=1), ids, mask, types, labels, share=share
        )

    @torch.no_grad()
    def project_():
        radius = hp["epsilon"] * epsilon_length(
            hp["epsilon_unit"], base.model.get_input_embeddings()
        )
        weight.copy_(
            start + project(weight - start, torch.full((len(start),), radius, device=start.device))
        )

    hooks = [project_] if "epsilon" in hp else []
    predictor.history = train(loss_of, [weight], len(rows), recipe, generator, *hooks)
    prompt = model.get_prompt(batch_size=1).detach()
    predictor.prefix = (
        prompt
        if predictor.prefix is None
        else torch.cat((prompt, predictor.prefix.to(prompt)), dim=1)
    )


def _train_lora(predictor, base, context, rows, hp, recipe, instruction, generator):
    """LoRA on the query alone, by PEFT."""
    import peft

    from ..dropin.model import get_peft_model

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=hp["rank"], lora_alpha=hp["alpha"])
    model = get_peft_model(base.model, config)

    def restore():
        model.unload()
        base.model.requires_grad_(False)

    predictor.model, predictor.close = model, restore

    def loss_of(chosen):
        ids, mask, types, labels = _batch(rows, chosen, base.device)
        return label_loss(
            model(input_ids=ids, attention_mask=mask).logits, labels, types, reduction="sum"
        )

    try:
        weights = [p for p in model.parameters() if p.requires_grad]
        predictor.history = train(loss_of, weights, len(rows), recipe, generator)
    except BaseException:
        restore()
        raise
    model.eval()


def train_bilevel(
    loss_of: Callable[[list[int]], Tensor],
    weights: list[Tensor],
    architecture: list[Tensor],
    architecture_lr: float,
    n_rows: int,
    recipe: Recipe,
    generator: torch.Generator,
) -> list[float]:
    """Minimise over `weights` as `train` does, and over `architecture` with its own learning rate, as DARTS does.

    From 32 rows on a quarter is held out, and each step of the weights on the other rows is followed by a step of the
    architecture on held-out ones. With fewer rows both take their steps on the same. Source: MiLoRA 3.4.
    """
    if n_rows < HOLD_OUT_FROM:
        groups = [{"params": weights}, {"params": architecture, "lr": architecture_lr}]
        return train(loss_of, groups, n_rows, recipe, generator)
    order = torch.randperm(n_rows, generator=generator).tolist()
    held_out, seen = order[: n_rows // 4], order[n_rows // 4 :]
    optimizer = torch.optim.AdamW(architecture, lr=architecture_lr, weight_decay=0.0)

    def held_out_step() -> None:
        batch = torch.randperm(len(held_out), generator=generator)[: recipe.batch_size or None]
        gradients = torch.autograd.grad(loss_of([held_out[i] for i in batch]), architecture)
        for parameter, gradient in zip(architecture, gradients):
            parameter.grad = gradient
        optimizer.step()

    return train(
        lambda batch: loss_of([seen[i] for i in batch]),
        weights,
        len(seen),
        recipe,
        generator,
        held_out_step,
    )


def _train_iapt(predictor, base, context, rows, hp, recipe, instruction, generator):
    """IAPT on the query alone: the instruction that its generators read is the filled-in template up to the label."""
    from ..dropin.model import IAPTConfig, get_peft_model

    config = IAPTConfig(num_virtual_tokens=hp["tokens"], bottleneck=hp["bottleneck"])
    model = predictor.model = get_peft_model(base.model, config)

    def loss_of(chosen):
        ids, mask, types, labels = _batch(rows, chosen, base.device)
        output = model(input_ids=ids, attention_mask=mask, input_type_mask=types)
        return label_loss(output.logits, labels, types, reduction="sum")

    g, lr = model.activations(), hp["activation_lr"]
    predictor.history = train_bilevel(loss_of, model.weights(), g, lr, len(rows), recipe, generator)


TRAINERS = {
    "context": _train_context,
    "cache": _train_cache,
    "prompt": _train_prompt,
    "lora": _train_lora,
    "iapt": _train_iapt,
}

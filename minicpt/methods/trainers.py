"""How each kind of method trains: a `Job` goes in, a `Fitted` comes out; `fit` says which function is for whom.

PEFT, and our classes that stand on it, are imported where they are used: methods that train nothing do without.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.embeddings import epsilon_length, rows_of
from ..core.loss import label_loss, send
from ..core.masks import SEPARATOR
from ..core.projection import project
from ..core.templates import Encoded
from ..core.train import Recipe, train
from ..engine.modules import sharing_weights
from ..engine.passes import attended
from ..engine.prefix import Prefix, loss_after, why_not_shared
from ..errors import MiniCPTError
from .context_tuning import OPTIONS, TunedCache, TunedContext
from .prepare import Job

HOLD_OUT_FROM = 32  # rows


@dataclass(frozen=True)
class Fitted:
    """What came of it: a model, what stands before every query, and the loss of each step."""

    model: Any
    prefix: Tensor | Prefix | None = None
    history: list[float] = field(default_factory=list)


def train_context(job: Job) -> Fitted:
    """CPT: the context's embeddings move inside their balls (paper 3.2)."""
    base, hp = job.base, job.hp
    if OPTIONS.keys() & hp.keys():  # beyond what the drop-in classes can say
        return _train_tuned(job, TunedContext(base, job.context, job.context.n_instruction, hp))
    from ..dropin.model import CPTConfig, TaskType, get_peft_model

    config = CPTConfig(
        task_type=TaskType.CAUSAL_LM,
        cpt_token_ids=job.context.ids,
        cpt_tokens_type_mask=job.context.types,
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

    def loss_of(chosen: list[int]) -> Tensor:
        ids, mask, types, labels = job.batch(chosen)
        return model(input_ids=ids, attention_mask=mask, labels=labels, input_type_mask=types).loss

    weights = [encoder.delta_embedding.weight]
    history = train(loss_of, weights, len(job.rows), job.recipe, job.generator, encoder.project_)
    return Fitted(base.model, model.get_prompt(batch_size=1).detach(), history)


def train_cache(job: Job) -> Fitted:
    """CT-KV: the context's keys and values."""
    return _train_tuned(job, TunedCache(job.base, job.context, job.context.n_instruction, job.hp))


def _train_tuned(job: Job, tuned: TunedContext | TunedCache) -> Fitted:
    def loss_of(chosen: list[int]) -> Tensor:
        return tuned.loss(job.batch(chosen), chosen)

    history = train(
        loss_of, tuned.weights, len(job.rows), job.recipe, job.generator, tuned.project_
    )
    with torch.no_grad():
        return Fitted(job.base.model, tuned.prefix(), history)


def train_prompt(job: Job) -> Fitted:
    """PT and IPT: a soft prompt before the query, or before the fixed context and the query.

    Given an `epsilon` (in `epsilon_unit`), every prompt token stays in a ball around its start, as CPT's tokens do.
    """
    from ..dropin.model import PromptTuningConfig, TaskType, get_peft_model

    base, hp, instruction = job.base.model, job.hp, list(job.instruction)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=len(instruction) or hp["tokens"],
        prompt_tuning_init="RANDOM" if instruction else hp["init"],
    )
    model = get_peft_model(base, config)
    weight = model.prompt_encoder["default"].embedding.weight
    if instruction:  # the ids are at hand: PromptTuningInit.TEXT would load the tokenizer again
        weight.data.copy_(rows_of(base.get_input_embeddings(), instruction))
    start = weight.detach().clone()
    # BOS stands before the soft prompt; the rest of the context is text that every row begins with
    n_leading = len(job.base.leading)
    bos = job.base.embed(job.context.ids[:n_leading])  # (1, 0, D) where the tokenizer has none
    fixed = Encoded(job.context.ids[n_leading:], [SEPARATOR] * (len(job.context) - n_leading))
    job = replace(job, rows=[fixed + row for row in job.rows])

    def prompt() -> Tensor:
        soft = model.get_prompt(batch_size=1)
        return torch.cat((bos.to(soft), soft), dim=1)

    share = not why_not_shared(base)
    if "epsilon" in hp:
        radius = hp["epsilon"] * epsilon_length(hp["epsilon_unit"], base.get_input_embeddings())
        radii = torch.full((len(start),), radius, device=start.device)

    def loss_of(chosen: list[int]) -> Tensor:
        return loss_after(base, prompt(), *job.batch(chosen), share=share)

    @torch.no_grad()
    def project_() -> None:
        if "epsilon" in hp:
            weight.copy_(start + project(weight - start, radii))

    history = train(loss_of, [weight], len(job.rows), job.recipe, job.generator, project_)
    prefix = prompt().detach()
    return Fitted(base, torch.cat((prefix, job.base.embed(fixed.ids).to(prefix)), dim=1), history)


def train_lora(job: Job) -> Fitted:
    """LoRA on the query alone, by PEFT, in modules of its own around the base model's weights."""
    import peft

    from ..dropin.model import get_peft_model

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=job.hp["rank"], lora_alpha=job.hp["alpha"])
    try:
        model = get_peft_model(sharing_weights(job.base.model), config)
    except ValueError as error:  # an architecture of which PEFT does not know where LoRA goes
        raise MiniCPTError(
            f"LoRA goes where PEFT puts it by default, but for {job.base.name} PEFT says: {error} Use another method."
        ) from error

    def loss_of(chosen: list[int]) -> Tensor:
        ids, mask, types, labels = job.batch(chosen)
        mask = attended(mask, model.device)
        logits = model(input_ids=send(ids, model.device), attention_mask=mask).logits
        return label_loss(logits, labels, types, reduction="sum")

    weights = [p for p in model.parameters() if p.requires_grad]
    history = train(loss_of, weights, len(job.rows), job.recipe, job.generator)
    return Fitted(model.eval(), None, history)


def train_iapt(job: Job) -> Fitted:
    """IAPT on the query alone: the instruction that its generators read is the filled-in template up to the label."""
    from ..dropin.model import IAPTConfig, get_peft_model

    config = IAPTConfig(
        num_virtual_tokens=job.hp["tokens"],
        bottleneck=job.hp["bottleneck"],
        leading=len(job.base.leading),
    )
    model = get_peft_model(job.base.model, config)

    def loss_of(chosen: list[int]) -> Tensor:
        ids, mask, types, labels = job.batch(chosen)
        logits = model(input_ids=ids, attention_mask=mask, input_type_mask=types).logits
        return label_loss(logits, labels, types, reduction="sum")

    history = train_bilevel(
        loss_of,
        model.weights(),
        model.activations(),
        job.hp["activation_lr"],
        len(job.rows),
        job.recipe,
        job.generator,
    )
    return Fitted(model.eval(), None, history)


def train_bilevel(
    loss_of: Callable[[list[int]], Tensor],
    weights: list[Tensor],
    architecture: list[Tensor],
    architecture_lr: float,
    n_rows: int,
    recipe: Recipe,
    generator: torch.Generator,
) -> list[float]:
    """Minimise over `weights` as `train` does, and over `architecture` with its own learning rate.

    From 32 rows on a quarter of them is held out, and each step of the weights on the other rows is
    followed by a step of the architecture on held-out ones, as in DARTS. With fewer rows both take
    their steps on the same. Source: MiLoRA 3.4.
    """
    if n_rows < HOLD_OUT_FROM:
        groups = [{"params": weights}, {"params": architecture, "lr": architecture_lr}]
        return train(loss_of, groups, n_rows, recipe, generator)
    order = torch.randperm(n_rows, generator=generator)
    held_out = order[: n_rows // 4]
    seen = order[n_rows // 4 :]
    optimizer = torch.optim.AdamW(architecture, lr=architecture_lr, weight_decay=0.0)

    def held_out_step() -> None:
        batch = torch.randperm(len(held_out), generator=generator)[: recipe.batch_size or None]
        gradients = torch.autograd.grad(loss_of(held_out[batch].tolist()), architecture)
        for parameter, gradient in zip(architecture, gradients):
            parameter.grad = gradient
        optimizer.step()

    return train(
        lambda batch: loss_of(seen[batch].tolist()),
        weights,
        len(seen),
        recipe,
        generator,
        held_out_step,
    )

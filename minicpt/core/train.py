"""The one training loop: AdamW on what a method trains, and a hook after each step to project."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TrainingDiverged

LOOK = 10  # steps between two looks at the losses; on a GPU each waits for all that is queued


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train; `batch_size` 0 takes all rows at once.

    `at_once` rows of a batch go through the model together, 0 for all of them: fewer need less
    memory, and the step is the same. `clip` is the largest norm that a gradient keeps.
    """

    lr: float
    epochs: int = 25
    batch_size: int = 0
    clip: float = 1.0
    at_once: int = 0


def train(
    loss_of: Callable[[list[int]], Tensor],
    parameters: Iterable[Tensor | dict],
    n_rows: int,
    recipe: Recipe,
    generator: torch.Generator,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Minimise `loss_of(row indices)`, a mean over these rows; return the loss of every step.

    `parameters` are tensors, or groups {"params": tensors, "lr": their own rate}, as an optimiser
    takes them. Each epoch passes once over the rows, in random order. The learning rate falls
    linearly to zero, the Trainer default that the paper's authors used in their demo. `after_step`
    is where CPT projects. Raises `TrainingDiverged`, which names the step, if a loss is NaN or
    infinite, `LOOK` steps later at most.
    """
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    size = min(recipe.batch_size or n_rows, n_rows)
    steps = recipe.epochs * math.ceil(n_rows / size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    history, unread = [], []  # of the steps that nobody has looked at yet: the losses of each part
    for _ in range(recipe.epochs):
        order = torch.randperm(n_rows, generator=generator)
        for batch in order.split(size):
            optimizer.zero_grad()
            unread.append([])
            for part in batch.split(recipe.at_once or size):
                # weighted by their rows, the parts' mean losses and gradients add up to the batch's
                share = loss_of(part.tolist()) * (len(part) / len(batch))
                share.backward()
                unread[-1].append(share.detach())
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            schedule.step()
            after_step()
            if len(unread) == LOOK or schedule.last_epoch == steps:
                losses = iter(torch.stack(sum(unread, [])).cpu().tolist())
                for parts in unread:
                    history.append(sum(next(losses) for _ in parts))
                    if not math.isfinite(history[-1]):
                        raise TrainingDiverged(
                            f"The loss became {history[-1]} at step {len(history)} of {steps} "
                            f"(learning rate {recipe.lr}). Lower the learning rate; if that is of "
                            "no help, or nothing was trained yet (step 1), load the model in "
                            "float32 or bfloat16 (--dtype), and check its weights and the labels' "
                            "roles."
                        )
                unread = []
    return history

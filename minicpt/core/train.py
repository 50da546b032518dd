"""The one training loop: AdamW on whatever a method trains, a hook after each step for the projection."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TrainingDiverged


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train; `batch_size` 0 takes all rows at once.

    `at_once` rows of a batch go through the model together, 0 for all: fewer need less memory, the step is the same.
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
    """Minimise `loss_of(row indices)`; return the loss of every step.

    `parameters`: tensors, or groups {"params": tensors, "lr": their own rate}, as an optimiser takes them; `loss_of` is
    a mean over its rows. Each epoch passes once over the rows in random order; the learning rate falls linearly to zero
    (the Trainer default that the paper's authors used in their demo); `after_step` is where CPT projects.
    Raises `TrainingDiverged` as soon as a loss is NaN or infinite.
    """
    optimizer = torch.optim.AdamW(list(parameters), lr=recipe.lr, weight_decay=0.0)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    size = min(recipe.batch_size or n_rows, n_rows)
    steps = recipe.epochs * -(-n_rows // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    history: list[float] = []
    for _ in range(recipe.epochs):
        for batch in torch.randperm(n_rows, generator=generator).split(size):
            optimizer.zero_grad()
            mean = 0.0
            for part in batch.split(recipe.at_once or size):
                # losses are means over rows: weighted so, the parts' gradients add up to the batch's
                loss = loss_of(part.tolist()) * (len(part) / len(batch))
                if not torch.isfinite(loss):
                    raise TrainingDiverged(
                        f"The loss became {loss.item()} at step {len(history) + 1} of {steps} (learning rate "
                        f"{recipe.lr}). Lower the learning rate, or check the labels' roles."
                    )
                loss.backward()
                mean += loss.item()
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            schedule.step()
            after_step()
            history.append(mean)
    return history

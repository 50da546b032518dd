"""Label cross-entropy with recency decay: the training label plus the context's labels (paper 3.2.1).

    L = sum_k gamma^(K+1-k) * CE(label k of the context)  +  CE(label of the training example)

Only label tokens count. The last label of a row (the training example's) weighs 1, the one before it gamma, the one
before that gamma^2 ...: later examples matter more, as they do in in-context learning.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import unknown
from .masks import example_of, is_label

IGNORE = -100


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for what a GPU has still to do."""
    return tensor.to(device, non_blocking=device.type != "mps")  # where that gives wrong numbers


def label_numbers(types: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """Number the labels of each row 1, 2, ... by their example; 0 at all other tokens."""
    return torch.where(is_label(types), example_of(types) + 1, 0)


def distance_to_last(types: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """Count, at each label token, the labelled examples of its row that come after it (0 at the last one)."""
    number = label_numbers(types)
    width = int(number.max()) + 1
    present = torch.zeros(len(types), width, dtype=torch.long, device=types.device)
    present.scatter_(1, number, 1)  # (B, width): does the row have a label of this number?
    later = present.flip(1).cumsum(1).flip(1) - present  # how many labels have a larger number?
    return torch.where(number > 0, later.gather(1, number), 0)


def token_weights(
    labels: Int[Tensor, "B S"],
    types: Int[Tensor, "B S"],
    decay: float = 1.0,
    reduction: str = "mean",
    context_weight: float = 1.0,
) -> Float[Tensor, "B S"]:
    """Weight of every position's cross-entropy, so that the loss is one weighted sum; zero where labels are -100.

    `reduction="mean"`: omega / (number of label tokens in the batch), as PEFT's `calculate_loss` does.
    `reduction="sum"`: omega / (tokens of that label) / B, the paper's sum over labels, averaged over rows.
    `context_weight` scales all labels but each row's last one (0: train on the training label only).
    """
    valid = labels != IGNORE
    distance = distance_to_last(types)
    # omega_k = gamma^(K+1-k), times the context's weight; 1 at the last label
    omega = decay ** distance.float() * torch.where(distance > 0, context_weight, 1.0) * valid
    if reduction == "mean":
        # 0/0 where no label is left: NaN, as PEFT returns; callers who can, say so before (forward.py)
        return omega / valid.sum()
    if reduction == "sum":
        number = label_numbers(types)
        sizes = torch.zeros(len(types), int(number.max()) + 1, device=types.device)
        sizes.scatter_add_(1, number, valid.float())  # tokens of each label
        return omega / sizes.gather(1, number).clamp(min=1) / len(labels)
    raise unknown("loss reduction", reduction, ["mean", "sum"])


def label_loss(
    logits: Float[Tensor, "B S V"],
    labels: Int[Tensor, "B S"],
    types: Int[Tensor, "B S"],
    decay: float = 1.0,
    reduction: str = "mean",
    context_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of the label tokens, recency-weighted: logits (B, S, V), labels and types (B, S) -> scalar.

    Position s predicts token s+1, as in any causal language model. Labels of -100 are left out.
    Sources: paper 3.2.1, PEFT `CPTEmbedding.calculate_loss`.
    """
    device, labels, types = logits.device, labels[:, 1:].cpu(), types[:, 1:].cpu()
    weights = token_weights(labels, types, decay, reduction, context_weight)
    # only the counted positions: the softmax over V is the expensive part
    row, column = counted = (labels != IGNORE).nonzero(as_tuple=True)  # (n,), (n,)
    predicted = logits[send(row, device), send(column, device)].float()  # (n, V)
    losses = F.cross_entropy(predicted, send(labels[counted], device), reduction="none")
    if reduction == "mean" and not len(losses):
        return losses.mean()  # NaN, as PEFT
    return (losses * send(weights[counted], device)).sum()  # sum_k omega_k * CE(label k)

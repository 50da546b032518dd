"""Labels and roles of whole rows [prompt, query], and a batch's part of the loss where gradients are accumulated."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..core.loss import IGNORE
from ..core.masks import is_label, is_unfinished, shift_types
from ..errors import MiniCPTError


def label_context(
    labels: Int[Tensor, "B T"],
    types: Tensor | None,
    config,
    query: Tensor,
    warn: Callable[[str], None],
) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Put the context's labels and types before the query's: each (B, T) -> (B, S) on the CPU, -100 off labels.

    S = P+T; `query` (B, T, D) tells sizes. Raises `MiniCPTError` for wrong shapes and where the loss would be
    NaN; `warn` gets what is as in PEFT but hardly meant. Source: PEFT `_cpt_forward`.
    """
    (B, T), P = query.shape[:2], config.num_virtual_tokens
    if types is None:
        warn(
            "No input_type_mask: every labelled token counts as part of one label, as in PEFT. Pass the roles of "
            "the query's tokens (4 at its label) to say what is what."
        )
        types = torch.full((B, T), 4)
    for name, value in (("labels", labels), ("input_type_mask", types)):
        if tuple(value.shape) != (B, T):
            raise MiniCPTError(
                f"{name} has shape {tuple(value.shape)}; it needs one entry per query token, {(B, T)}, and none "
                "for the context, whose own come from the configuration."
            )
    context_types = torch.tensor(config.cpt_tokens_type_mask)
    if is_unfinished(context_types):
        counts = 4 - max(config.cpt_tokens_type_mask) % 4
        warn(
            "cpt_tokens_type_mask ends in an unfinished example, as PEFT's default of all ones does. So the roles of "
            f"the query shift, as in PEFT: tokens of type {counts} count as its label, those of type 4 do not. Give "
            "every token of the context its role, 1 to 4 in the first example, 5 to 8 in the next, and let the last "
            "example end with its label."
        )
    types = shift_types(context_types, types.cpu().long(), strict=False)
    types = torch.cat((context_types.expand(B, -1), types), dim=1)
    context_ids = torch.tensor(config.cpt_token_ids).expand(B, -1)
    labels = torch.cat((context_ids, labels), dim=1).masked_fill(~is_label(types), IGNORE)
    counted = labels != IGNORE
    if not counted[:, 1:].any():
        raise MiniCPTError(
            "Neither the context nor the query has a label, so the loss would be NaN. Labels are tokens of type 4, "
            "8, ... in cpt_tokens_type_mask and input_type_mask whose label is not -100."
        )
    if not counted[:, P:].any():
        warn(
            "No token of the query counts as a label (labels -100, or no type 4 in input_type_mask): the loss is "
            "the context's alone, as in PEFT, and learns nothing from the query."
        )
    return labels, types


def label_query(
    labels: Int[Tensor, "B T"], P: int, items: Tensor | int | None
) -> Int[Tensor, "B S"]:
    """Put -100 for the P tokens of a soft prompt before the labels: (B, T) -> (B, P+T).

    Raises `MiniCPTError` where the loss would be NaN; with a count of `items` from outside the loss of no label is 0.
    """
    if items is None and (labels == IGNORE).all():
        raise MiniCPTError(
            "All labels are -100: the loss would be NaN. Label at least one token of the batch."
        )
    return torch.cat((labels.new_full((len(labels), P), IGNORE), labels), dim=1)


def beside_the_prompt(labels: Tensor, types: Tensor | None, mask: Tensor, P: int) -> tuple:
    """Let the first token's label and type of a row padded on the left change places with those of its padding.

    The prompt's P tokens stand before the padding, and the last of them is what predicts that label. All (B, P+T).
    """
    first = P + mask[:, P:].bool().int().argmax(dim=1)  # (B,), P if all is padding
    order = torch.arange(labels.shape[1], device=labels.device).repeat(len(labels), 1)
    order[:, P] = first
    order.scatter_(1, first[:, None], P)
    return labels.gather(1, order), None if types is None else types.gather(1, order)


def share_of_batch(
    model, labels: Int[Tensor, "B T"], items: Tensor | int | None, warn: Callable[[str], None]
) -> Tensor | float:
    """Part of this batch in one whose gradients are accumulated, with `items` labels in all; 1 for a batch of its own.

    CPT's loss is a mean over a batch, so the means of the parts are weighed. A label is a query's that is not -100,
    counted as `transformers.Trainer` does. `warn` gets what this cannot tell: how many rows of other sizes there are.
    """
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    own = (labels[:, int(shifts) :] != IGNORE).sum(dim=1)  # (B,)
    items = int(items or 0)
    if items in (0, own.sum()):
        return 1.0
    if (items % own.clamp(min=1)).any():
        warn(
            "Gradients are accumulated over rows with different numbers of labels, by which each batch's loss is "
            "weighed. This equals one batch of all rows only if every row has equally many labels that are not -100. "
            "Set the labels of all tokens but the label's to -100 to come close to it."
        )
    return own.sum() / items

"""Positions where padding stands between the prompt and a row's tokens, as it does where rows are padded on the left.

    [prompt, padding, query]   mask 1 1 1 0 0 1 1   positions 0 1 2 2 2 3 4

The row is then what it would be without padding. PEFT counts the padding: positions 0 1 2 3 4 5 6.
"""

import inspect

from torch import Tensor

from ..engine.prefix import tokens_remembered
from ..errors import MiniCPTError

COUNT_BY_MASK = ("bloom", "opt")  # they leave padding out of their own accord


def padded_between(mask: Tensor) -> bool:
    """Say whether a token that counts comes right after one that does not, in any row of `mask` (B, S) 0/1."""
    real = mask.bool()
    return bool((real[:, 1:] & ~real[:, :-1]).any())


def positions(model, mask: Tensor) -> Tensor | None:
    """Positions (B, S) for `mask` (B, S) 0/1 of whole rows, or None where those that the model finds are right.

    Raises `MiniCPTError` for a model that cannot be told, and for a sliding window in which padding takes room.
    """
    if not padded_between(mask):
        return None
    counts_by_mask = model.config.model_type in COUNT_BY_MASK
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    why, kind = None, type(model).__name__
    if mask.shape[1] > tokens_remembered(model) + 1:
        why = f"in {kind}'s sliding window it takes the room of others"
    elif not (takes_positions or counts_by_mask):
        why = f"{kind} takes it for text, since it cannot be given position_ids"
    if why:
        raise MiniCPTError(
            f"Padding stands between the prompt and the tokens of a row, and {why}. Pad on the right, or give one row "
            "at a time, without padding."
        )
    if counts_by_mask:
        return None
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)

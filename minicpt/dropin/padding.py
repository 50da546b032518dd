"""Positions where padding stands between the prompt and a row's tokens, as it does where rows are padded on the left.

    [prompt, padding, query]   mask 1 1 1 0 0 1 1   positions 0 1 2 2 2 3 4

The row then has the numbers that it has without padding. PEFT counts the padding: positions 0 1 2 3 4 5 6.
"""

import inspect

from torch import Tensor

from ..engine.prefix import tokens_remembered
from ..errors import MiniCPTError

COUNT_BY_MASK = ("bloom", "opt")  # they leave padding out of their own accord


def positions(model, mask: Tensor) -> Tensor | None:
    """Positions (B, S) of whole rows by their `mask` (B, S) 0/1, or None where those that the model finds are right.

    Raises `MiniCPTError` for a model that cannot be told, and for a sliding window in which padding takes room.
    """
    real = mask.bool()
    if not (real[:, 1:] & ~real[:, :-1]).any():
        return None  # no token comes after padding
    why, kind = None, model.config.model_type
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if mask.shape[1] > tokens_remembered(model) + 1:
        why = "in its sliding window padding takes the room of tokens"
    elif not takes_positions and kind not in COUNT_BY_MASK:
        why = "it counts padding as text, and takes no position_ids to say otherwise"
    if why:
        raise MiniCPTError(
            f"This {type(model).__name__} cannot run rows whose tokens come after padding: {why}. Pad on the right, or "
            "give it one row at a time, without padding."
        )
    return None if kind in COUNT_BY_MASK else (real.cumsum(dim=1) - 1).clamp(min=0)

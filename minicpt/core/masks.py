"""Templates and token roles: from (text, label) to token ids, and from K examples to one context.

Every token of an example has a role (PEFT's `cpt_tokens_type_mask`): 0 separator, 1 input template, 2 input,
3 output template, 4 label. Example i of a context adds 4*i, so one integer per token says both *what* the token is
(`type % 4`) and *whose* (`type // 4`). A label is `type > 0 and type % 4 == 0`.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import MiniCPTError

SEPARATOR, INPUT_TEMPLATE, INPUT, OUTPUT_TEMPLATE, LABEL = range(5)


# ---- roles, on tensors ---------------------------------------------------------------------------------------------


def role_of(types: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
    """What each token is: `types` (any shape) -> roles 0 to 4, same shape. Types 0 1 2 3 4 5 8 -> 0 1 2 3 4 1 4."""
    return torch.where(types > 0, (types - 1) % 4 + 1, 0)


def example_of(types: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
    """Whose each token is, counted from 0; separators are nobody's. Types 0 1 2 3 4 5 8 -> -1 0 0 0 0 1 1."""
    return torch.where(types > 0, (types - 1) // 4, -1)


def is_label(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark the label tokens: `types` (any shape) -> mask of the same shape. Source: PEFT `_cpt_forward`."""
    return (types > 0) & (types % 4 == 0)


def is_input(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark the tokens of the input text itself: `types` -> mask of the same shape."""
    return types % 4 == INPUT


def is_template(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark input- and output-template tokens ("format" tokens): `types` -> mask of the same shape."""
    return (types % 4 == INPUT_TEMPLATE) | (types % 4 == OUTPUT_TEMPLATE)


def is_updated(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark what CPT may change: input and templates, never labels or separators (paper 3.2.2, PEFT's code)."""
    return is_input(types) | is_template(types)


def shift_types(prefix_types: Int[Tensor, "P"], types: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Number a query's types after those of the prefix, in a new tensor (PEFT changes its caller's).

    Raises `MiniCPTError` if the prefix's largest type is no multiple of 4: the query's roles would shift by one and
    PEFT would take output-template tokens for labels (loss NaN or wrong).
    """
    largest = int(prefix_types.max()) if prefix_types.numel() else 0
    if largest % 4:
        raise MiniCPTError(
            f"cpt_tokens_type_mask ends in an unfinished example: its largest type is {largest}, not a multiple of 4, "
            "so the roles of everything after it would shift. Types run 1 (input template), 2 (input), 3 (output "
            "template), 4 (label) per example, +4 for each further one, 0 for separators; give the last example a label."
        )
    return torch.where(types > 0, types + largest, types)

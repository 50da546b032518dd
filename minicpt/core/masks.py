"""Token roles: what a token of the context is, and which example it belongs to.

Every token carries one integer, its type (PEFT's `cpt_tokens_type_mask`). In a single example the
type is the role: 0 separator, 1 input template, 2 input, 3 output template, 4 label. Example i of a
context, counted from 0, adds 4*i to its roles; separators stay 0. `role_of` and `example_of` read
both back, and no other code does that arithmetic.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import MiniCPTError

SEPARATOR, INPUT_TEMPLATE, INPUT, OUTPUT_TEMPLATE, LABEL = range(5)

# Two examples, "input: good ↵ output: great ↵" and "input: bad ↵ output: awful ↵", a word a token:
#
#            input: good ↵ output: great ↵ input: bad ↵ output: awful ↵
# types          1    2  0      3     4  0     5   6  0      7     8  0
# role_of        1    2  0      3     4  0     1   2  0      3     4  0   0, or (type - 1) % 4 + 1
# example_of     0    0 -1      0     0 -1     1   1 -1      1     1 -1   (type - 1) // 4
#
# Why type - 1? A label's type, 4 or 8, is a multiple of 4: type % 4 would take it for a separator,
# and type // 4 would give it to the next example.


def role_of(types: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
    """Say what each token is, 0 to 4: `types` (any shape) -> roles of the same shape."""
    return torch.where(types > 0, (types - 1) % 4 + 1, SEPARATOR)


def example_of(types: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
    """Number each token's example from 0, separators -1: `types` (any shape) -> the same shape."""
    return (types - 1) // 4  # rounds down: a separator's (0 - 1) // 4 is -1


def is_label(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark the label tokens: `types` (any shape) -> mask of the same shape.

    Source: PEFT `_cpt_forward`.
    """
    return role_of(types) == LABEL


def is_input(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark the tokens of the input text itself: `types` -> mask of the same shape."""
    return role_of(types) == INPUT


def is_template(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark the tokens of both templates ("format" tokens): `types` -> mask of the same shape."""
    role = role_of(types)
    return (role == INPUT_TEMPLATE) | (role == OUTPUT_TEMPLATE)


def is_updated(types: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Mark what CPT may change, input and templates: `types` -> mask of the same shape.

    Labels and separators never change. Source: paper 3.2.2, PEFT's code.
    """
    return is_input(types) | is_template(types)


def is_unfinished(types: Int[Tensor, "P"]) -> bool:
    """Say whether the last example lacks its label: the largest type is no multiple of 4."""
    return bool(len(types)) and int(types.max()) % 4 != 0


def shift_types(
    prefix_types: Int[Tensor, "P"], types: Int[Tensor, "B T"], strict: bool = True
) -> Int[Tensor, "B T"]:
    """Number a query's types after those of the prefix, in a new tensor (PEFT changes its caller's).

    Raises `MiniCPTError` if the prefix is unfinished: the query's roles would shift by one, and an
    output template would count as a label. `strict=False` lets them shift, as PEFT does.
    """
    largest = int(prefix_types.max()) if len(prefix_types) else 0
    if strict and is_unfinished(prefix_types):
        raise MiniCPTError(
            "cpt_tokens_type_mask ends in an unfinished example: its largest type is "
            f"{largest}, not a multiple of 4, so the roles of everything after it would shift. "
            "Types run 1 (input template), 2 (input), 3 (output template), 4 (label) per example, "
            "+4 for each further one, 0 for separators; give the last example a label."
        )
    return torch.where(types > 0, types + largest, types)

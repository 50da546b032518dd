"""The L2 ball per token: how far CPT may move a context token from where it started (paper 3.2.2).

This is projected gradient descent as in adversarial training: take a step, then pull the delta of
each token back onto its ball.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import MiniCPTError
from .masks import is_input, is_template

# of separators and labels: PEFT's value, small enough to be nothing beside an embedding
FROZEN_RADIUS = 1e-10


def epsilon_scale(unit: str, token_dim: int, mean_norm: float | None = None) -> float:
    """Length of one epsilon: sqrt(D/2048) in the unit "peft", `mean_norm` in "mean_norm".

    `mean_norm` is the mean norm of the model's token embeddings, a unit that means the same in
    every model. The other one is PEFT's (`CPTEmbedding.get_epsilon`).
    """
    if unit == "peft":
        return math.sqrt(token_dim / 2048)
    if unit == "mean_norm" and mean_norm:
        return mean_norm
    raise MiniCPTError(
        f"opt_epsilon_unit must be 'peft' or 'mean_norm' (with a known mean norm), got {unit!r}."
    )


def token_epsilon(
    types: Int[Tensor, "P"], epsilon_input: float, epsilon_format: float, scale: float = 1.0
) -> Float[Tensor, "P"]:
    """Radius of each token's ball (P,): `epsilon_input` for inputs, `epsilon_format` for templates.

    All other tokens get a radius of nearly zero.
    """
    radius = torch.where(is_input(types), epsilon_input * scale, FROZEN_RADIUS)
    return torch.where(is_template(types), epsilon_format * scale, radius)


def shrinkage(norm: Float[Tensor, "*S"], radius: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Factor that brings a norm down to its radius; 1 where it is not larger, also at norm 0."""
    return radius / torch.maximum(norm, radius).clamp(min=torch.finfo(norm.dtype).tiny)


def project(delta: Float[Tensor, "P D"], epsilon: Float[Tensor, "P"]) -> Float[Tensor, "P D"]:
    """Project each row of `delta` (P, D) onto the L2 ball of its radius `epsilon` (P,).

    `delta_i * epsilon_i / max(|delta_i|, epsilon_i)`: rows inside their ball stay as they are.
    Source: paper 3.2.2; PEFT `CPTEmbedding.get_projection`.
    """
    return delta * shrinkage(delta.norm(dim=1), epsilon)[:, None]


def project_together(
    delta: Float[Tensor, "P D"], epsilon: Float[Tensor, "P"]
) -> Float[Tensor, "P D"]:
    """Project the whole of `delta` (P, D) onto one L2 ball; inside it stays as it is.

    Its radius is the norm of `epsilon` (P,): the smallest ball that holds everything `project`
    allows, so that a few tokens may go farther than their own balls if others stay behind.
    Source: the paper's ablation, as quoted; its radius there is not known.
    """
    return delta * shrinkage(delta.norm(), epsilon.norm())

"""The L2 ball per token: how far CPT may move a context token from where it started (paper 3.2.2).

This is projected gradient descent as in adversarial training: step, then pull each token's delta back onto its ball.
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
    """Length of one epsilon: `"peft"` sqrt(D/2048), `"mean_norm"` the model's mean token-embedding norm.

    The second transfers between models; the first is PEFT's (`CPTEmbedding.get_epsilon`).
    """
    if unit == "peft":
        return math.sqrt(token_dim / 2048)
    if unit == "mean_norm" and mean_norm is not None:
        return mean_norm
    raise MiniCPTError(
        f"opt_epsilon_unit must be 'peft' or 'mean_norm' (with a known mean norm), got {unit!r}."
    )


def token_epsilon(
    types: Int[Tensor, "P"], epsilon_input: float, epsilon_format: float, scale: float = 1.0
) -> Float[Tensor, "P"]:
    """Radius of each token's ball, (P,): `epsilon_input` for inputs, `epsilon_format` for templates, else ~0."""
    radius = torch.full(types.shape, FROZEN_RADIUS, device=types.device)
    radius[is_input(types)] = epsilon_input * scale
    radius[is_template(types)] = epsilon_format * scale
    return radius


def project(delta: Float[Tensor, "P D"], epsilon: Float[Tensor, "P"]) -> Float[Tensor, "P D"]:
    """Project each row of `delta` (P, D) onto the L2 ball of radius `epsilon` (P,); rows inside stay as they are.

    Source: paper 3.2.2; PEFT `CPTEmbedding.get_projection`.
    """
    # delta_i * min(1, epsilon_i / |delta_i|)
    norm = delta.norm(dim=1)  # (P,)
    shrink = epsilon / torch.maximum(norm, epsilon).clamp(min=torch.finfo(delta.dtype).tiny)
    return delta * shrink[:, None]


def project_together(
    delta: Float[Tensor, "P D"], epsilon: Float[Tensor, "P"]
) -> Float[Tensor, "P D"]:
    """Project the whole of `delta` (P, D) onto one L2 ball; inside it stays as it is.

    Its radius is the norm of `epsilon` (P,): the smallest ball that holds everything `project` allows, so that a few
    tokens may go farther than their own balls if others stay behind. Source: the paper's ablation, as quoted; its
    radius there is not known.
    """
    # delta * min(1, |epsilon| / |delta|)
    radius, norm = epsilon.norm(), delta.norm()
    return delta * (radius / torch.maximum(norm, radius).clamp(min=torch.finfo(delta.dtype).tiny))

"""The shared prefix: run the P prompt tokens once and let every query continue from their KV cache."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def prefix_cache(model, prefix: Float[Tensor, "1 P D"]):
    """Run the prefix once; the KV cache that comes back holds one row."""
    return model(inputs_embeds=prefix.to(model.dtype), use_cache=True, logits_to_keep=1).past_key_values


def branch(cache, rows: int):
    """Copy a one-row cache to `rows` rows; the original stays as it is, for the next batch."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows)
    return cache

"""One pass of tokens through a frozen model: what goes in, and what of it the head sees.

Masks, labels, roles and weights of the loss stay on the CPU, where the sizes that follow from them are found without
waiting for a GPU; `core.loss.send` takes over to the model's device what the pass itself needs.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache

from ..core.loss import send
from .modules import during_this_call


class Run(NamedTuple):
    """What a pass of T tokens in B rows gives: the picked tokens' `logits` (B, n, V), `hidden` (B, T, D) as the head
    would see it, and `cache`, the keys and values of these tokens and all before them, None if nobody asked for it.
    """

    logits: Tensor
    hidden: Tensor
    cache: Cache | None


def nothing(hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B 0 D"]:
    """Give the head no token to work on."""
    return hidden[:, :0]


def attended(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Send a mask 0/1 to the model's device; one of all ones is none, which spares the model a look at it."""
    return None if mask is None or mask.all() else send(mask, device)


def run(model, embeds, mask=None, cache=None, *, pick=nothing, use_cache=True, **kwargs) -> Run:
    """Run tokens (B, T, D) after those of `cache`, `mask` (B, both) 0/1; the head sees `pick(hidden)` alone."""
    seen = []

    def before_the_head(head, args):
        seen.append(args[0])  # (B, T, D)
        return (pick(args[0]), *args[1:])

    if cache is not None:
        kwargs["past_key_values"] = cache
    kwargs |= {"use_cache": use_cache, "return_dict": True}
    with during_this_call({model.get_output_embeddings(): before_the_head}):
        output = model(inputs_embeds=embeds, attention_mask=attended(mask, embeds.device), **kwargs)
    return Run(output.logits, seen[0], output.get("past_key_values"))


def run_any_tokens(model, n: int = 1, *, pick=nothing, use_cache: bool = False) -> Run:
    """Run n tokens for what the model does besides: its head, its kind of cache. Draws no randomness."""
    weight = model.get_input_embeddings().weight
    # the random state is that of all threads: it is put back only where dropout may draw from it
    draws = any(module.training for module in model.modules())
    with torch.random.fork_rng([weight.device] if weight.is_cuda else [], enabled=draws):
        return run(model, weight.new_zeros(1, n, weight.shape[1]), pick=pick, use_cache=use_cache)


def head(model, hidden: Float[Tensor, "B n D"]) -> Float[Tensor, "B n V"]:
    """Logits of hidden states by the model's own head, caps and scales included."""
    return run_any_tokens(model, pick=lambda _: hidden).logits

"""What a prompted model returns: transformers' output, with logits that cost nothing until somebody reads them."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..engine.prefix import Rows, head, weighted_loss


class PromptedOutput(CausalLMOutputWithPast):
    """transformers' output, but `logits` (B, P+T, V) are computed when they are first read.

    In evaluation, listing the output (`items()`, `to_tuple()`, `output[1]`) reads them. While training it does not:
    accelerate's mixed precision lists every output, and would pay for logits that nobody asked for.
    """

    def defer(self, compute: Callable[[], Tensor], listed: bool) -> "PromptedOutput":
        """Let `compute` give the logits on their first reading, in the modes of now; returns the output itself."""
        self.__dict__.update(_compute=_in_this_mode(compute), _listed=listed)
        return self

    def __getattribute__(self, name):
        if name == "logits" and (compute := self.__dict__.pop("_compute", None)):
            self.logits = compute()
            if "past_key_values" in OrderedDict.keys(self):
                self.move_to_end("past_key_values")  # the order of the fields
        return super().__getattribute__(name)

    def __getitem__(self, key):
        if isinstance(key, str):
            if (value := getattr(self, key, None)) is None:
                raise KeyError(key)
            return value
        return self.loss if key == 0 and self.loss is not None else super().__getitem__(key)


def _reads_logits(name: str):
    method = getattr(CausalLMOutputWithPast, name)

    def reads(self, *args):
        if self.__dict__.get("_listed"):
            self.logits
        return method(self, *args)

    reads.__name__, reads.__doc__ = name, method.__doc__
    return reads


for _name in (
    "keys",
    "values",
    "items",
    "to_tuple",
    "get",
    "__iter__",
    "__len__",
    "__contains__",
    "__eq__",
):
    setattr(PromptedOutput, _name, _reads_logits(_name))


def _in_this_mode(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Compute later as it would be computed now: with gradients or without, under the same autocast."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    devices = [
        (d, torch.get_autocast_dtype(d))
        for d in ("cpu", "cuda", "mps")
        if torch.is_autocast_enabled(d)
    ]

    def later():
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(inference))
            modes.enter_context(torch.set_grad_enabled(grad))
            for device, dtype in devices:
                modes.enter_context(torch.autocast(device, dtype))
            return compute()

    return later


def output_of(
    model, rows: Rows, labels: Tensor | None, weights: Tensor | None, keep, use_cache: bool
) -> PromptedOutput:
    """Run the rows and wrap what comes of it: the loss if there are labels, logits once they are read.

    `keep`: transformers' `logits_to_keep`, the last so many tokens of the whole rows, 0 for all, or their indices.
    """
    kept = slice(-keep, None) if isinstance(keep, int) else keep

    def chosen(hidden):
        return rows.whole(hidden)[:, kept]  # (B, R, D) -> (B, n, D)

    if labels is None and (isinstance(keep, Tensor) or keep):
        result = rows.run(model, chosen, use_cache=use_cache)  # few: at once
        cache = result.cache if use_cache else None
        return PromptedOutput(logits=result.logits, past_key_values=cache)
    if labels is None:
        loss, result = None, rows.run(model, use_cache=use_cache)
    else:
        loss, result = weighted_loss(model, rows, labels, weights, use_cache=use_cache)
    output = PromptedOutput(loss=loss, past_key_values=result.cache if use_cache else None)
    # while training, listing the output does not mean reading its logits
    listed = labels is None or not torch.is_grad_enabled()
    return output.defer(lambda: head(model, chosen(result.hidden)), listed)

"""The shared prefix: P prompt tokens stand before every row of a batch, so run them once and branch.

    prompt (1, P, D) ─ model ─> KV cache of one row ─ expanded over the rows ─ model ─> queries (B, T, D)

Exactly the plain forward of [prompt, query] rows, by a causal model's own definition: no prompt token sees a query.
The head runs where a loss or a score needs it and nowhere else, inside the model's own forward, so that soft-caps and
logit scales stay the model's. With dropout (training mode) the rows share the prefix's mask.
"""

import copy
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..core.loss import IGNORE, token_weights
from ..dropin.outputs import PromptedOutput

# sharing costs a second pass through the layers; below this many saved tokens it does not pay (tests/bench)
WORTH_SHARING = 64


@dataclass
class Prefix:
    """What running P tokens leaves behind: a cache of one row, and `hidden` (1, P, D), as the head would see it.

    A cache that was trained itself (CT-KV) has no hidden states.
    """

    cache: Cache
    hidden: Tensor | None = None

    def branch(self, rows: int) -> Cache:
        """The cache for `rows` rows, sharing its memory; gradients add up, and the original stays as it is."""
        cache = copy.copy(self.cache)
        cache.layers = [
            copy.copy(layer) for layer in cache.layers
        ]  # update() binds new tensors, it writes into none
        for layer in cache.layers:
            if layer.is_initialized:
                layer.keys = layer.keys.expand(rows, -1, -1, -1)
                layer.values = layer.values.expand(rows, -1, -1, -1)
        return cache


def nothing(hidden: Tensor) -> Tensor:
    """Give the head no token to work on."""
    return hidden[:, :0]


def tokens_of(prompt: Tensor | Prefix) -> int:
    """P, of embeddings (1, P, D) or of a prefix that has been run."""
    return prompt.shape[1] if isinstance(prompt, Tensor) else prompt.cache.get_seq_length()


def run(model, embeds, mask=None, cache=None, pick=nothing, use_cache=True, **kwargs):
    """Run tokens (B, T, D) after `cache`; the head sees `pick(hidden)` only. Returns (its logits, hidden, cache)."""
    seen = []

    def before_the_head(module, args):
        seen.append(args[0])
        return (pick(args[0]), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(before_the_head)
    try:
        kwargs |= {} if cache is None else {"past_key_values": cache}
        output = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
    finally:
        hook.remove()
    return output.logits, seen[0], output.get("past_key_values")


def run_on_any_token(model, pick=nothing, use_cache=False):
    """Run one token for what the model does besides: its head on `pick(...)`, its kind of cache. Draws no randomness."""
    weight = model.get_input_embeddings().weight
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        token = torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
        return run(model, token, pick=pick, use_cache=use_cache)


_LAYERS: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # model -> layers of its cache after one token


def obstacle(model) -> str | None:
    """Why a prefix cannot be shared on this model; None if it can."""
    if model.training and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        return "gradient checkpointing is on, and transformers then keeps no cache"
    config = model.config.get_text_config()
    if "dynamic" in (rope := str(getattr(config, "rope_parameters", None))) or "longrope" in rope:
        return "its rotary frequencies depend on the length of the whole sequence"
    if model not in _LAYERS:
        with torch.no_grad():
            _, _, cache = run_on_any_token(model, use_cache=True)
        _LAYERS[model] = cache.layers if isinstance(cache, Cache) else None
    layers = _LAYERS[model]  # a sliding window forgets only what no later token may attend to
    if layers is None or not all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    ):
        return "what it remembers is not a cache of keys and values"
    return None


class KeptPrefix:
    """The last prefix that was run, kept between calls until anything that it came from changes.

    Seen are: the prompt's values and mask, the identity and version of every weight and buffer, dtype, device,
    autocast. A change that goes behind torch's back (`weight.data.mul_(2)`) cannot be seen; then call `clear()`.
    """

    def __init__(self):
        self.clear()

    def __reduce__(self):  # a copy of a model keeps its own
        return KeptPrefix, ()

    def clear(self) -> None:
        """Forget the prefix."""
        self._of, self._prefix = None, None

    @torch.no_grad()
    def get(self, model, prompt: Float[Tensor, "1 P D"], mask: Tensor | None) -> Prefix:
        """The prefix of this prompt on this model as it is now, run only if the kept one is another's."""
        mask = None if mask is None or mask.all() else mask.long()
        of = self._origin(model, prompt, mask)
        if self._of is None or not self._same(of):
            self.clear()  # first, so that two caches never need room at once
            _, hidden, cache = run(model, prompt, mask)
            self._of, self._prefix = of, Prefix(cache, hidden)
        return self._prefix

    @staticmethod
    def _origin(model, prompt, mask) -> tuple[list, tuple]:
        """What a prefix comes from: objects and numbers to compare one by one, and tensors to compare by value."""
        seen: list = [
            weakref.ref(model)
        ]  # a new reference to the same object is the old one, so `is` will do
        for w in (*model.parameters(), *model.buffers()):
            # the storage's reference keeps its address from being used again, so equal means: the same memory
            seen += [
                weakref.ref(w),
                StorageWeakRef(w.untyped_storage()),
                -1 if w.is_inference() else w._version,
            ]
        device = prompt.device.type
        seen += [
            prompt.dtype,
            prompt.device,
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
        ]
        return seen, (prompt.clone(), mask)

    def _same(self, of: tuple[list, tuple]) -> bool:
        (seen, (prompt, mask)), (seen_now, (prompt_now, mask_now)) = self._of, of
        return (
            len(seen) == len(seen_now)
            and all(
                a is b if isinstance(a, weakref.ref) else a == b for a, b in zip(seen, seen_now)
            )
            and torch.equal(prompt, prompt_now)
            and (
                mask is mask_now
                if mask is None or mask_now is None
                else torch.equal(mask, mask_now)
            )
        )


def start(
    model,
    prompt: Tensor | Prefix | None,
    queries: Tensor,
    mask: Tensor | None,
    kept: KeptPrefix | None = None,
    share: bool = True,
) -> tuple[Prefix | None, Tensor]:
    """Decide what the rows share, and run it: prompt (1, P, D), queries (B, T, D) -> prefix and the rest (B, R, D).

    With `kept` and without gradients the prefix is the prompt, run once and kept. Otherwise it is the prompt and the
    tokens that all queries begin with (the fixed context of IPT). Where one pass over whole rows is the cheaper way,
    or the model cannot share, there is no prefix and the rest is [prompt, query].
    """
    B, T = queries.shape[:2]
    if prompt is None or isinstance(prompt, Prefix):
        return prompt, queries
    P, common = prompt.shape[1], 0
    if share and kept is not None and not torch.is_grad_enabled() and not model.training:
        return kept.get(model, prompt, None if mask is None else mask[:1, :P]), queries
    if not queries.requires_grad and B > 1:
        same = (queries == queries[:1]).all(-1).all(0)
        if mask is not None:
            same &= (mask[:, P:] == 1).all(0)
        common = min(int(same.long().cumprod(0).sum()), T - 1)  # every row keeps a token of its own
    n = P + common
    if not share or B == 1 or (B - 1) * n < WORTH_SHARING:
        return None, torch.cat((prompt.expand(B, -1, -1), queries), dim=1)
    shared = torch.cat((prompt, queries[:1, :common]), dim=1)
    _, hidden, cache = run(model, shared, None if mask is None else mask[:1, :n])
    return Prefix(cache, hidden), queries[:, common:]


def prompted(
    model,
    prompt: Float[Tensor, "1 P D"] | Prefix,
    queries: Float[Tensor, "B T D"],
    mask: Tensor | None = None,
    labels: Int[Tensor, "B S"] | None = None,
    weights: Float[Tensor, "B S-1"] | None = None,
    keep: int | Tensor = 0,
    kept: KeptPrefix | None = None,
    share: bool = True,
    use_cache: bool = True,
) -> PromptedOutput:
    """Run [prompt, query] for every row, S = P+T tokens, the prompt once.

    `mask` (B, S) 0/1; `labels` (B, S) and `weights` (B, S-1) give the loss: the sum over s of weights[b, s] times
    the cross-entropy of labels[b, s+1] after s (`loss.token_weights`). `keep`: transformers' `logits_to_keep`.
    `kept`: where evaluation keeps the prefix; `share=False`: one pass over whole rows.
    """
    B, S = len(queries), tokens_of(prompt) + queries.shape[1]
    prefix, rest = start(model, prompt, queries, mask, kept, share)
    P = S - rest.shape[1]
    all_of_them = isinstance(keep, int) and keep == 0

    def whole(hidden):
        full = (
            hidden
            if prefix is None
            else torch.cat((prefix.hidden.expand(B, -1, -1), hidden), dim=1)
        )
        return full if all_of_them else full[:, -keep:] if isinstance(keep, int) else full[:, keep]

    def at_labels(hidden):
        # the context's labels once, for all rows; the queries' each
        own = hidden[rows.to(hidden.device), columns.to(hidden.device)]
        return (
            torch.cat((prefix.hidden[0, shared.to(hidden.device)], own)) if len(shared) else own
        )[None]

    if labels is not None:
        counted = weights != 0
        shared, (rows, columns) = (
            counted[:, :P].any(0).nonzero()[:, 0],
            counted[:, P:].nonzero(as_tuple=True),
        )
        pick = at_labels
    else:
        pick = nothing if all_of_them else whole
    cache = None if prefix is None else prefix.branch(B)
    logits, hidden, cache = run(model, rest, mask, cache, pick, use_cache or prefix is not None)
    output = PromptedOutput(past_key_values=cache if use_cache else None)
    if pick is whole:
        output.logits = logits
        return output
    if labels is not None:
        log_p = logits[0].float().log_softmax(-1)
        targets, weights = labels[:, 1:].to(log_p.device), weights.to(log_p.device)
        n = len(shared)
        at_shared = log_p[:n].gather(
            1, targets[:, shared].T.clamp(min=0)
        )  # (n, B); an ignored one weighs 0
        at_own = log_p[n:].gather(1, targets[rows, P + columns][:, None])[:, 0]
        output.loss = (
            -(at_shared * weights[:, shared].T).sum() - (at_own * weights[rows, P + columns]).sum()
        )
    # while training, listing the output does not mean reading its logits
    listed = labels is None or not torch.is_grad_enabled()
    return output.defer(lambda: run_on_any_token(model, lambda _: whole(hidden))[0], listed)


def loss_after(
    model,
    prompt: Float[Tensor, "1 P D"] | Prefix,
    ids: Int[Tensor, "B T"],
    mask: Int[Tensor, "B T"],
    types: Int[Tensor, "B T"],
    labels: Int[Tensor, "B T"],
    share: bool = True,
    seen: Tensor | None = None,
) -> Float[Tensor, ""]:
    """Label loss of the rows after a prompt that has no labels of its own (paper's "sum", averaged over rows).

    `seen` (B, P): which prompt tokens each row may attend to, by default all; where rows differ in that, and the prompt
    has yet to be run, they cannot share it (`share=False`).
    """
    before = (tokens_of(prompt), 0)
    types, labels = F.pad(types, before), F.pad(labels, before, value=IGNORE)
    mask = F.pad(mask, before, value=1) if seen is None else torch.cat((seen.to(mask), mask), dim=1)
    weights = token_weights(labels[:, 1:], types[:, 1:], reduction="sum")
    queries = model.get_input_embeddings()(ids)
    prompt = prompt.to(queries.dtype) if isinstance(prompt, Tensor) else prompt
    return prompted(
        model, prompt, queries, mask, labels, weights, share=share, use_cache=False
    ).loss

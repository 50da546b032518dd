"""The shared prefix: P prompt tokens stand before every row of a batch, so run them once and branch.

    prompt (1, P, D) ─ model ─> KV cache of one row ─ expanded over the rows ─ model ─> queries (B, T, D)

Exactly the plain forward of [prompt, query] rows, by a causal model's own definition: no prompt token sees a query.
The head runs where a loss or a score needs it and nowhere else, inside the model's own forward, so that soft-caps and
logit scales stay the model's. With dropout (training mode) the rows share the prefix's mask.
The *prompt* stands before every query; the *prefix* is what rows share, already run; a row's *rest* comes after it.
"""

import copy
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..core.loss import IGNORE, send, token_weights
from ..errors import MiniCPTError
from .modules import found_once, is_hooked, state_of
from .passes import Run, head, nothing, run, run_any_tokens

WORTH_SHARING = 64  # tokens saved; below, a second pass through the layers does not pay


FEW = 4  # tokens: IAPT wants more than a BOS


@found_once
def _cache_layers(model) -> list | None:
    cache = run_any_tokens(model, FEW, use_cache=True).cache
    # a class of its own (MiniMax) may keep more than its layers say
    return cache.layers if type(cache) is DynamicCache else None


def why_not_shared(model) -> str | None:
    """Say why this model cannot share a prefix, None if it can; a model's first call runs a few tokens."""
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return "gradient checkpointing is on, and transformers then keeps no cache"
    rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    if "dynamic" in rope or "longrope" in rope:
        return "its rotary frequencies depend on the length of the whole sequence"
    if is_hooked(model):
        return "a forward hook hangs in it, which may need to see whole rows"
    layers = _cache_layers(model)
    # a sliding window forgets only what no later token may attend to
    if layers is None or not {*map(type, layers)} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return "what it remembers is not a cache of keys and values"
    return None


def tokens_remembered(model) -> float:
    """Count the tokens of text that the model's cache holds before a sliding window drops the first; inf without."""
    # a window of w keeps w - 1 tokens, among them what the model puts before the text (IAPT)
    layers = [x for x in _cache_layers(model) or [] if x.is_sliding]
    room = [x.sliding_window - 1 - (x.get_seq_length() - FEW) for x in layers]
    return float(min(room, default=torch.inf))


@dataclass
class Prefix:
    """What running P tokens leaves: `cache`, and `hidden` (1, P, D) as the head would see it; None, a trained cache."""

    cache: Cache
    hidden: Tensor | None = None

    def branch(self, copies: int) -> Cache:
        """Repeat each row `copies` times, in a new cache; copies of a single row share its memory, gradients add up."""
        cache = copy.copy(self.cache)
        # update() binds new tensors, it writes into none
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in cache.layers:
            if layer.is_initialized:
                layer.keys = _repeat(layer.keys, copies)
                layer.values = _repeat(layer.values, copies)
        return cache

    def states(self) -> Float[Tensor, "1 P D"]:
        """The hidden states; raises `MiniCPTError` if there are none."""
        if self.hidden is None:
            raise MiniCPTError(
                "A label stands right after a prefix without hidden states (a trained cache): nothing predicts it. "
                "Use a template with words before the label, or a BOS token."
            )
        return self.hidden


def _repeat(x: Tensor, copies: int) -> Tensor:
    """(B, heads, S, d) -> (B * copies, heads, S, d); a view if B is 1."""
    return x[:, None].expand(-1, copies, -1, -1, -1).flatten(0, 1)


def tokens_of(prompt: Tensor | Prefix) -> int:
    """P, of embeddings (1, P, D) or of a prefix that has been run."""
    return prompt.shape[1] if isinstance(prompt, Tensor) else prompt.cache.get_seq_length()


class KeptPrefix:
    """The last prefix that was run, kept between calls, of any thread, until anything that it came from changes.

    That is the prompt's values and mask, and the model's `state_of`; for what this cannot see there is `clear()`.
    """

    def __init__(self):
        self._lock = threading.RLock()
        self.clear()

    def __reduce__(self):  # a copy of a model keeps its own
        return KeptPrefix, ()

    def clear(self) -> None:
        """Forget the prefix."""
        with self._lock:
            self._kept = None

    @torch.no_grad()
    def get(self, model, prompt: Float[Tensor, "1 P D"], mask: Tensor | None) -> Prefix:
        """The prefix of this prompt on this model as it is now, run only if the kept one is another's."""
        mask = None if mask is None or mask.all() else mask.cpu().long()
        inputs = [prompt.clone()] if mask is None else [prompt.clone(), mask]
        device = prompt.device.type
        modes = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        modes += (prompt.dtype, prompt.device, len(inputs), torch.get_float32_matmul_precision())
        with self._lock:
            state, references = state_of(model)
            now = [*modes, *state]
            if (
                self._kept is None
                or self._kept[0] != now
                or not all(map(torch.equal, self._kept[2], inputs))
            ):
                self.clear()  # first, so that two caches never need room at once
                result = run(model, prompt, mask)
                self._kept = now, references, inputs, Prefix(result.cache, result.hidden)
            return self._kept[3]


@dataclass(frozen=True)
class Rows:
    """B rows [prompt, query] of S tokens, cut where they part: a shared `prefix`, and of each its `rest` (B, R, D).

    Where rows share nothing there is no prefix, and R = S. `mask` (B, S) 0/1, None for all ones; `positions` (B, S).
    """

    prefix: Prefix | None
    rest: Float[Tensor, "B R D"]
    mask: Tensor | None
    positions: Tensor | None = None  # the model's own

    def run(self, model, pick=nothing, *, use_cache: bool = True, **kwargs) -> Run:
        """Run the rests; `pick` and the result's `hidden` are about them alone: (B, R, D)."""
        if self.positions is not None:
            kwargs["position_ids"] = send(
                self.positions[:, -self.rest.shape[1] :], self.rest.device
            )
        if self.prefix is None:
            return run(model, self.rest, self.mask, pick=pick, use_cache=use_cache, **kwargs)
        cache = self.prefix.branch(len(self.rest))
        if self.rest.shape[1]:
            return run(model, self.rest, self.mask, cache, pick=pick, **kwargs)
        return Run(head(model, pick(self.rest)), self.rest, cache)  # nothing is left to run

    def whole(self, hidden: Float[Tensor, "B R D"]) -> Float[Tensor, "B S D"]:
        """Put the prefix's hidden states before those of the rests."""
        if self.prefix is None:
            return hidden
        before = self.prefix.states().expand(len(hidden), -1, -1)  # (B, P, D)
        return torch.cat((before, hidden), dim=1)


def rows_of_prompt(
    model,
    prompt: Float[Tensor, "1 P D"] | Prefix | None,
    queries: Float[Tensor, "B T D"],
    mask: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    kept: KeptPrefix | None = None,
    share: bool = True,
) -> Rows:
    """Put the prompt before every query, `mask` (B, P+T) 0/1; decide what the rows share, and run that.

    `ids` (B, T), on the CPU, say how the queries begin; without them their embeddings are looked at. With `kept` and
    without gradients that is the prompt, run once and kept; otherwise the prompt and what all queries begin with (IPT's
    fixed context), or nothing where whole rows are cheaper or the model cannot share (`share=False`).
    """
    if prompt is None or isinstance(prompt, Prefix):
        return Rows(prompt, queries, mask)
    prompt = prompt.to(queries.dtype)
    (B, T), P, common = queries.shape[:2], prompt.shape[1], 0
    if share and kept is not None and not torch.is_grad_enabled() and not model.training:
        return Rows(kept.get(model, prompt, None if mask is None else mask[:1, :P]), queries, mask)
    if not queries.requires_grad and B > 1:
        told = queries if ids is None else ids[..., None]
        same = (told == told[:1]).all(-1).all(0).cpu()  # (T,)
        if mask is not None:
            same &= (mask[:, P:] == 1).all(0)
        common = min(int(same.long().cumprod(0).sum()), T - 1)  # every row keeps a token of its own
    n = P + common
    if not share or B == 1 or (B - 1) * n < WORTH_SHARING:
        rest = torch.cat((prompt.expand(B, -1, -1), queries), dim=1)  # (B, P+T, D)
        return Rows(None, rest, mask)
    shared = torch.cat((prompt, queries[:1, :common]), dim=1)  # (1, n, D)
    result = run(model, shared, None if mask is None else mask[:1, :n])
    return Rows(Prefix(result.cache, result.hidden), queries[:, common:], mask)


def weighted_loss(
    model,
    rows: Rows,
    labels: Int[Tensor, "B S"],
    weights: Float[Tensor, "B S-1"],
    *,
    use_cache: bool = False,
) -> tuple[Float[Tensor, ""], Run]:
    """Run the rows for their loss, the sum of weights[b, s] * CE(labels[b, s+1] after token s) (`loss.token_weights`).

    The head sees each token that counts once: the context's for all rows together, the queries' for each row.
    """
    P = labels.shape[1] - rows.rest.shape[1]
    counted = weights != 0  # (B, S-1)
    shared = counted[:, :P].any(0).nonzero()[:, 0]  # (n,) of the prefix, counted in some row
    row, column = counted[:, P:].nonzero(as_tuple=True)  # (m,) and (m,), of the rests

    def at_labels(hidden):
        device = hidden.device
        own = hidden[send(row, device), send(column, device)]  # (B, R, D) -> (m, D)
        if len(shared):
            own = torch.cat((rows.prefix.states()[0, send(shared, device)], own))  # (n+m, D)
        return own[None]

    result = rows.run(model, at_labels, use_cache=use_cache)
    log_p = result.logits[0].float().log_softmax(-1)  # (n+m, V)
    n, own, device = len(shared), (row, P + column), log_p.device
    # an ignored label (-100) weighs 0, whatever stands there
    targets = labels[:, 1:].clamp(min=0)
    at_shared = log_p[:n].gather(1, send(targets[:, shared].T, device))  # (n, B)
    at_own = log_p[n:].gather(1, send(targets[own][:, None], device))[:, 0]  # (m,)
    loss = -(at_shared * send(weights[:, shared].T, device)).sum()
    return loss - (at_own * send(weights[own], device)).sum(), result


def loss_after(
    model,
    prompt: Float[Tensor, "1 P D"] | Prefix,
    ids: Int[Tensor, "B T"],
    mask: Int[Tensor, "B T"],
    types: Int[Tensor, "B T"],
    labels: Int[Tensor, "B T"],
    *,
    share: bool = True,
    seen: Tensor | None = None,
) -> Float[Tensor, ""]:
    """Label loss of the rows after a prompt that has no labels of its own (paper's "sum", averaged over rows).

    `seen` (B, P): which prompt tokens each row may attend to, by default all; where rows differ in that, and the prompt
    has yet to be run, they cannot share it (`share=False`).
    """
    ids, mask, types, labels = (x.cpu() for x in (ids, mask, types, labels))
    before = (tokens_of(prompt), 0)  # (B, T) -> (B, P+T)
    types, labels = F.pad(types, before), F.pad(labels, before, value=IGNORE)
    mask = F.pad(mask, before, value=1) if seen is None else torch.cat((seen.to(mask), mask), dim=1)
    weights = token_weights(labels[:, 1:], types[:, 1:], reduction="sum")
    queries = model.get_input_embeddings()(send(ids, model.device))  # (B, T, D)
    rows = rows_of_prompt(model, prompt, queries, mask, ids=ids, share=share)
    return weighted_loss(model, rows, labels, weights)[0]

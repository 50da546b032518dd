"""Label scores without generation: log-probability of each candidate label after each query, raw and calibrated.

[query, beginnings of labels] (B, T) ─ model ─> every token of every label, where the model takes `trees`; else

query (B, T) ─ model ─> first token of every label
         └─ its KV cache, once for each beginning (a label without its last token) ─ model ─> the other tokens
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from ..core.loss import send
from ..core.masks import LABEL
from ..core.templates import Encoded, collate
from ..errors import MiniCPTError, unknown
from .modules import sharing_weights
from .prefix import (
    WORTH_SHARING,
    KeptPrefix,
    Prefix,
    rows_of_prompt,
    run,
    tokens_of,
    tokens_remembered,
    why_not_shared,
)
from .trees import takes_trees, tree_mask

CONTENT_FREE = ("N/A", "", "[MASK]")  # Zhao et al. 2021
LABEL_SCORES = ("sum", "mean", "first")


@runtime_checkable
class ReadsRoles(Protocol):
    """A model that must know where the answer begins (IAPT): it turns types into arguments of its `forward`."""

    def role_arguments(self, types: Int[Tensor, "B T"]) -> dict[str, Tensor]: ...


def check_candidates(candidates: dict[str, list[int]], how: str = "sum") -> None:
    """Raise `MiniCPTError` if a label has no token, or two labels could not be told apart by the tokens that count."""
    if how not in LABEL_SCORES:
        raise unknown("label score", how, LABEL_SCORES)
    seen: dict[tuple, str] = {}
    for label, ids in candidates.items():
        if not ids:
            raise MiniCPTError(
                f"The label word {label!r} has no token; choose a word that the tokenizer knows."
            )
        counted = tuple(ids[:1] if how == "first" else ids)
        if counted in seen:
            same = "the same first token" if how == "first" else "the same tokens"
            remedy = ", or the label score 'sum'" if how == "first" else ""
            raise MiniCPTError(
                f"The label words {seen[counted]!r} and {label!r} have {same} {list(counted)}; choose different words"
                f"{remedy}."
            )
        seen[counted] = label


def label_scores(
    model,
    prefix: Float[Tensor, "1 P D"] | Prefix | None,
    queries: Sequence[Encoded],
    candidates: Sequence[list[int]],
    how: str = "sum",
    batch_size: int = 64,
    kept: KeptPrefix | None = None,
    seen: Tensor | None = None,
) -> Float[Tensor, "N C"]:
    """Log-score of every candidate label (C lists of ids) after every query (N), as (N, C) on the CPU.

    `how`: "mean" over the label's tokens, "sum" (the label's log-probability), or "first" token only (the authors'
    demo). The other arguments and the errors: see `label_token_scores`.
    """
    check_candidates({f"candidate {c}": ids for c, ids in enumerate(candidates)}, how)
    tokens = label_token_scores(model, prefix, queries, candidates, batch_size, kept, seen)
    return reduce_tokens(tokens, how)


def reduce_tokens(tokens: Sequence[Float[Tensor, "N _"]], how: str) -> Float[Tensor, "N C"]:
    """One score a label from those of its tokens: C tensors (N, tokens of the label) -> (N, C)."""
    reduce = {"mean": lambda t: t.mean(1), "sum": lambda t: t.sum(1), "first": lambda t: t[:, 0]}
    if how not in reduce:
        raise unknown("label score", how, LABEL_SCORES)
    return torch.stack([reduce[how](t) for t in tokens], dim=1)


@torch.no_grad()
def label_token_scores(
    model,
    prefix: Float[Tensor, "1 P D"] | Prefix | None,
    queries: Sequence[Encoded],
    candidates: Sequence[list[int]],
    batch_size: int = 64,
    kept: KeptPrefix | None = None,
    seen: Tensor | None = None,
) -> list[Float[Tensor, "N _"]]:
    """Log-probability of each token of each candidate label after query and earlier tokens: per label (N, tokens).

    `prefix` comes before every query: embeddings, which are run once, or not at all if `kept` from an earlier call, or
    a prefix that has been run (CT-KV's); zeros of `seen` (P,) hide tokens of it. Each query is run once: with the
    beginnings of labels of several tokens in its row (`trees`), or they go on from its cache. A model that can do
    neither runs [query, beginning] anew for each. A query's scores do not depend on the other rows of its batch. A
    query without tokens is scored right after the prefix. All is run in evaluation mode.
    Raises `MiniCPTError` if there is nothing before such a query, and for scores that are not finite.
    """
    if any(module.training for module in model.modules()):
        model = sharing_weights(model).eval()  # another thread may be training this one
    P = 0 if prefix is None else tokens_of(prefix)
    _check_empty(prefix, P, queries)
    beginnings = sorted({tuple(ids[:-1]) for ids in candidates})
    nodes = sorted({beginning for ids in candidates for beginning in _steps_to(ids[:-1])})
    share = (P > 0 or len(nodes) > 0) and why_not_shared(model) is None
    seen = torch.ones(P) if seen is None else seen
    branch = share and len(nodes) > 0 and bool(seen.all())
    longest = P + max(map(len, queries), default=0) + max(map(len, candidates))
    tree = branch and longest <= tokens_remembered(model) + 1 and takes_trees(model)
    branch &= not tree
    # no more than the eight log-softmaxes a row that `memory` reckons with
    size = min(batch_size, -(-8 * batch_size // (1 + len(nodes))))
    # on a GPU a pass costs more than padding; a branch needs rows without any
    padding = 0 if branch else WORTH_SHARING if model.device.type == "cpu" else torch.inf
    kept, lengths = kept or KeptPrefix(), [*map(len, candidates)]
    scores = torch.empty(len(queries), sum(lengths), device=model.device)  # read once, at the end

    def write(batch: list[int], after: list[tuple], log_p: Tensor) -> None:
        """Enter log_p (B, n, V): of the tokens after each of n beginnings."""
        numbers = send(torch.tensor(batch), model.device)
        for of_label, ids in zip(scores.split(lengths, dim=1), candidates):
            for i, beginning in enumerate([(), *_steps_to(ids[:-1])]):
                if beginning in after:
                    found = log_p[:, after.index(beginning), ids[i]]
                    of_label[numbers, i] = found.to(model.device)

    for steps in [nodes] if tree else [[]] if branch else map(_steps_to, beginnings):
        for batch in batches(queries, size, padding):
            rows = [queries[n] for n in batch]
            log_p, cache = _run_queries(
                model,
                prefix,
                rows,
                steps,
                kept=kept,
                seen=seen,
                share=share,
                tree=tree,
                use_cache=branch,
            )
            write(batch, [(), *steps], log_p)
            if branch:
                tails = list(filter(None, beginnings))
                for tail, log_p in _run_beginnings(model, cache, tails, batch_size, len(batch)):
                    write(batch, _steps_to(tail), log_p)
    scores = scores.cpu()
    if not scores.isfinite().all():
        raise MiniCPTError(
            f"The model computes in {str(model.dtype).removeprefix('torch.')} and gave scores that are not finite. "
            "Load it in float32 or bfloat16 (--dtype). If that is what it is in, its weights or the prompt are not "
            "finite: load them, or train, again."
        )
    return [part.contiguous() for part in scores.split(lengths, dim=1)]


def _check_empty(prefix: Tensor | Prefix | None, P: int, queries: Sequence[Encoded]) -> None:
    if P and (isinstance(prefix, Tensor) or prefix.hidden is not None):
        return  # the prefix's last token predicts the label
    for n, query in enumerate(queries):
        if not len(query):
            raise MiniCPTError(
                f"Query {n} has no token, and nothing before it from which a label could be predicted. Use a template "
                "with words in it, or let the prompt begin with the tokenizer's BOS token."
            )


def _label(ids: Sequence[int]) -> Encoded:
    return Encoded(list(ids), [LABEL] * len(ids))


def _steps_to(beginning: Sequence[int]) -> list[tuple]:
    """(1, 2, 3) -> [(1,), (1, 2), (1, 2, 3)]"""
    return [tuple(beginning[: i + 1]) for i in range(len(beginning))]


def batches(queries: Sequence[Encoded], size: int, most: int | float) -> Iterator[list[int]]:
    """Numbers of queries, shortest first, at most `size` together, with at most `most` tokens of padding."""
    batch, tokens = [], 0
    for n in sorted(range(len(queries)), key=lambda n: len(queries[n])):
        length = len(queries[n])
        if len(batch) == size or length * len(batch) - tokens > most:
            yield batch
            batch, tokens = [], 0
        batch.append(n)
        tokens += length
    if batch:
        yield batch


def _run_queries(
    model,
    prefix,
    queries: list[Encoded],
    nodes: list[tuple],
    *,
    kept: KeptPrefix,
    seen: Tensor,
    share: bool,
    tree: bool,
    use_cache: bool,
) -> tuple[Float[Tensor, "B n V"], Cache | None]:
    """Run queries and, as a tree or one behind the other, the last token of each node (a label's beginning):
    log-probabilities after the query and after each node, n in all.
    """
    P, B, n_label = len(seen), len(queries), len(nodes)
    encoded = [query + _label([node[-1] for node in nodes]) for query in queries]
    ids, mask, types = collate(encoded)  # (B, T), padding last
    mask = torch.cat((seen.to(mask).expand(B, -1), mask), dim=1)  # (B, P+T)
    embeds = model.get_input_embeddings()(send(ids, model.device))  # (B, T, D)
    rows = rows_of_prompt(model, prefix, embeds, mask, ids=ids, kept=kept, share=share)
    if tree:
        tree_rows, places = tree_mask(list(map(len, queries)), nodes, P, embeds.dtype)
        rows = replace(rows, mask=tree_rows, positions=places)
    before = rows.rest.shape[1] - ids.shape[1]  # P if the rests hold the prompt, else 0
    ends = torch.tensor([before + len(row) for row in encoded])
    columns = ends[:, None] - n_label - 1 + torch.arange(n_label + 1)  # (B, n), of the rests

    def before_and_after_each(hidden):
        at = columns
        if at.min() < 0:  # a query without tokens: the label comes right after the prefix
            hidden, at = rows.whole(hidden), at + P
        every = torch.arange(B, device=hidden.device)[:, None]
        return hidden[every, send(at, hidden.device)].flatten(0, 1)[
            None
        ]  # (B, R, D) -> (1, B*n, D)

    # IAPT: what it reads ends where the label begins
    roles = model.role_arguments(types) if isinstance(model, ReadsRoles) else {}
    result = rows.run(model, before_and_after_each, use_cache=use_cache, **roles)
    return result.logits[0].float().log_softmax(-1).unflatten(0, (B, -1)), result.cache


def _run_beginnings(
    model, cache: Cache, beginnings: list[tuple], batch_size: int, g: int
) -> Iterator[tuple[tuple, Float[Tensor, "g n V"]]]:
    """Run the beginnings of labels after each of g queries of one length: a beginning of n tokens, log-probabilities.

    Nothing is padded before a beginning, so positions and masks are those of the plain row on any model.
    """
    size = max(1, batch_size // g)
    for i in range(0, len(beginnings), size):
        chunk = beginnings[i : i + size]
        ids = send(collate([_label(ids) for ids in chunk])[0], model.device)  # (c, m)
        embeds = model.get_input_embeddings()(ids).repeat(g, 1, 1)  # (g*c, m, D)
        branched = Prefix(cache).branch(len(chunk))
        logits = run(model, embeds, cache=branched, pick=lambda hidden: hidden).logits
        log_p = logits.float().log_softmax(-1).unflatten(0, (g, -1))  # (g, c, m, V)
        for c, beginning in enumerate(chunk):
            yield beginning, log_p[:, c, : len(beginning)]


def calibrate(
    scores: Float[Tensor, "N C"], content_free: Float[Tensor, "M C"]
) -> Float[Tensor, "N C"]:
    """Contextual calibration (Zhao et al. 2021): divide by the labels' mean probability after content-free inputs.

    `scores` (N, C) and `content_free` (M, C) are log-scores; the result is log-scores too.
    """
    prior = content_free.softmax(-1).mean(0).log()  # (C)
    # of labels so improbable that float32 has no such number: the same, in logarithms
    small = content_free.log_softmax(-1).logsumexp(0) - math.log(len(content_free))
    prior = torch.where(prior > -80, prior, small)
    return scores.log_softmax(-1) - prior


def accuracy(scores: Float[Tensor, "N C"], truth: Sequence[int]) -> float:
    """Share of the rows whose best score is the true class."""
    return (scores.argmax(-1) == torch.tensor(truth)).float().mean().item()

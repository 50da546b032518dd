"""Label scores without generation: log-probability of each candidate label after each query, raw and calibrated."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.masks import LABEL
from ..core.templates import Encoded, collate
from ..errors import MiniCPTError, unknown
from .prefix import KeptPrefix, Prefix, obstacle, run, start, tokens_of

CONTENT_FREE = ("N/A", "", "[MASK]")  # Zhao et al. 2021
LABEL_SCORES = ("mean", "sum", "first")


def check_candidates(candidates: dict[str, list[int]]) -> None:
    """Raise `MiniCPTError` if a label has no token, or two labels have the same ones and could not be told apart."""
    seen: dict[tuple, str] = {}
    for label, ids in candidates.items():
        if not ids:
            raise MiniCPTError(
                f"The label word {label!r} has no token; choose a word that the tokenizer knows."
            )
        if tuple(ids) in seen:
            raise MiniCPTError(
                f"The label words {seen[tuple(ids)]!r} and {label!r} have the same tokens {ids}; choose different words."
            )
        seen[tuple(ids)] = label


@torch.no_grad()
def label_scores(
    model,
    prefix: Float[Tensor, "1 P D"] | Prefix | None,
    queries: Sequence[Encoded],
    candidates: Sequence[list[int]],
    how: str = "mean",
    batch_size: int = 64,
    kept: KeptPrefix | None = None,
) -> Float[Tensor, "N C"]:
    """Log-probability of every candidate label (C lists of ids) after every query (N), as (N, C) on the CPU.

    `how`: "mean" over the label's tokens (so that long labels are not at a disadvantage), "sum", or "first" token only
    (the authors' demo). `prefix` comes before every query: embeddings, which are run once, or not at all if `kept`
    from an earlier call, or a prefix that has been run (CT-KV's). A query's scores do not depend on the other rows of
    its batch.
    """
    if how not in LABEL_SCORES:
        raise unknown("label score", how, LABEL_SCORES)
    # candidates that differ in their last token only share a row: one row a query if all labels are one token long
    tails = sorted({tuple(c[:-1]) for c in candidates})
    rows = [
        (n, tail, q + Encoded(list(tail), [LABEL] * len(tail)))
        for n, q in enumerate(queries)
        for tail in tails
    ]
    rows.sort(key=lambda row: len(row[2]))  # batches of like length waste less padding
    P = 0 if prefix is None else tokens_of(prefix)
    share, kept = P and not obstacle(model), kept or KeptPrefix()
    scores = torch.empty(len(queries), len(candidates))
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        ids, mask, types = collate([row for _, _, row in batch])
        mask = torch.cat((torch.ones(len(batch), P, dtype=mask.dtype), mask), dim=1).to(
            model.device
        )
        embeds = model.get_input_embeddings()(ids.to(model.device))
        prompt = prefix.to(embeds.dtype) if isinstance(prefix, Tensor) else prefix
        shared, rest = start(model, prompt, embeds, mask, kept, share)
        # the head runs where a row has a label token to predict, nowhere else
        before = rest.shape[1] - ids.shape[1]  # P if the rows hold the prompt, else 0
        at = [
            (i, before + len(row) - 1 - t)
            for i, (_, tail, row) in enumerate(batch)
            for t in range(len(tail), -1, -1)
        ]
        where = tuple(map(torch.tensor, zip(*at)))
        cache = shared.branch(len(batch)) if shared else None
        # IAPT: what it reads ends where the label begins
        roles = (
            {"input_type_mask": types.to(model.device)}
            if getattr(model, "reads_roles", False)
            else {}
        )
        logits, _, _ = run(
            model, rest, mask, cache, lambda hidden: hidden[where][None], bool(shared), **roles
        )
        log_p, place = logits[0].float().log_softmax(-1).cpu(), 0
        for n, tail, _ in batch:
            for c, candidate in enumerate(candidates):
                if tuple(candidate[:-1]) == tail:
                    tokens = [log_p[place + t, token] for t, token in enumerate(candidate)]
                    scores[n, c] = (
                        tokens[0]
                        if how == "first"
                        else sum(tokens) / (len(tokens) if how == "mean" else 1)
                    )
            place += len(tail) + 1
    return scores


def calibrate(
    scores: Float[Tensor, "N C"], content_free: Float[Tensor, "M C"]
) -> Float[Tensor, "N C"]:
    """Contextual calibration (Zhao et al. 2021): divide by the labels' mean probability after content-free inputs.

    `scores` (N, C) and `content_free` (M, C) are log-scores; the result is log-scores too.
    """
    prior = content_free.softmax(-1).mean(0).log()
    return scores.log_softmax(-1) - prior


def accuracy(scores: Float[Tensor, "N C"], truth: Sequence[int]) -> float:
    """Share of the rows whose best score is the true class."""
    return (scores.argmax(-1) == torch.tensor(truth)).float().mean().item()

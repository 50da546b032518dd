"""Label scores without generation: log-probability of each candidate label after each query, raw and calibrated."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import MiniCPTError, unknown
from .masks import LABEL, Encoded, collate
from .prefix import branch, prefix_cache

CONTENT_FREE = ("N/A", "", "[MASK]")  # Zhao et al. 2021
LABEL_SCORES = ("mean", "sum", "first")


def check_candidates(candidates: dict[str, list[int]]) -> None:
    """Raise `MiniCPTError` if a label has no token, or two labels have the same ones and could not be told apart."""
    seen: dict[tuple, str] = {}
    for label, ids in candidates.items():
        if not ids:
            raise MiniCPTError(f"The label word {label!r} has no token; choose a word that the tokenizer knows.")
        if tuple(ids) in seen:
            raise MiniCPTError(
                f"The label words {seen[tuple(ids)]!r} and {label!r} have the same tokens {ids}; choose different words."
            )
        seen[tuple(ids)] = label


@torch.no_grad()
def label_scores(
    model,
    prefix: Float[Tensor, "1 P D"] | None,
    queries: Sequence[Encoded],
    candidates: Sequence[list[int]],
    how: str = "mean",
    batch_size: int = 64,
) -> Float[Tensor, "N C"]:
    """Log-probability of every candidate label (C lists of ids) after every query (N), as (N, C) on the CPU.

    `how`: "mean" over the label's tokens (so that long labels are not at a disadvantage), "sum", or "first" token only
    (the authors' demo). `prefix` embeddings come before every query and are run once. A query's scores do not depend
    on the other rows of its batch.
    """
    if how not in LABEL_SCORES:
        raise unknown("label score", how, LABEL_SCORES)
    # candidates that differ in their last token only share a row: one row a query if all labels are one token long
    tails = sorted({tuple(c[:-1]) for c in candidates})
    rows = [(n, tail, q + Encoded(list(tail), [LABEL] * len(tail))) for n, q in enumerate(queries) for tail in tails]
    rows.sort(key=lambda row: len(row[2]))  # batches of like length waste less padding
    cache = prefix_cache(model, prefix) if prefix is not None else None
    P = prefix.shape[1] if prefix is not None else 0
    scores = torch.empty(len(queries), len(candidates))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, mask, types = collate([row for _, _, row in batch])
        ends = [len(row) for _, _, row in batch]
        # the head runs where some row has a label token to predict, nowhere else
        keep = sorted({t for (_, tail, _), end in zip(batch, ends) for t in range(end - len(tail) - 1, end)})
        place = {t: i for i, t in enumerate(keep)}
        kwargs = {"past_key_values": branch(cache, len(batch)), "use_cache": True} if P else {}
        if getattr(model, "reads_roles", False):  # IAPT: what it reads ends where the label begins
            kwargs["input_type_mask"] = types.to(model.device)
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=torch.cat((torch.ones(len(batch), P, dtype=mask.dtype), mask), dim=1).to(model.device),
            logits_to_keep=torch.tensor(keep, device=model.device),
            **kwargs,
        ).logits
        log_p = logits.float().log_softmax(-1).cpu()  # (rows, kept positions, V)
        for row, ((n, tail, _), end) in enumerate(zip(batch, ends)):
            first = end - len(tail) - 1  # this position predicts the label's first token
            for c, candidate in enumerate(candidates):
                if tuple(candidate[:-1]) == tail:
                    tokens = [log_p[row, place[first + t], token] for t, token in enumerate(candidate)]
                    scores[n, c] = tokens[0] if how == "first" else sum(tokens) / (len(tokens) if how == "mean" else 1)
    return scores


def calibrate(scores: Float[Tensor, "N C"], content_free: Float[Tensor, "M C"]) -> Float[Tensor, "N C"]:
    """Contextual calibration (Zhao et al. 2021): divide by the labels' mean probability after content-free inputs.

    `scores` (N, C) and `content_free` (M, C) are log-scores; the result is log-scores too.
    """
    prior = content_free.softmax(-1).mean(0).log()
    return scores.log_softmax(-1) - prior


def accuracy(scores: Float[Tensor, "N C"], truth: Sequence[int]) -> float:
    """Share of the rows whose best score is the true class."""
    return (scores.argmax(-1) == torch.tensor(truth)).float().mean().item()

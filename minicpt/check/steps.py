"""The right way of the longer exercises of 04, 05 and 10, step by step, and which inputs they allow.

Each `..._steps` is a `Case.solve`: what is computed on the way, in order, and at the end the right answer.
"""

import re

import numpy as np
import torch
from scipy import stats

from ..core import masks
from ..core.projection import project


def tokens_of(pieces) -> dict:
    """The arguments of `roles_of_tokens`: pieces, and where the tokens of the joined string begin and end."""
    string = "".join(piece for piece, _ in pieces)
    spans = [found.span() for found in re.finditer(r" ?\w+| ?[^\w\s]|\s", string)]
    return {"pieces": [tuple(piece) for piece in pieces], "spans": spans}


def role_steps(pieces) -> dict:
    """The tokens, the roles of their characters without the spaces, and each token's role."""
    spans = tokens_of(pieces)["spans"]
    marked = [(character, role) for piece, role in pieces for character in piece]
    tokens, voters = [], []
    for start, end in spans:
        letters = [role for character, role in marked[start:end] if character != " "]
        tokens.append("".join(character for character, _ in marked[start:end]))
        voters.append(letters or [role for _, role in marked[start:end]])
    roles = [max(those, key=those.count) for those in voters]
    return {"tokens": tokens, "roles of each token's characters": voters, "roles": roles}


def one_role_each(pieces) -> bool:
    """Do the letters of each token come from one piece? Then there is no tie."""
    return all(
        len({*voters}) == 1 for voters in role_steps(pieces)["roles of each token's characters"]
    )


def type_steps(examples) -> dict:
    """What each example adds, and the types joined."""
    moved = [torch.where(roles > 0, roles + 4 * i, 0) for i, roles in enumerate(examples)]
    return {
        "added to each example": [4 * i for i in range(len(examples))],
        "types of each": moved,
        "joined": torch.cat(moved),
    }


def updated_steps(types) -> dict:
    """The types modulo 4, and what moves."""
    return {"types modulo 4": types % 4, "moves": masks.is_updated(types)}


def decay_steps(types, gamma) -> dict:
    """Which tokens are labels, how many labels come after each, and the weights."""
    label, example = masks.is_label(types), masks.example_of(types)
    after = example.max() - example
    return {
        "is it a label token": label,
        "labels after it": torch.where(label, after, 0),
        "weight": torch.where(label, gamma ** after.float(), 0.0),
    }


def whole_examples(types) -> bool:
    """Has each example its label, and does none stand at the row's beginning or lie behind the last one?"""
    labels = [*dict.fromkeys(types[masks.is_label(types)].tolist())]
    in_order = labels == list(range(4, 4 * len(labels) + 1, 4))
    ends = bool(labels) and labels[-1] == int(types.max())
    rising = bool((types[types > 0].diff() >= 0).all())  # the pieces of an example in their order
    return in_order and ends and rising and not masks.is_label(types[:1]).any()


def loss_steps(logits, ids, types, gamma) -> dict:
    """Where the labels stand, the cross-entropy and the weight of each, and the weighted sum."""
    at = masks.is_label(types).nonzero()[:, 0]
    terms = -logits.log_softmax(-1)[at - 1, ids[at]]
    weights = gamma ** torch.arange(len(at)).flip(0).float()
    return {
        "positions of the labels": at,
        "each label's cross-entropy": terms,
        "weight of each": weights,
        "loss": (weights * terms).sum(),
    }


def one_token_labels(logits, ids, types, gamma) -> bool:
    """Is it a row of whole examples, each with a label of one token, and are its ids in the vocabulary?"""
    once = int(masks.is_label(types).sum()) == int(types.max()) // 4
    in_vocabulary = int(ids.max()) < logits.shape[1] if len(ids) else False
    return whole_examples(types) and once and in_vocabulary and 0 < gamma < 1


def freeze_steps(gradient, types) -> dict:
    """Which rows stay, and the gradient with the others at zero."""
    free = masks.is_updated(types)
    return {"rows that keep their gradient": free, "result": gradient * free[:, None]}


def projection_steps(delta, epsilon) -> dict:
    """Each row's norm, its factor, and the projected rows."""
    norm = delta.norm(dim=1)
    factor = epsilon / torch.maximum(norm, epsilon)
    return {
        "norm of each row": norm,
        "factor of each row": factor,
        "result": delta * factor[:, None],
    }


def step_steps(delta, gradient, types, epsilon, lr) -> dict:
    """The frozen gradient, delta after the step, and the projected delta."""
    frozen = gradient * masks.is_updated(types)[:, None]
    stepped = delta - lr * frozen
    return {
        "gradient after freezing": frozen,
        "delta after the step": stepped,
        "norm of each row": stepped.norm(dim=1),
        "new delta": project(stepped, epsilon),
    }


def starts_inside(delta, gradient, types, epsilon, lr) -> bool:
    """Is each delta in its ball, and zero where nothing moves?"""
    inside = delta.norm(dim=1) <= epsilon
    return bool(
        lr > 0
        and (epsilon > 0).all()
        and inside.all()
        and not delta[~masks.is_updated(types)].any()
    )


def interval_steps(ours, baseline) -> dict:
    """The differences, their spread, the standard error, Student's factor, and the interval."""
    d = ours - baseline
    n = len(d)
    spread, t = d.std(ddof=1), stats.t.ppf(0.975, n - 1)
    half = t * spread / np.sqrt(n)
    return {
        "differences": d,
        "their standard deviation, divided by n - 1": spread,
        "standard error of the mean": spread / np.sqrt(n),
        "Student's factor": t,
        "result": [d.mean(), d.mean() - half, d.mean() + half],
    }


def holm_steps(p) -> dict:
    """The p-values sorted, multiplied, as a running maximum, and put back."""
    order, m = np.argsort(p, kind="stable"), len(p)
    stepped = p[order] * np.arange(m, 0, -1)
    rising = np.minimum(np.maximum.accumulate(stepped), 1)
    result = np.empty(m)
    result[order] = rising
    return {
        "sorted": p[order],
        "times m, m - 1, ..., 1": stepped,
        "running maximum, at most 1": rising,
        "put back": result.tolist(),
    }

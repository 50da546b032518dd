"""Checker of notebook 15, the capstone: a method of one's own keeps the rules that every method keeps."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ..data import Split, load_task, make_split
from ..engine.base_models import load_base
from ..engine.memory import ROWS
from ..engine.prefix import Prefix
from ..engine.scores import label_scores
from ..methods.prepare import Job, Prompt, prepare
from ..methods.registry import hyperparameters
from ..methods.trainers import Fitted, train_context
from .engine import checker, describe, expect

TUNING_SEED = 100


def scores_of(fitted: Fitted, prompt: Prompt, split: Split) -> Tensor:
    """Log-scores of the split's queries, (N, C)."""
    queries = prompt.encode_queries([text for text, _ in split.queries])
    return label_scores(fitted.model, fitted.prefix, queries, prompt.candidates, "sum", ROWS)


def is_fitted(fitted) -> None:
    """Raise `NotYet` unless this can stand before queries."""
    expect(
        isinstance(fitted, Fitted),
        f"your function returns {describe(fitted)}; return a Fitted: "
        "Fitted(job.base.model, prefix, history).",
    )
    prefix = fitted.prefix
    expect(
        prefix is None or isinstance(prefix, (Tensor, Prefix)),
        f"the prefix is {describe(prefix)}; it is a tensor of embeddings (1, P, D), or None.",
    )
    if isinstance(prefix, Tensor):
        expect(
            prefix.ndim == 3 and len(prefix) == 1,
            f"the prefix has shape {tuple(prefix.shape)}; it must be (1, P, D), one prompt for all "
            "queries. `x[None]` puts a 1 in front.",
        )
        expect(
            not prefix.requires_grad,
            "the prefix still hangs on the graph of the training: return `prefix.detach()`.",
        )
        expect(bool(prefix.isfinite().all()), "the prefix holds NaN or infinite numbers.")


def run(method: Callable, job: Job) -> Fitted:
    """One call of a method on a job of its own, with both sources of randomness seeded."""
    generator = torch.Generator().manual_seed(TUNING_SEED)
    own = Job(**{**vars(job), "hp": dict(job.hp), "generator": generator})
    with torch.random.fork_rng():
        torch.manual_seed(TUNING_SEED)
        return method(own)


@checker("15.1")
def my_method(student, generator):
    """A Fitted that scores queries, the same one twice; model and job as they were; neither ICL nor CPT."""
    base = load_base("micro")
    split = make_split(load_task("trec"), 2, TUNING_SEED, 20)
    hp = {**hyperparameters("cpt"), "epochs": 4}
    prompt, job = prepare("cpt", base, split, hp, "sum", None, (), ROWS)
    weights = {name: weight.clone() for name, weight in base.model.named_parameters()}
    context, rows = copy.deepcopy(job.context), copy.deepcopy(job.rows)
    fitted = run(student, job)
    is_fitted(fitted)
    scores = scores_of(fitted, prompt, split)
    now = dict(base.model.named_parameters())
    # the check's own model is what stays behind: mend it before anything is said about it
    changed = [name for name, weight in weights.items() if not torch.equal(now[name], weight)]
    training = [name for name, weight in now.items() if weight.requires_grad]
    base.model.requires_grad_(False)
    with torch.no_grad():
        for name in changed:
            now[name].copy_(weights[name])
    expect(
        not changed and set(now) == set(weights),
        f"the base model is not what it was: {changed[0] if changed else 'it has other weights'}. "
        "It is shared by all methods: train numbers of your own, beside it.",
    )
    expect(
        not training,
        f"your function makes the base model's {training[:1]} trainable: leave it frozen.",
    )
    expect(
        job.context == context and job.rows == rows,
        "the job was changed in place: its context or its rows are other ones than before.",
    )
    expect(bool(scores.isfinite().all()), "with this prefix the scores of queries are not finite.")
    again = run(student, job)
    repeated = scores_of(again, prompt, split)
    expect(
        torch.allclose(scores, repeated, atol=1e-4),
        "the same job gives two different results: take all randomness from `job.generator`.",
    )
    known = {
        "ICL": Fitted(base.model, job.embedded_context()),
        "CPT": run(train_context, job),
    }
    gold = torch.tensor([split.classes.index(label) for _, label in split.queries])
    right = {}
    for name, other in known.items():
        theirs = scores_of(other, prompt, split)
        expect(
            not torch.allclose(scores, theirs, atol=1e-4),
            f"on this split your method scores as {name} does, query for query: what is your own "
            "part, and does it have any effect?",
        )
        right[name] = 100 * (theirs.argmax(-1) == gold).float().mean().item()
    right["yours"] = 100 * (scores.argmax(-1) == gold).float().mean().item()
    return drawn(right)


def drawn(right: dict[str, float]):
    """Three bars, and their alt text."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(4.2, 2.4), layout="constrained")
    colours = ["#C8C8C8", "#56B4E9", "#D55E00"]
    panel.bar([*right], [*right.values()], color=colours, edgecolor="black")
    panel.set(
        ylabel="accuracy (%)", ylim=(0, 100), title="one tuning split, 4 epochs: no result yet"
    )
    plt.close(figure)
    return (
        figure,
        "Accuracy on one tuning split as three bars, ICL, CPT and your method: that it runs, not "
        "that it is better.",
    )

"""Train the soft prompts whose accuracies notebook 03 shows: a map of choices, and a longer look at steps.

    python data_scripts/soft_prompt_grid.py map      writes assets/reference_soft_prompts.csv
    python data_scripts/soft_prompt_grid.py steps    writes assets/reference_soft_prompt_steps.csv

Rows that the file already has are kept, so a stopped run goes on where it stopped; delete the file to compute it anew.
On one CPU core the map takes about six minutes and the steps about ten. Notebook 03 trains three settings of the map
with a plain loop and compares them with the file.

Prompts of one length are trained together: R prompts run as R rows, each leaves its keys and values behind, and the n
texts go on after each of them. No prompt sees another, so the sum of R losses has for each prompt just its own
gradient. Two seeds of the map and of the steps that agree start from the same vectors, texts and label words.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from minicpt import encode, load_base, load_task, make_split
from minicpt.core.embeddings import rows_of
from minicpt.core.templates import collate, label_ids, tokenize
from minicpt.data import ASSETS, Split
from minicpt.engine.prefix import run
from minicpt.errors import print_any_text
from minicpt.lab.store import write_atomically

SHOTS, QUERIES, SEEDS = 16, 100, range(5)
INITS = ["random", "scaled", "vocabulary", "text", "labels"]
MAP_RATES = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
MAP = [(P, 25, list(product(INITS, MAP_RATES))) for P in (1, 4, 8, 16, 32, 100)]
STEPS = [  # 2,300 steps are as many as PEFT's example for MRPC takes
    (8, 25, list(product(["random", "scaled"], [1e-3, 1e-2, 1e-1]))),
    (8, 250, list(product(["random", "scaled"], [1e-3, 1e-2, 1e-1]))),
    (8, 2300, list(product(["random", "scaled"], [1e-3]))),
]
FILES = {
    "map": (
        MAP,
        "reference_soft_prompts.csv",
        ["init", "tokens", "rate", "seed"],
        ["accuracy", "most", "loss"],
    ),
    "steps": (
        STEPS,
        "reference_soft_prompt_steps.csv",
        ["init", "rate", "steps", "seed"],
        ["accuracy", "most", "loss", "moved", "cosine"],
    ),
}


class Rows(NamedTuple):
    """Rows without their labels: ids (n, T), place of the answer (n,), label ids (C,), classes (n,)."""

    ids: Tensor
    at: Tensor
    labels: Tensor
    classes: Tensor


def unanswered(base, split: Split, rows: list) -> Rows:
    """Lay out the rows of a split, without their labels."""
    ids, mask, _ = collate(
        encode(base.tokenizer, split.template, [(text, None) for text, _ in rows])
    )
    names = [split.verbalizers[c] for c in split.classes]
    labels = [one[0] for one in label_ids(base.tokenizer, split.template, names)]
    classes = [split.classes.index(label) for _, label in rows]
    return Rows(ids, mask.sum(1) - 1, torch.tensor(labels), torch.tensor(classes))


def start(base, split: Split, init: str, P: int) -> Tensor:
    """The start of a soft prompt, (P, D), from the split's seed, instruction and label words."""
    generator = torch.Generator().manual_seed(split.seed)
    words = base.model.get_input_embeddings()
    V, D = words.weight.shape
    if init in ("random", "scaled"):
        prompt = torch.randn(P, D, generator=generator)
        if init == "scaled":
            prompt *= words.weight.norm(dim=1).mean() / prompt.norm(dim=1, keepdim=True)
        return prompt
    if init == "vocabulary":
        ids = torch.randint(V, (P,), generator=generator).tolist()
    elif init == "text":
        ids = tokenize(base.tokenizer, [split.instruction])[0]
    else:
        ids = tokenize(base.tokenizer, [" " + " ".join(split.verbalizers.values())])[0]
    return rows_of(words, [ids[i % len(ids)] for i in range(P)])


def label_log_p(model, prompts: Tensor, rows: Rows) -> Tensor:
    """Log-probability of each label word after R prompts (R, P, D) and n rows: (R, n, C)."""
    R, n = len(prompts), len(rows.ids)
    cache = run(model, prompts).cache  # each prompt once, for all its rows
    cache.batch_repeat_interleave(n)  # row r * n + i goes on after prompt r
    embeds = model.get_input_embeddings()(rows.ids)  # (n, T, D); padding comes last, unseen
    embeds = embeds.repeat(R, 1, 1)  # (R * n, T, D)

    def answers(hidden):
        return hidden[torch.arange(R * n), rows.at.repeat(R)][None]  # (1, R * n, D)

    logits = run(model, embeds, cache=cache, pick=answers).logits[0]  # (R * n, V)
    return logits.unflatten(0, (R, n)).log_softmax(-1)[..., rows.labels]


def train_prompts(
    model, starts: Tensor, rates: list[float], steps: int, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Train R prompts (R, P, D) at once, each at its own rate: the prompts, and their last losses (R,)."""
    prompts = [one.clone().requires_grad_() for one in starts]
    groups = [{"params": [prompt], "lr": lr} for prompt, lr in zip(prompts, rates)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in tqdm(range(steps), unit="step", leave=False):
        log_p = label_log_p(model, torch.stack(prompts), rows)
        losses = -log_p[:, torch.arange(len(rows.classes)), rows.classes].mean(1)  # (R,)
        gradients = torch.autograd.grad(losses.sum(), prompts)
        for prompt, gradient in zip(prompts, gradients):
            prompt.grad = gradient / gradient.norm().clamp(
                min=1
            )  # clipped to length 1, each by itself
        optimizer.step()
        falling.step()
    return torch.stack(prompts).detach(), losses.detach()


@torch.no_grad()
def judge(model, prompt: Tensor, rows: Rows) -> tuple[float, float]:
    """Accuracy of a prompt (P, D), and the share of the class that it answers most."""
    answers = label_log_p(model, prompt[None], rows)[0].argmax(-1)  # (n,)
    most = torch.bincount(answers).max() / len(answers)
    return (answers == rows.classes).float().mean().item(), most.item()


def cells(base, split: Split, P: int, steps: int, settings: list[tuple[str, float]]) -> list[dict]:
    """Train the settings (init, rate) together: a row of the table for each.

    `moved` is the mean distance between a soft token and its start, `cosine` the cosine of the two.
    """
    train, test = (unanswered(base, split, part) for part in (split.shots, split.queries))
    starts = torch.stack([start(base, split, init, P) for init, _ in settings])
    prompts, losses = train_prompts(
        base.model, starts, [rate for _, rate in settings], steps, train
    )
    found = []
    for (init, rate), old, new, loss in zip(settings, starts, prompts, losses):
        accuracy, most = judge(base.model, new, test)
        row = {"init": init, "tokens": P, "rate": rate, "steps": steps, "seed": split.seed}
        row |= {"accuracy": accuracy, "most": most, "loss": loss.item()}
        row |= {"moved": (new - old).norm(dim=-1).mean().item()}
        row |= {"cosine": torch.cosine_similarity(old, new, dim=-1).mean().item()}
        found.append(row)
    return found


def main() -> None:
    print_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=FILES)
    parser.add_argument(
        "--out", type=Path, help="another file than the one that comes with minicpt"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # the micro model is so small that a second thread costs time
    base, task = load_base("micro", "cpu"), load_task("ag_news")
    plan, name, keys, values = FILES[args.table]
    path = args.out or ASSETS / name
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=keys + values)
    jobs = [(P, steps, seed, made) for P, steps, made in plan for seed in SEEDS]
    for P, steps, seed, settings in tqdm(jobs, unit="batch"):
        wanted = pd.DataFrame(settings, columns=["init", "rate"]).assign(
            tokens=P, steps=steps, seed=seed
        )
        if len(wanted.merge(table, on=keys)) == len(wanted):
            continue
        split = make_split(task, SHOTS, seed, QUERIES, "arbitrary")
        found = pd.DataFrame(cells(base, split, P, steps, settings))[keys + values]
        table = pd.concat([one for one in (table, found.round(4)) if len(one)])
        write_atomically(path, table.to_csv(index=False))
    print(f"{path} has {len(table)} rows.")


if __name__ == "__main__":
    main()

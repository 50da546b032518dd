"""One cell of a table beside PEFT, as its user feels it: fit and score on SmolLM2's shape.

    make bench
    python tests/bench/cells.py [--only sst2-4 dbpedia-4] [--rounds 3]     the same, or some cells

The real model and real samples ($MINICPT_DATA) where they are; else random weights of the same shape
and generated rows of the same lengths. Loss, gradient and scores of the ways must agree before
anything is timed.

- PEFT: the steps of our cell with PEFT's CPT; then one call for each query and label.
- careful: the same steps; then batches of 16 queries of like length, one call for the first tokens of
  all labels and one for each label of several tokens, the head where it must be (`logits_to_keep`).
- minicpt: `fit` and `Predictor.scores`, reading of the texts included.
- limit: what no implementation on this model can beat. The frozen decoder on each distinct token
  once, in rows as long as prompt and query; gradients to its inputs alone; the head where a loss or
  a score must read it.

A cell takes PEFT up to an hour, so a sample is timed and scaled up. The ways take turns, and ratios
are taken within each turn: what else runs on the machine hurts all alike.
"""

import argparse
import json
import math
import random
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import SMOLLM2
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minicpt.core.embeddings import epsilon_length
from minicpt.core.templates import Encoded, collate
from minicpt.data import Split, load_task, make_split
from minicpt.engine.base_models import MICRO, BaseModel, load_base
from minicpt.engine.prefix import WORTH_SHARING, Prefix, run
from minicpt.engine.scores import CONTENT_FREE, batches, label_scores
from minicpt.errors import MiniCPTError
from minicpt.methods.fit import fit
from minicpt.methods.prepare import Job, prepare
from minicpt.methods.registry import hyperparameters
from minicpt.methods.trainers import train_context

CELLS = {"sst2-4": 4, "dbpedia-4": 4, "dbpedia-6": 6, "ag_news-6": 6}
TITLES = {"sst2": "SST-2", "dbpedia": "DBpedia", "ag_news": "AG News"}
N_TEST = 200
BATCH = 16  # of the careful way
CALLS, TOKENS, STEPS = 6, 4_000, 2  # what is timed: PEFT's calls, our queries' tokens, our steps
WAYS = ("PEFT", "careful", "minicpt", "limit")
PARTS = ("fit", "score")
# where no real text is: tokens of a text at the quantiles 0, 0.1, 0.25, 0.5, 0.75, 0.9 and 1
QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
TEXT_TOKENS = {
    "sst2": (2, 10, 15, 22, 30, 37, 59),
    "dbpedia": (15, 35, 50, 75, 100, 123, 175),
    "ag_news": (22, 35, 43, 51, 62, 73, 174),
}
LABEL_TOKENS = {"dbpedia": (1, 2, 1, 2, 3, 3, 1, 2, 1, 1, 1, 2, 1, 2)}  # the others': one each


# ---- model and rows --------------------------------------------------------------------------------------------------


def the_model(random_weights: bool) -> tuple[BaseModel, bool]:
    """SmolLM2, and whether it is the real one."""
    if not random_weights:
        try:
            return load_base("smollm2", "cpu"), True
        except MiniCPTError:
            print("No SmolLM2 here (`make smollm2`): random weights of its shape.")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).eval().requires_grad_(False)
    return BaseModel("smollm2", model, AutoTokenizer.from_pretrained(MICRO), "random"), False


def the_split(dataset: str, shots: int, is_real: bool) -> tuple[Split, bool]:
    """The split of seed 0, and whether its text is real."""
    if is_real:
        try:
            return make_split(load_task(dataset, "real"), shots, 0, N_TEST), True
        except MiniCPTError:
            print(f"No real {dataset} here (MINICPT_DATA=folder): generated rows.")
    import numpy as np

    task, draw = load_task(dataset, "micro"), random.Random(0)
    words = sorted({word for text, _ in task.train for word in text.split() if word.isalpha()})

    def row() -> tuple[str, str]:
        n = round(np.interp(draw.random(), QUANTILES, TEXT_TOKENS[dataset]))
        return " ".join(draw.choices(words, k=n)), draw.choice(classes)

    classes = list(task.verbalizers)
    lengths = LABEL_TOKENS.get(dataset, (1,) * len(classes))
    labels = iter(task.arbitrary_labels)
    verbalizers = {c: " ".join(next(labels) for _ in range(n)) for c, n in zip(classes, lengths)}
    split = make_split(task, shots, 0, 1)
    rows = [row() for _ in range(shots + N_TEST)]
    return replace(split, shots=rows[:shots], queries=rows[shots:], verbalizers=verbalizers), False


def with_peft(library, base: BaseModel, job: Job):
    """CPT on the job's context with PEFT, or with our drop-in and PEFT's loss."""
    hp, length = job.hp, epsilon_length(job.hp["epsilon_unit"], base.model.get_input_embeddings())
    unit = epsilon_length("peft", base.model.get_input_embeddings())
    config = library.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=job.context.ids,
        cpt_mask=[1] * len(job.context),
        cpt_tokens_type_mask=job.context.types,
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=hp["decay"],
        opt_projection_epsilon=hp["epsilon"] * length / unit,
        opt_projection_format_epsilon=hp["epsilon_format"] * length / unit,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return library.get_peft_model(base.model, config)


# ---- one cell --------------------------------------------------------------------------------------------------------


class Cell:
    """What is timed of one cell: for each part and way some functions, and how often the cell calls each."""

    def __init__(self, base: BaseModel, split: Split):
        import peft

        self.base, self.split = base, split
        self.hp = hyperparameters("cpt", base.name, {})
        self.prompt, self.job = self.prepared()
        self.n_steps = self.hp["epochs"]  # all shots are one batch
        self.peft = with_peft(peft, base, self.job)
        weight = self.peft.prompt_encoder["default"].delta_embedding.weight
        self.optimizer = torch.optim.AdamW([weight], lr=self.hp["lr"], weight_decay=0.0)
        self.predictor = fit("cpt", base, split, {"epochs": STEPS})
        texts = [text for text, _ in [*split.queries, *split.shots]]
        self.queries = sorted(self.predictor.encode_queries(texts), key=len)
        order = sorted(texts, key=lambda text: len(self.predictor.encode_queries([text])[0]))
        self.n = len(texts) + len(CONTENT_FREE)
        lengths = [len(query) for query in self.queries]
        mean = sum(lengths) / len(lengths)
        n = min(len(order), int(TOKENS / mean))
        self.sample = [order[int((i + 0.5) * len(order) / n)] for i in range(n)]
        # the batch whose length is most like the mean
        first = min(range(len(lengths) - BATCH), key=lambda i: abs(lengths[i + BATCH // 2] - mean))
        self.batch = self.queries[first : first + BATCH]
        step = len(self.queries) / CALLS
        some = [self.queries[int((i + 0.5) * step)] for i in range(CALLS)]
        labels = self.predictor.candidates
        self.calls = [(query, i * len(labels) // CALLS) for i, query in enumerate(some)]
        self.nodes = {tuple(ids[:i]) for ids in labels for i in range(1, len(ids))}

    def prepared(self):
        return prepare("cpt", self.base, self.split, self.hp, "sum", None, (), 64)

    # fit

    def peft_loss(self, model):
        ids, mask, types, labels = self.job.batch(list(range(len(self.job.rows))))
        batch = dict(input_ids=ids, attention_mask=mask, labels=labels)
        return model(**batch, input_type_mask=types.clone()).loss  # PEFT changes its caller's

    def peft_step(self) -> None:
        self.optimizer.zero_grad()
        self.peft_loss(self.peft).backward()
        weights = self.optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        self.optimizer.step()

    def our_steps(self) -> None:
        train_context(replace(self.job, recipe=replace(self.job.recipe, epochs=STEPS)))

    def limit_step(self) -> None:
        rows, P = self.job.rows, len(self.job.context)
        n_labels = sum(t % 4 == 0 and t > 0 for row in [self.job.context, *rows] for t in row.types)
        logits = self.decoder(P + sum(map(len, rows)), P + len(rows[0]), n_labels, leaf=True)
        F.cross_entropy(logits, torch.zeros(n_labels, dtype=torch.long)).backward()

    def decoder(self, n_tokens: int, length: int, n_head: int, leaf: bool = False):
        """Logits of `n_head` of `n_tokens` tokens in rows of about `length`."""
        model, B = self.base.model, max(1, round(n_tokens / length))
        D = model.get_input_embeddings().weight.shape[1]
        rows = 0.1 * torch.randn(B, math.ceil(n_tokens / B), D)
        rows.requires_grad_(leaf)
        hidden = model.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden.flatten(0, 1)[:n_head])

    # score

    @torch.no_grad()
    def peft_call(self, query: Encoded, label: int) -> float:
        """The label's log-probability after the query, from all logits of [prompt, query, label]."""
        ids = self.predictor.candidates[label]
        row = torch.tensor([query.ids + ids])
        logits = self.peft(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
        log_p = logits[-len(ids) - 1 : -1].log_softmax(-1)
        return log_p.gather(1, torch.tensor(ids)[:, None]).sum().item()

    @torch.no_grad()
    def careful_call(self) -> torch.Tensor:
        """Log-probabilities (16, V) after the queries of a batch."""
        ids, mask, _ = collate(self.batch)
        lengths = torch.tensor([len(query) for query in self.batch])
        keep = int(lengths.max() - lengths.min()) + 1
        logits = self.peft(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits
        return logits[torch.arange(len(ids)), lengths - lengths.min()].log_softmax(-1)

    def run_prompt(self) -> Prefix:
        with torch.no_grad():
            result = run(self.base.model, self.predictor.prefix)
        return Prefix(result.cache, result.hidden)

    @torch.no_grad()
    def limit_prompt(self) -> None:
        self.decoder(len(self.job.context), len(self.job.context), 1)

    @torch.no_grad()
    def limit_queries(self) -> None:
        heads = len(self.sampled) * (1 + len(self.nodes))
        n_tokens = sum(map(len, self.sampled)) + len(self.sampled) * len(self.nodes)
        length = len(self.job.context) + n_tokens / len(self.sampled)
        logits = self.decoder(n_tokens, length, heads)
        logits.log_softmax(-1)

    def functions(self) -> dict[str, dict[str, list[tuple[Callable, float]]]]:
        """Part -> way -> functions and how often the cell would call them."""
        labels = self.predictor.candidates
        beginnings = {tuple(ids[:-1]) for ids in labels if len(ids) > 1}
        ready = replace(self.predictor, prefix=self.run_prompt())
        # calibration's queries are scored with the sample
        self.sampled = self.predictor.encode_queries([*self.sample, *CONTENT_FREE])
        scale = self.n / len(self.sampled)
        steps = [(self.peft_step, self.n_steps)]
        calls = [
            (lambda q=query, c=label: self.peft_call(q, c), self.n * len(labels) / CALLS)
            for query, label in self.calls
        ]
        return {
            "fit": {
                "PEFT": steps,
                "careful": steps,
                "minicpt": [(self.prepared, 1), (self.our_steps, self.n_steps / STEPS)],
                "limit": [(self.limit_step, self.n_steps)],
            },
            "score": {
                "PEFT": calls,
                "careful": [(self.careful_call, (1 + len(beginnings)) * self.n / BATCH)],
                "minicpt": [(self.run_prompt, 1), (lambda: ready.scores(self.sample), scale)],
                "limit": [(self.limit_prompt, 1), (self.limit_queries, scale)],
            },
        }

    # equality

    def check_equal(self) -> dict[str, float]:
        """Loss and gradient of a step, then scores behind one trained prompt: PEFT against ours."""
        import minicpt

        ours = with_peft(minicpt, self.base, self.job)
        found = []
        for model in (self.peft, ours):
            weight = model.prompt_encoder["default"].delta_embedding.weight
            loss = self.peft_loss(model)
            found.append((loss.item(), *torch.autograd.grad(loss, weight)))
        (loss, gradient), (loss_, gradient_) = found
        center = self.job.embedded_context()[0]
        weight = self.peft.prompt_encoder["default"].delta_embedding.weight
        weight.data = self.predictor.prefix[0] - center
        self.peft.eval()
        theirs, ours = [], []
        for query, label in self.calls:
            theirs.append(self.peft_call(query, label))
            ours.append(self.our_scores([query])[0, label].item())
        first = [c for c, ids in enumerate(self.predictor.candidates) if len(ids) == 1]
        tokens = [self.predictor.candidates[c][0] for c in first]
        batch, batch_ = self.careful_call()[:, tokens], self.our_scores(self.batch)[:, first]
        differences = {
            "loss": abs(loss - loss_) / abs(loss),
            "gradient": ((gradient - gradient_).norm() / gradient.norm()).item(),
            "scores": max(abs(a - b) for a, b in zip(theirs, ours)),
            "careful scores": (batch - batch_).abs().max().item(),
        }
        limits = {"loss": 1e-5, "gradient": 1e-4, "scores": 1e-3, "careful scores": 1e-3}
        if any(differences[name] > limits[name] for name in limits):
            raise SystemExit(f"The libraries disagree: {differences}. Nothing was timed.")
        return differences

    def our_scores(self, queries: list[Encoded]) -> torch.Tensor:
        p = self.predictor
        return label_scores(p.model, p.prefix, queries, p.candidates, "sum")


def measure(base: BaseModel, is_real: bool, name: str, rounds: int) -> dict:
    dataset, shots = name.rsplit("-", 1)
    split, real_text = the_split(dataset, int(shots), is_real)
    cell = Cell(base, split)
    result = {"cell": name, "weights": "SmolLM2" if is_real else "random", "real text": real_text}
    result |= {
        "shots": int(shots),
        "labels": len(cell.predictor.candidates),
        "P": len(cell.job.context),
        "row tokens": [len(row) for row in cell.job.rows],
        "query tokens": sum(map(len, cell.queries)) / len(cell.queries),
        "steps": cell.n_steps,
        "queries": cell.n,
        "queries timed": len(cell.sample),
    }
    result["equality"] = cell.check_equal()
    functions = cell.functions()
    measured = {
        function for ways in functions.values() for way in ways.values() for function, _ in way
    }
    result["rounds"] = []
    for _ in range(rounds):
        seconds = {function: time_of(function) for function in measured}
        result["rounds"].append(
            {
                part: {
                    way: sum(seconds[function] * times for function, times in functions[part][way])
                    for way in WAYS
                }
                for part in PARTS
            }
        )
    return result


KINDS = {  # of operators, by what stands in their names
    "matrix products": ("mm",),
    "attention": ("scaled_dot_product",),
    "copies": ("copy_", "cat"),
}


def profile(base: BaseModel, is_real: bool, name: str) -> str:
    """Where the seconds of our steps and of our scores go, in percent; Python is what no operator took."""
    dataset, shots = name.rsplit("-", 1)
    cell = Cell(base, the_split(dataset, int(shots), is_real)[0])
    lengths = [len(query) for query in cell.queries]
    lines = []
    for how, most in (("64 rows a batch", math.inf), ("as run", WORTH_SHARING)):
        passes = [[lengths[n] for n in batch] for batch in batches(cell.queries, 64, most)]
        padding = sum(max(row) * len(row) for row in passes) / sum(lengths) - 1
        lines.append(f"{name}, {how}: {100 * padding:.0f} % padding in {len(passes)} passes")
    for what, function in [
        ("reading", cell.prepared),
        ("fit", cell.our_steps),
        ("score", lambda: cell.predictor.scores(cell.sample)),
    ]:
        function()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            seconds = time_of(function)
        shares = dict.fromkeys([*KINDS, "other operators"], 0.0)
        for event in seen.key_averages():
            found = [kind for kind, names in KINDS.items() if any(n in event.key for n in names)]
            shares[(found or ["other operators"])[0]] += event.self_cpu_time_total / 1e6
        shares["Python"] = seconds - sum(shares.values())
        parts = ", ".join(f"{kind} {100 * s / seconds:.0f} %" for kind, s in shares.items())
        lines.append(f"{name}, {what}: {seconds:.2f} s; {parts}")
    return "\n".join(lines)


def time_of(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ---- table -----------------------------------------------------------------------------------------------------------


def ratios(cell: dict) -> list[dict]:
    """Rows of the table: seconds (medians) of fit, score and both, and ratios (medians of each round's)."""
    rows = []
    for what in (*PARTS, "both"):
        parts = PARTS if what == "both" else (what,)
        rounds = [
            {way: sum(r[part][way] for part in parts) for way in WAYS} for r in cell["rounds"]
        ]
        row = {way: statistics.median(r[way] for r in rounds) for way in WAYS}
        for a, b in (("PEFT", "minicpt"), ("careful", "minicpt"), ("minicpt", "limit")):
            row[f"{a} / {b}"] = statistics.median(r[a] / r[b] for r in rounds)
        rows.append({"cell": cell["cell"], "what": what, **row})
    return rows


def table(result: dict) -> str:
    lines = [
        "| cell | what | PEFT (s) | careful PEFT (s) | minicpt (s) | PEFT ÷ minicpt | careful PEFT ÷ minicpt | "
        "minicpt ÷ limit |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in result["cells"]:
        for row in ratios(cell):
            dataset, shots = cell["cell"].rsplit("-", 1)
            what = {"both": "**end to end**"}.get(row["what"], row["what"])
            seconds = " | ".join(f"{row[way]:,.0f}" for way in WAYS[:3])
            lines.append(
                f"| {TITLES[dataset]}, {shots} shots | {what} | {seconds} | "
                f"**{row['PEFT / minicpt']:.1f}** | {row['careful / minicpt']:.1f} | "
                f"{row['minicpt / limit']:.2f} |"
            )
    first = result["cells"][0]
    weights = (
        "SmolLM2-135M" if first["weights"] == "SmolLM2" else "Random weights of SmolLM2's shape"
    )
    text = "real text" if all(cell["real text"] for cell in result["cells"]) else "generated rows"
    caption = (
        f"{weights}, {text}, {result['threads']} threads, {first['steps']} steps over all shots, "
        f"{N_TEST} queries, the shots and three content-free texts for calibration. PEFT would take up to an hour a "
        f"cell, so a sample is timed and scaled up: of PEFT a step and {CALLS} calls, of the careful way a batch of "
        f"{BATCH}, of minicpt {STEPS} steps and queries of some {TOKENS:,} tokens; "
        f"medians of {len(first['rounds'])} rounds."
    )
    return "\n".join([*lines, "", textwrap.fill(caption, 119)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="how often each way takes its turn")
    parser.add_argument(
        "--random", action="store_true", help="random weights even if the real ones are here"
    )
    parser.add_argument("--profile", action="store_true", help="say where our seconds go instead")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    before = time.process_time()
    base, is_real = the_model(args.random)
    if args.profile:
        print(f"CPU time: libraries {before:.1f} s, SmolLM2 {time.process_time() - before:.1f} s")
        for name in args.only:
            print(profile(base, is_real, name))
        return
    result: dict = {"threads": args.threads, "cells": []}
    for name in args.only:
        result["cells"].append(measure(base, is_real, name, args.rounds))
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cells.json").write_text(json.dumps(result, indent=1))
    (args.out / "cells.md").write_text(table(result), encoding="utf-8")
    print(
        table(result),
        f"\n{time.perf_counter() - started:.0f} s; written: {args.out}/cells.json, .md",
    )


if __name__ == "__main__":
    main()

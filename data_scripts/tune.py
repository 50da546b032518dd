"""Tune every trained method for a model, with equal effort, on seeds that no table uses.

    python data_scripts/tune.py --workers 2                     the micro model
    python data_scripts/tune.py --methods ct_prompt ct_kv       these; the others keep their values and scores
    python data_scripts/tune.py --model smollm2 --workers 2     SmolLM2-135M, for section "hub": any other model
    python data_scripts/tune.py --model smollm2 --from-store FOLDER     from finished cells; computes nothing

Each method gets eight settings: four learning rates times two values of one knob of its own. Each setting is run on
the tasks and shots of the model's plan, seeds 100 to 102, 100 queries; the best mean accuracy wins. The winners and all
scores go to `minicpt/assets/hyperparameters.json`; the cells stay in `results/tune/MODEL`, so a second run computes
nothing. SmolLM2 reads real tasks (`make smollm2`; MINICPT_DATA, or the hub).
"""

import argparse
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd

from minicpt.data import ASSETS, TASKS
from minicpt.errors import print_any_text
from minicpt.lab.cells import Cell, grid
from minicpt.lab.executors import run_grid
from minicpt.lab.store import Store, write_atomically
from minicpt.methods.registry import METHODS, hyperparameters

SEEDS = range(100, 103)
INITS = ("SAMPLE_VOCAB", "RANDOM")
PROMPT_LR = (0.01, 0.03, 0.1, 0.3)
CONTEXT_LR = (0.003, 0.01, 0.03, 0.1)
PAPER_EPS = {"epsilon": 0.1, "epsilon_format": 0.1, "epsilon_unit": "peft"}


@dataclass(frozen=True)
class Plan:
    """What is tried on a model, and what becomes of it."""

    section: str  # of hyperparameters.json
    data: str
    datasets: tuple[str, ...]
    shots: tuple[int, ...]
    grids: dict[str, dict[str, tuple]]
    fixed: dict  # for all methods that know these names; the rest stays as it is in the file
    follow: dict[str, tuple[str, dict]]  # not tuned: the values of another method, but for these
    others: str  # a sentence on the methods that are neither tuned nor follow one that is


PLANS = {
    "micro": Plan(
        section="micro",
        data="micro",
        datasets=TASKS,
        shots=(2, 6),
        grids={
            "pt": {"lr": PROMPT_LR, "init": INITS},
            "ipt": {"lr": PROMPT_LR, "init": INITS},
            "pt_instr": {"lr": PROMPT_LR, "epochs": (10, 25)},
            "ipt_instr": {"lr": PROMPT_LR, "epochs": (10, 25)},
            "lora": {"lr": (0.001, 0.003, 0.01, 0.03), "rank": (2, 8)},
            "iapt": {"lr": (0.001, 0.003, 0.01, 0.03), "bottleneck": (8, 32)},
            "cpt": {"lr": CONTEXT_LR, "epsilon": (0.2, 0.7)},
            "cpt_instr": {"lr": CONTEXT_LR, "epsilon": (0.2, 0.7)},
            "ct_prompt": {"lr": CONTEXT_LR, "token_dropout": (0.05, 0.1)},
            "ct_kv": {"lr": CONTEXT_LR, "token_dropout": (0.05, 0.1)},
        },
        fixed={},
        follow={
            "cpt_paper_eps": ("cpt", PAPER_EPS),
            "cpt_train_label": ("cpt", {"context_weight": 0.0}),
        },
        others="",
    ),
    "smollm2": Plan(
        section="hub",
        data="real",
        datasets=("sst2", "trec"),
        shots=(4,),
        grids={
            "pt": {"lr": CONTEXT_LR, "init": INITS},
            "ipt": {"lr": CONTEXT_LR, "init": INITS},
            "lora": {"lr": (0.0003, 0.001, 0.003, 0.01), "rank": (2, 8)},
            "cpt": {"lr": CONTEXT_LR, "epsilon": (0.3, 1.0)},
        },
        fixed={
            "epochs": 20,
            "batch_size": 0,
            "tokens": 8,
            "alpha": 16,
            "epsilon_unit": "mean_norm",
            "decay": 0.95,
            "context_weight": 1.0,
        },
        follow={
            "pt_instr": ("pt", {}),
            "ipt_instr": ("ipt", {}),
            "cpt_instr": ("cpt", {}),
            "cpt_train_label": ("cpt", {"context_weight": 0.0}),
        },
        others="cpt_paper_eps: epsilon 0.1/0.1 and decay 0.95 as the paper is quoted; learning rate, epochs and batch "
        "size of the authors' demo notebook (BLOOM-1.7B). CT-Prompt and CT-KV, untuned: learning rate 1e-3, 200 "
        "full-batch epochs, dropout 0.05, as their released code is quoted for NLP-LR (there with a cosine schedule, "
        "here linear). IAPT, untuned: learning rates 1e-4 and 1e-6 of the sibling paper MiLoRA, its bottleneck of 320 "
        "for IAPT; epochs and batch size ours.",
    ),
}


def settings(plan: Plan, model: str, method: str) -> list[dict]:
    """The settings to try, in full: so a cell's name does not depend on what was chosen before.

    One radius serves inputs and format.
    """
    start = hyperparameters(method, model)
    start |= {name: value for name, value in plan.fixed.items() if name in start}
    names, tried = list(plan.grids[method]), []
    for values in product(*plan.grids[method].values()):
        setting = {**start, **dict(zip(names, values))}
        if "epsilon" in names:
            setting["epsilon_format"] = setting["epsilon"]
        tried.append(setting)
    return tried


def trials(model: str, methods: list[str]) -> list[tuple[str, str, Cell]]:
    """(method, setting as JSON, cell) for everything that is tried."""
    plan, found = PLANS[model], []
    for method in methods:
        for setting in settings(plan, model, method):
            options = {"model": model, "data": plan.data, "n_test": 100}
            options["hp"] = tuple(sorted(setting.items()))
            cells = grid(plan.datasets, [method], plan.shots, SEEDS, **options)
            found += [(method, json.dumps(setting), cell) for cell in cells]
    return found


def accuracies(folder: str | Path, cells: list[Cell]) -> list[float]:
    """The cells' raw accuracies among the results of a folder, whatever version of this suite computed them.

    A cell is known by what is tried and on what; results of an older version lack fields that came later, and may call
    the model by another name. Ends the program if a cell is missing, or if two results of a cell differ.
    """
    found = {}
    for result in Store(folder).results():
        known = _known(result["config"])
        accuracy = round(result["accuracy"], 4)
        if found.setdefault(known, accuracy) != accuracy:
            raise SystemExit(f"{folder} holds two results that differ: {known}")
    wanted = [_known({**vars(cell), "hp": dict(cell.hp)}) for cell in cells]
    missing = [known for known in wanted if known not in found]
    if missing:
        raise SystemExit(
            f"{folder} lacks {len(missing)} of {len(wanted)} cells, first: {missing[0]}"
        )
    return [found[known] for known in wanted]


def _known(config: dict) -> str:
    names = ("dataset", "method", "shots", "seed", "data", "n_test", "label_score", "hp")
    return json.dumps({name: config[name] for name in names}, sort_keys=True)


def choose(chosen: dict, model: str, means: pd.Series) -> dict:
    """The file's content with the winners of `means` (by method and setting) and all trials written into it."""
    plan, methods = PLANS[model], list(means.index.unique("method"))
    values = dict(chosen[plan.section])
    tried = dict(chosen.get(f"{plan.section}_tuning", {}))
    for method in methods:
        values[method] = json.loads(means[method].idxmax())
        tried[method] = []
        for setting, accuracy in means[method].items():
            knobs = {name: json.loads(setting)[name] for name in plan.grids[method]}
            tried[method].append({**knobs, "accuracy": round(accuracy, 4)})
    for method, (model_of, change) in plan.follow.items():
        names = values[method]  # a prompt that starts from an instruction has no number of tokens
        values[method] = {name: values[model_of][name] for name in names} | change
    first, last = SEEDS[0], SEEDS[-1]
    followed = ", ".join(f"{method} those of {other}" for method, (other, _) in plan.follow.items())
    values["how"] = (
        f"Chosen on {model} by data_scripts/tune.py: eight settings a method, mean raw accuracy over "
        f"{', '.join(plan.datasets)}, shots {' and '.join(map(str, plan.shots))}, seeds {first}-{last} (no table uses "
        f"them), 100 queries, label_score {Cell.label_score}. Not tuned, but with the values of a tuned method except "
        f"for what makes them: {followed}. {plan.others}"
    ).strip()
    ordered = {"how": values["how"], **{m: values[m] for m in METHODS if m in values}}
    return {**chosen, plan.section: ordered, f"{plan.section}_tuning": tried}


def main() -> None:
    print_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="micro", choices=PLANS)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="[all of the model's plan]")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", metavar="FOLDER", help="[results/tune/MODEL]")
    parser.add_argument("--from-store", metavar="FOLDER", help="finished cells; computes nothing")
    args = parser.parse_args()
    methods = args.methods or list(PLANS[args.model].grids)
    unknown = sorted({*methods} - PLANS[args.model].grids.keys())
    if unknown:
        parser.error(f"no grid for {', '.join(unknown)} on {args.model}; add it to PLANS")

    tried = trials(args.model, methods)
    cells = [cell for *_, cell in tried]
    if args.from_store:
        scores = accuracies(args.from_store, cells)
    else:
        store = Store(args.out or f"results/tune/{args.model}")
        failures = run_grid(cells, store, args.workers)
        if failures:
            raise SystemExit("\n".join(failures))
        scores = [store.get(cell)["accuracy"] for cell in cells]
    table = pd.DataFrame(
        [(method, setting, score) for (method, setting, _), score in zip(tried, scores)],
        columns=["method", "setting", "accuracy"],
    )
    means = table.groupby(["method", "setting"], sort=False).accuracy.mean()
    print(means.to_string())
    path = ASSETS / "hyperparameters.json"
    chosen = json.loads(path.read_text(encoding="utf-8"))
    write_atomically(path, json.dumps(choose(chosen, args.model, means), indent=1) + "\n")
    print(f"{path} written.")


if __name__ == "__main__":
    main()

"""Tune every trained method for the micro model, with equal effort, on seeds that no table uses.

    python data_scripts/tune_micro.py --workers 2
    python data_scripts/tune_micro.py --methods ct_prompt ct_kv    these; the others keep their values and scores

Each method gets eight settings: four learning rates times two values of one knob of its own. Each setting is run on
the five tasks, 2 and 6 shots, seeds 100 to 102, 100 queries; the best mean accuracy wins. The winners and all scores
go to `minicpt/assets/hyperparameters.json`; the cells stay in `results/tune`, so a second run computes nothing.
"""

import argparse
import json
from itertools import product

import pandas as pd

from minicpt.data import ASSETS
from minicpt.lab.cells import grid
from minicpt.lab.executors import run_grid
from minicpt.lab.store import Store, write_atomically
from minicpt.methods.registry import METHODS, hyperparameters

TUNING_SEEDS = range(100, 103)
TUNING_SHOTS = (2, 6)
PROMPT_LR = (0.01, 0.03, 0.1, 0.3)
CONTEXT_LR = (0.003, 0.01, 0.03, 0.1)
GRIDS = {
    "pt": {"lr": PROMPT_LR, "init": ("SAMPLE_VOCAB", "RANDOM")},
    "ipt": {"lr": PROMPT_LR, "init": ("SAMPLE_VOCAB", "RANDOM")},
    "pt_instr": {"lr": PROMPT_LR, "epochs": (10, 25)},
    "ipt_instr": {"lr": PROMPT_LR, "epochs": (10, 25)},
    "lora": {"lr": (0.001, 0.003, 0.01, 0.03), "rank": (2, 8)},
    "iapt": {"lr": (0.001, 0.003, 0.01, 0.03), "bottleneck": (8, 32)},
    "cpt": {"lr": CONTEXT_LR, "epsilon": (0.2, 0.7)},
    "cpt_instr": {"lr": CONTEXT_LR, "epsilon": (0.2, 0.7)},
    "ct_prompt": {"lr": CONTEXT_LR, "token_dropout": (0.05, 0.1)},
    "ct_kv": {"lr": CONTEXT_LR, "token_dropout": (0.05, 0.1)},
}
FOLLOW_CPT = {  # not tuned: CPT's values but for what makes the variant
    "cpt_paper_eps": {"epsilon": 0.1, "epsilon_format": 0.1, "epsilon_unit": "peft"},
    "cpt_train_label": {"context_weight": 0.0},
}


def settings(method: str) -> list[dict]:
    """The settings to try: what is not in the grid stays as it is in the file; one radius serves inputs and format."""
    names = list(GRIDS[method])
    tried = [dict(zip(names, values)) for values in product(*GRIDS[method].values())]
    return [{**s, "epsilon_format": s["epsilon"]} if "epsilon" in s else s for s in tried]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="results/tune")
    parser.add_argument(
        "--methods", nargs="+", default=[*GRIDS], choices=GRIDS, metavar="METHOD", help="[all]"
    )
    args = parser.parse_args()

    # full settings, so that a cell's name does not depend on what was chosen before
    cells = []
    for method in args.methods:
        for setting in settings(method):
            setting = {**hyperparameters(method), **setting}
            options = {"n_test": 100, "hp": tuple(sorted(setting.items()))}
            tried = grid(methods=[method], shots=TUNING_SHOTS, seeds=TUNING_SEEDS, **options)
            cells += [(method, setting, cell) for cell in tried]
    store = Store(args.out)
    failures = run_grid([cell for *_, cell in cells], store, args.workers)
    if failures:
        raise SystemExit("\n".join(failures))
    scores = pd.DataFrame(
        [(m, json.dumps(s), store.get(cell)["accuracy"]) for m, s, cell in cells],
        columns=["method", "setting", "accuracy"],
    )
    means = scores.groupby(["method", "setting"], sort=False).accuracy.mean()
    print(means.to_string())

    path = ASSETS / "hyperparameters.json"
    chosen = json.loads(path.read_text(encoding="utf-8"))
    winners = {method: json.loads(means[method].idxmax()) for method in args.methods}
    micro = {**chosen["micro"], **winners}
    for method, change in FOLLOW_CPT.items():
        micro[method] = {**micro["cpt"], **change}
    first, last = TUNING_SEEDS[0], TUNING_SEEDS[-1]
    how = (
        f"Chosen by data_scripts/tune_micro.py: eight settings a method, mean accuracy over five tasks, shots "
        f"{TUNING_SHOTS}, seeds {first}-{last} (no table uses them), 100 queries. {', '.join(FOLLOW_CPT)} take CPT's "
        "values."
    )
    for method in args.methods:
        trials = []
        for setting, accuracy in means[method].items():
            knobs = {name: json.loads(setting)[name] for name in GRIDS[method]}
            trials.append({**knobs, "accuracy": round(accuracy, 4)})
        chosen["micro_tuning"][method] = trials
    chosen["micro"] = {"how": how, **{m: micro[m] for m in METHODS if m in micro}}
    write_atomically(path, json.dumps(chosen, indent=1) + "\n")
    print(f"{path} written.")


if __name__ == "__main__":
    main()

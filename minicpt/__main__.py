"""Command line: `python -m minicpt table | ablations | cell | tasks | models | check-install`."""

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from .data import TABLE_SHOTS, TASKS, load_task, make_split, manifest, real_specs
from .engine.base_models import DEVICES, DTYPES, SUGGESTED, load_base, model_name
from .engine.scores import LABEL_SCORES
from .errors import MiniCPTError, print_any_text
from .lab import executors
from .lab.cells import TABLE_METHODS, Cell, distinct, grid, run_cell
from .lab.store import Store
from .lab.workers import interrupt_at_signals
from .methods.fit import fit
from .methods.registry import METHODS
from .schema import conform, parse


def table(args) -> int:
    """Fill the store with the few-shot table, then write table, figures and report."""
    import pandas as pd

    from .lab import report, tables

    cells = []
    for model in args.model:
        options = {"model": model, **_options(args)}
        cells += grid(args.datasets, args.methods, args.shots, _seeds(args), **options)
    cells = distinct(cells)
    store, out = Store(args.out), Path(args.out)
    if args.refill:
        taken = store.refill(args.refill, cells)
        print(f"{taken} cells taken from {args.refill}.")
    failures = _fill(store, cells, args)
    results = [result for result in map(store.get, cells) if result]
    if not results:
        print("No result at all.", *failures, sep="\n  ")
        return 1
    title = f"Few-shot accuracy, {', '.join(map(model_name, args.model))}, {args.data} data"
    score = "calibrated" if args.calibrated else "raw"
    paths = report.write(results, out, title, score)
    print(report.to_text(tables.summary(results, score=score)))
    if "overall.csv" in paths:
        for model, means in tables.overall(results, score=score).groupby("model"):
            header, rows = tables.overall_rows(means)
            print(f"{model}\n{pd.DataFrame(rows, columns=header).to_string(index=False)}\n")
    if args.report:
        paths |= report.run_notebook(out, title)
    print(*paths.values(), sep="\n")
    return 1 if failures else 0


def _seeds(args) -> range:
    return range(args.first_seed, args.first_seed + args.seeds)


def _options(args) -> dict:
    """What all cells of a command have in common."""
    return {name: getattr(args, name) for name in CELL_OPTIONS}


def _fill(store: Store, cells: list[Cell], args) -> list[str]:
    """Compute what the store lacks; the messages of cells that failed. A dry run ends the command."""
    if args.dry_run:
        print(executors.plan(cells, store, len(args.gpus) or args.workers))
        raise SystemExit(0)
    missing = len(executors.missing_cells(cells, store))
    there = len(cells) - missing
    print(f"{len(cells)} cells, {there} already in {args.out}, {missing} to compute.")
    started = time.perf_counter()
    try:
        failures = executors.run_grid(cells, store, args.workers, args.gpus, _slurm(args))
    except KeyboardInterrupt:
        with suppress(OSError):  # the terminal may be gone
            print(f"\nStopped. {args.out} keeps what is done; the same command goes on from there.")
        raise
    if missing:
        print(f"Computed {missing - len(failures)} cells in {time.perf_counter() - started:.0f} s.")
    else:
        print("Nothing to compute: every cell is in the store.")
    if failures:
        said = f"{len(failures)} cells failed (see *.error.json in {args.out}):"
        print(said, *failures[:5], sep="\n  ")
    return failures


def _slurm(args) -> dict | None:
    """Parameters for submitit, None for another executor."""
    if args.executor == "local":
        return None
    given = {"timeout_min": args.time_limit}
    for option in args.slurm:
        name, equals, value = option.partition("=")
        if not equals:
            known = "NAME=VALUE as submitit knows it, e.g. slurm_partition=gpu"
            raise MiniCPTError(f"--slurm takes {known}; got {name!r}.")
        given[name] = int(value) if value.isdigit() else value
    return given


def ablations(args) -> int:
    """Fill the store with CPT's ablations, then write the comparison with plain CPT, its figure and a reading."""
    from .lab import ablations as ab
    from .lab.report import run_notebook

    if len(args.model) > 1:
        raise MiniCPTError(
            f"The ablations are of one model, got {', '.join(args.model)}; run the command for each."
        )
    seeds, store, model = _seeds(args), Store(args.out), args.model[0]
    groups = ab.grid(args.variants, args.datasets, args.shots, seeds, model=model, **_options(args))
    groups = {name: distinct(group) for name, group in groups.items()}
    cells = dict.fromkeys(cell for group in groups.values() for cell in group)
    failures = _fill(store, list(cells), args)
    results = ab.collect(groups, store)
    left_out = sorted(groups.keys() - results.keys())
    if left_out:
        print("Left out, because cells are missing:", ", ".join(left_out))
    shots = "/".join(map(str, args.shots))
    title = f"Ablations of CPT, {model_name(model)}, {shots} shots, seeds {seeds[0]} to {seeds[-1]}"
    if args.text_tokens:
        title += f", texts of {args.text_tokens} tokens at most"
    paths = ab.write(results, args.out, title)
    print(paths["ablations.md"].read_text(encoding="utf-8"))
    if args.report:
        paths |= run_notebook(Path(args.out), title, "ablations")
    print(*paths.values(), sep="\n")
    return 1 if failures else 0


def cell(args) -> int:
    """Compute one cell, without the store, and print its result."""
    hp = parse(args.hp, "--hp: ")
    conform(hp, "hyperparameters", "hyper-parameter", "--hp: ")
    place = args.dataset, args.method, args.shots, args.seed
    one = Cell(*place, model=args.model, hp=tuple(sorted(hp.items())), **_options(args))
    result = run_cell(one)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
        return 0
    loss = result["history"]["loss"]
    print(f"{one}, labels {result['config']['labels']}: {result['verbalizers']}")
    raw, calibrated = result["accuracy"], result["accuracy_calibrated"]
    print(f"accuracy {raw:.3f}, calibrated {calibrated:.3f} ({len(result['truth'])} queries)")
    if loss:
        print(f"loss {loss[0]:.3f} -> {loss[-1]:.3f} in {len(loss)} steps")
    print("seconds " + ", ".join(f"{k} {v:.2f}" for k, v in result["seconds"].items()))
    print(*result["notes"], sep="\n")
    return 0


def tasks(args) -> int:
    """List the tasks that come with the package, and the real ones."""
    if args.manifest:
        print(json.dumps(manifest(), indent=1))
        return 0
    for name in TASKS:
        task = load_task(name)
        print(
            f"{name:8}  {task.title}: {len(task.verbalizers)} classes, {len(task.train)} train and {len(task.test)} "
            f"test rows, {task.default_labels} labels, e.g. {task.train[0]}"
        )
    for name, spec in real_specs().items():
        print(f"{name:8}  --data real: {spec['hub']} ({len(spec['verbalizers'])} classes)")
    print("Your own: a path to <name>.json, its rows in <name>.jsonl beside it (docs/own_task.md).")
    return 0


def models(args) -> int:
    """List base models to start with; any causal language model of the hub or a local folder will do."""
    for name, what in SUGGESTED.items():
        print(f"{name:28}  {what}")
    return 0


def check_install(args) -> int:
    """Show versions and device, and try a forward pass and a CPT step, in less than half a minute."""
    from importlib.metadata import PackageNotFoundError, version

    needed = "torch transformers peft datasets jupyterlab matplotlib papermill".split()
    for package in [*needed, "nbval", "pytest"]:
        try:
            print(f"{package:13} {version(package)}")
        except PackageNotFoundError:
            if package in needed:
                print(f"{package:13} MISSING: run `make setup`, or `pip install -e '.[test]'`")
                return 1
            print(f"{package:13} not here: only the tests need it")
    base, split = load_base(), make_split(load_task("trec"), 4, seed=0, n_test=4)
    print(f"{'device':13} {base.device}")
    loss = fit("cpt", base, split, {"epochs": 1}).history[0]
    print(f"{'one CPT step':13} loss {loss:.3f}")
    print("All is well. Next: `make lab`, or `make reproduce`.")
    return 0


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def option(help: str, **settings) -> dict:
    return {"help": help, **settings}


# name -> what argparse needs to know; --data-dir is data_dir
CELL_OPTIONS = {
    "data": option("embedded or real tasks [micro]", default="micro", choices=("micro", "real")),
    "data_dir": option("folder of real data in the hub's schema [$MINICPT_DATA, else the hub]"),
    "labels": option(
        "which label words [the task's]", default="", choices=("", "canonical", "arbitrary")
    ),
    "n_test": option("queries per cell [200]", type=int, default=200),
    "per_class": option("count shots per class, not in total", action="store_true"),
    "label_score": option(
        "of a label's tokens [%(default)s]", default=Cell.label_score, choices=LABEL_SCORES
    ),
    "bos": option(
        "begin prompts with BOS where the tokenizer does so by default [on]",
        action=argparse.BooleanOptionalAction,
        default=True,
    ),
    "max_length": option("longest prompt in tokens [the model's limit]", type=int),
    "text_tokens": option("cut every text to its first N tokens [whole]", type=int, metavar="N"),
    "dtype": option("dtype of the weights [auto: as stored]", default="auto", choices=DTYPES),
    "device": option("auto: spread over all devices [the best there is]", choices=DEVICES),
}
MANY = {"nargs": "+"}
SWEEP_OPTIONS = {
    **CELL_OPTIONS,
    "model": option("micro, local folders, or hub names [micro]", default=["micro"], **MANY),
    "datasets": option(
        f"{' '.join(TASKS)}, or a .json file of yours", default=TASKS, metavar="TASK", **MANY
    ),
    "first_seed": option("the first of the seeds [0]", type=int, default=0),
    "workers": option("processes of one thread, or SLURM jobs [1: this one]", type=int, default=1),
    "gpus": option("one process for each of these GPUs, such as 0,1", type=_listed, default=()),
    "executor": option("local, or a SLURM job array", default="local", choices=("local", "slurm")),
    "time_limit": option("minutes; then a job requeues itself [60]", type=int, default=60),
    "slurm": option("for submitit: slurm_partition=gpu", default=[], metavar="NAME=VALUE", **MANY),
    "dry_run": option("only list the cells and estimate the time", action="store_true"),
    "report": option("run the report notebook, too (.ipynb, .html, figures)", action="store_true"),
}


def sweep(shots: tuple[int, ...], seeds: int, out: str) -> dict:
    listed = f"examples in the context [{' '.join(map(str, shots))}]"
    return {
        **SWEEP_OPTIONS,
        "shots": option(listed, type=int, default=shots, metavar="K", **MANY),
        "seeds": option(f"number of seeds [{seeds}]", type=int, default=seeds),
        "out": option(f"folder of results, tables and report [{out}]", default=out),
    }


HP = 'other hyper-parameters as JSON, e.g. \'{"lr": 0.01, "epsilon": 0.3}\''
COMMANDS = {
    table: {
        **sweep(TABLE_SHOTS, 5, "results/few_shot"),
        "methods": option(" ".join(METHODS), default=TABLE_METHODS, metavar="METHOD", **MANY),
        "calibrated": option("show calibrated accuracy, not raw", action="store_true"),
        "refill": option("take finished cells from another run's cells.csv", metavar="FILE"),
    },
    ablations: {
        **sweep((4,), 10, "results/ablations"),
        "variants": option("a wrong name lists them [all]", default=(), metavar="NAME", **MANY),
    },
    cell: {
        **CELL_OPTIONS,
        "model": option("micro, a local folder, or a hub name [micro]", default="micro"),
        "dataset": option("a task's name or your .json file [trec]", default="trec"),
        "method": option(f"{' '.join(METHODS)} [cpt]", default="cpt"),
        "shots": option("examples in the context [4]", type=int, default=4, metavar="K"),
        "seed": option("draws examples, queries and template [0]", type=int, default=0),
        "hp": option(HP, default="{}"),
        "json": option("print the whole result as JSON", action="store_true"),
    },
    tasks: {
        "manifest": option("print the splits' hashes (assets/splits.json)", action="store_true"),
    },
    models: {},
    check_install: {},
}


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m minicpt", description="Context-aware Prompt Tuning: few-shot tables."
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, options in COMMANDS.items():
        about = {"help": run.__doc__.split(".")[0], "description": run.__doc__}
        command = commands.add_parser(run.__name__.replace("_", "-"), **about)
        command.set_defaults(run=run)
        for name, settings in options.items():
            command.add_argument("--" + name.replace("_", "-"), **settings)
    return main


def main() -> int:
    print_any_text()
    interrupt_at_signals()
    try:
        args = parser().parse_args()
        return args.run(args)
    except KeyboardInterrupt as stopped:
        return 128 + stopped.args[0]  # what a shell says of a process that a signal ended
    except MiniCPTError as error:
        print(f"Error: {error}", file=sys.stderr)
    except OSError as error:  # no permission, disk full: what is stored stays whole
        remedy = "Choose another --out, or make room; finished cells are kept."
        print(f"Error: {error}. {remedy}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())

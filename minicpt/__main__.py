"""Command line: `python -m minicpt table | ablations | cell | tasks | models | check-install`."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from .data import TASKS, load_task, make_split, manifest, real_specs
from .engine.base_models import DEVICES, DTYPES, SUGGESTED, load_base
from .engine.scores import LABEL_SCORES
from .errors import MiniCPTError
from .lab import executors
from .lab.cells import SHOTS, TABLE_METHODS, Cell, grid, run_cell
from .lab.store import Store
from .methods.fit import fit
from .methods.registry import METHODS


def table(args) -> int:
    """Fill the store with the few-shot table, then write table, figures and report."""
    import pandas as pd

    from .lab import tables

    cells = [
        cell
        for model in args.model
        for cell in grid(
            args.datasets, args.methods, args.shots, _seeds(args), model=model, **_options(args)
        )
    ]
    store = Store(args.out)
    failures = _fill(store, cells, args)
    results = [result for cell in cells if (result := store.get(cell))]
    if not results:
        print("No result at all.", *failures, sep="\n  ")
        return 1
    title = f"Few-shot accuracy, {', '.join(args.model)}, {args.data} data"
    paths = tables.write(results, Path(args.out), title, [])
    print(tables.to_text(tables.summary(results)))
    if "overall.csv" in paths:
        for model, means in tables.overall(results).groupby("model"):
            header, rows = tables.overall_rows(means)
            print(f"{model}\n{pd.DataFrame(rows, columns=header).to_string(index=False)}\n")
    if args.report:
        paths |= report(Path(args.out), title)
    print(*paths.values(), sep="\n")
    return 1 if failures else 0


def _seeds(args) -> range:
    return range(args.first_seed, args.first_seed + args.seeds)


def _options(args) -> dict:
    """What all cells of a command have in common."""
    names = (
        "data",
        "data_dir",
        "labels",
        "n_test",
        "per_class",
        "label_score",
        "max_length",
        "dtype",
        "device",
    )
    return {name: getattr(args, name) for name in names}


def _fill(store: Store, cells: list[Cell], args) -> list[str]:
    """Compute what the store lacks; the messages of cells that failed. After a dry run or Ctrl-C the command ends."""
    if args.dry_run:
        print(executors.plan(cells, store, len(args.gpus) or args.workers))
        raise SystemExit(0)
    missing = sum(store.get(cell) is None for cell in cells)
    print(
        f"{len(cells)} cells, {len(cells) - missing} already in {args.out}, {missing} to compute."
    )
    started = time.perf_counter()
    try:
        failures = executors.run_grid(cells, store, args.workers, args.gpus, _slurm(args))
    except KeyboardInterrupt as interrupt:
        print(f"\nStopped. What is done stays in {args.out}; the same command goes on from there.")
        raise SystemExit(130) from interrupt
    if missing:
        print(f"Computed {missing - len(failures)} cells in {time.perf_counter() - started:.0f} s.")
    else:
        print("Nothing to compute: every cell is in the store.")
    if failures:
        print(
            f"{len(failures)} cells failed (see *.error.json in {args.out}):",
            *failures[:5],
            sep="\n  ",
        )
    return failures


def _slurm(args) -> dict | None:
    """Parameters for submitit, None for another executor."""
    if args.executor == "local":
        return None
    pairs = [option.partition("=") for option in args.slurm]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise MiniCPTError(
            f"--slurm takes NAME=VALUE as submitit knows it, e.g. slurm_partition=gpu; got {wrong[0]!r}."
        )
    given = {name: int(value) if value.isdigit() else value for name, _, value in pairs}
    return {"timeout_min": args.time_limit, **given}


def report(out: Path, title: str, *also: str) -> dict[str, Path]:
    """Execute notebooks/11_reproduce_tables.ipynb on the store: report.ipynb, report.html and the figures.

    `also` names further parameters of the notebook that take the folder.
    """
    root = Path(__file__).resolve().parent.parent
    notebook = root / "notebooks" / "11_reproduce_tables.ipynb"
    if not notebook.exists():
        raise MiniCPTError(
            f"{notebook} is missing: the report needs the repository, run the command from a checkout."
        )
    paths = {"report": out / "report.ipynb", "html": out / "report.html"}
    environment = {**os.environ, "PYTHONPATH": str(root)}
    folders = [part for name in ("store", *also) for part in ("-r", name, str(out.resolve()))]
    parameters = [*folders, "-r", "title", title]
    quiet = ["--log-level", "ERROR"]
    commands = [
        [
            "papermill",
            str(notebook),
            str(paths["report"]),
            *parameters,
            "-k",
            "python3",
            "--no-progress-bar",
            *quiet,
        ],
        # the classic template keeps the figures' descriptions
        [
            "nbconvert",
            "--to",
            "html",
            "--template",
            "classic",
            "--no-input",
            *quiet,
            str(paths["report"]),
        ],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *command], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise MiniCPTError(
                f"{command[0]} failed on {notebook.name}; the results are kept. It said:\n{done.stderr}"
            )
    return paths | {figure.name: figure for figure in sorted(out.glob("*.png"))}


def ablations(args) -> int:
    """Fill the store with CPT's ablations, then write the comparison with plain CPT, its figure and a reading."""
    from .lab import ablations as ab

    if len(args.model) > 1:
        raise MiniCPTError(
            f"The ablations are of one model, got {', '.join(args.model)}; run the command for each."
        )
    seeds, store, model = _seeds(args), Store(args.out), args.model[0]
    groups = ab.grid(args.variants, args.datasets, args.shots, seeds, model=model, **_options(args))
    failures = _fill(
        store, list(dict.fromkeys(cell for group in groups.values() for cell in group)), args
    )
    results = ab.collect(groups, store)
    if left_out := sorted(groups.keys() - results.keys()):
        print("Left out, because cells are missing:", ", ".join(left_out))
    title = f"Ablations of CPT, {model}, {'/'.join(map(str, args.shots))} shots, seeds {seeds[0]} to {seeds[-1]}"
    paths = ab.write(results, args.out, title)
    print(paths["ablations.md"].read_text(encoding="utf-8"))
    if args.report:
        paths |= report(Path(args.out), title, "ablations")
    print(*paths.values(), sep="\n")
    return 1 if failures else 0


def cell(args) -> int:
    """Compute one cell, without the store, and print its result."""
    try:
        hp = tuple(sorted(json.loads(args.hp).items()))
    except (json.JSONDecodeError, AttributeError) as error:
        raise MiniCPTError(
            f"--hp must be a JSON object like '{{\"lr\": 0.01}}', got {args.hp!r}."
        ) from error
    one = Cell(
        args.dataset, args.method, args.shots, args.seed, model=args.model, hp=hp, **_options(args)
    )
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
    print(
        "Your own: a path to <name>.json, with the rows in <name>.jsonl beside it (see the README)."
    )
    return 0


def models(args) -> int:
    """List base models to start with; any causal language model of the hub or a local folder will do."""
    for name, what in SUGGESTED.items():
        print(f"{name:28}  {what}")
    return 0


def check_install(args) -> int:
    """Versions, device, one forward pass and one CPT step, in less than half a minute."""
    from importlib.metadata import PackageNotFoundError, version

    for package in (
        "torch",
        "transformers",
        "peft",
        "datasets",
        "jupyterlab",
        "matplotlib",
        "papermill",
        "nbval",
        "pytest",
    ):
        try:
            print(f"{package:13} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:13} MISSING: run `make setup`, or `pip install -e '.[test]'`")
            return 1
    base, split = load_base(), make_split(load_task("trec"), 4, seed=0, n_test=4)
    print(f"{'device':13} {base.device}")
    loss = fit("cpt", base, split, {"epochs": 1}).history[0]
    print(
        f"{'one CPT step':13} loss {loss:.3f}\nAll is well. Next: `make lab`, or `make reproduce`."
    )
    return 0


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m minicpt", description="Context-aware Prompt Tuning: few-shot tables."
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--data", default="micro", choices=("micro", "real"), help="embedded or real tasks [micro]"
    )
    common.add_argument(
        "--data-dir", help="folder of real data in the hub's schema [$MINICPT_DATA, else the hub]"
    )
    common.add_argument(
        "--labels",
        default="",
        choices=("", "canonical", "arbitrary"),
        help="label words [the task's]",
    )
    common.add_argument("--n-test", type=int, default=200, help="queries per cell [200]")
    common.add_argument(
        "--per-class", action="store_true", help="count shots per class, not in total"
    )
    common.add_argument(
        "--label-score", default="mean", choices=LABEL_SCORES, help="over the label's tokens [mean]"
    )
    common.add_argument(
        "--max-length", type=int, help="longest prompt in tokens [the model's limit]"
    )
    common.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of the weights [auto: as stored]"
    )
    common.add_argument(
        "--device", choices=DEVICES, help="auto spreads a model over devices [the best there is]"
    )

    sweep = argparse.ArgumentParser(add_help=False, parents=[common])
    sweep.add_argument(
        "--model", nargs="+", default=["micro"], help="micro, local folders, or hub names [micro]"
    )
    sweep.add_argument(
        "--datasets",
        nargs="+",
        default=TASKS,
        metavar="TASK",
        help=f"{' '.join(TASKS)}, or a .json file of yours",
    )
    sweep.add_argument("--first-seed", type=int, default=0, help="seeds from here upwards [0]")
    sweep.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes of one thread, or jobs [1: in this process]",
    )
    sweep.add_argument(
        "--gpus",
        type=_listed,
        default=(),
        metavar="0,1",
        help="a process per GPU, which sees no other",
    )
    sweep.add_argument(
        "--executor", default="local", choices=("local", "slurm"), help="slurm: an array of jobs"
    )
    sweep.add_argument(
        "--time-limit",
        type=int,
        default=60,
        metavar="MIN",
        help="of a job, which requeues itself [60]",
    )
    sweep.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="submitit: slurm_partition=gpu …",
    )
    sweep.add_argument(
        "--dry-run", action="store_true", help="print cells, what is done, the rest's time; stop"
    )
    sweep.add_argument(
        "--report",
        action="store_true",
        help="run the report notebook, too (.ipynb, .html, figures)",
    )

    p = commands.add_parser(
        "table",
        parents=[sweep],
        description=table.__doc__,
        help="the few-shot table (what `make reproduce` runs)",
    )
    p.add_argument(
        "--methods", nargs="+", default=TABLE_METHODS, metavar="METHOD", help=" ".join(METHODS)
    )
    p.add_argument(
        "--shots",
        nargs="+",
        type=int,
        default=SHOTS,
        metavar="K",
        help="examples in the context [2 4 6]",
    )
    p.add_argument("--seeds", type=int, default=5, help="number of seeds [5]")
    p.add_argument(
        "--out",
        default="results/few_shot",
        help="folder of results, table and report [results/few_shot]",
    )
    p.set_defaults(run=table)

    p = commands.add_parser(
        "ablations",
        parents=[sweep],
        help="CPT with one decision changed at a time",
        description=ablations.__doc__,
    )
    p.add_argument(
        "--variants", nargs="+", default=(), metavar="NAME", help="[all; a wrong name lists them]"
    )
    p.add_argument(
        "--shots",
        nargs="+",
        type=int,
        default=(4,),
        metavar="K",
        help="examples in the context [4]",
    )
    p.add_argument("--seeds", type=int, default=10, help="number of seeds [10]")
    p.add_argument(
        "--out",
        default="results/ablations",
        help="folder of results and tables [results/ablations]",
    )
    p.set_defaults(run=ablations)

    p = commands.add_parser(
        "cell", parents=[common], help="one method on one split", description=cell.__doc__
    )
    p.add_argument(
        "--model", default="micro", help="micro (embedded), a local folder, or a hub name [micro]"
    )
    p.add_argument(
        "--dataset", default="trec", metavar="TASK", help="a task's name or your .json file [trec]"
    )
    p.add_argument("--method", default="cpt", help=f"{' '.join(METHODS)} [cpt]")
    p.add_argument("--shots", type=int, default=4, metavar="K", help="[4]")
    p.add_argument("--seed", type=int, default=0, help="[0]")
    p.add_argument(
        "--hp",
        default="{}",
        help='other hyper-parameters as JSON, e.g. \'{"lr": 0.01, "epsilon": 0.3}\'',
    )
    p.add_argument("--json", action="store_true", help="print the whole result as JSON")
    p.set_defaults(run=cell)

    for name, run in (("tasks", tasks), ("models", models), ("check-install", check_install)):
        p = commands.add_parser(name, help=run.__doc__.split(".")[0], description=run.__doc__)
        p.set_defaults(run=run)
        if run is tasks:
            p.add_argument(
                "--manifest",
                action="store_true",
                help="print the splits' hashes (minicpt/assets/splits.json)",
            )
    return main


def main() -> int:
    try:
        args = parser().parse_args()
        return args.run(args)
    except MiniCPTError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # no permission, disk full: what is stored stays whole
        print(
            f"Error: {error}. Choose another --out, or make room; finished cells are kept.",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    raise SystemExit(main())

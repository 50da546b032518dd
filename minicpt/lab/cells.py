"""Cells and their store: a grid becomes one JSON file a cell, computed once, never damaged, resumable.

A cell is one (model, data set, method, shots, seed). Its file is named by the hash of its whole configuration, with the
hyper-parameters, the version of our arithmetic and hashes of task and model: what changes a result changes its name.
"""

import gc
import math
import os
import platform
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ..data import TABLE_SHOTS, TASKS, Split, Task, load_task, make_split
from ..engine.base_models import BaseModel, load_base, model_fingerprint, model_name
from ..engine.memory import ROWS, is_out_of_memory, peak_bytes, reset_peak
from ..engine.scores import accuracy
from ..engine.sources import model_files, remembered
from ..errors import MiniCPTError, check_type, unknown, whole_number
from ..methods.fit import fit
from ..methods.registry import METHODS, hyperparameters
from .store import key_of

# the nine methods of the paper's Table 1, and CPT with the ball of the paper's size
TABLE_METHODS = (
    "zero",
    "icl",
    "pt",
    "ipt",
    "lora",
    "cpt",
    "pt_instr",
    "ipt_instr",
    "cpt_instr",
    "cpt_paper_eps",
)
# Raise it with every change of the code that moves a result of some cell by more than rounding does (so does another
# processor): stored results of other versions then count as not computed. 1: the first that is written down
RESULTS_VERSION = 1
LEAST = {"seed": -math.inf, "shots": 0}  # 1 for all other whole numbers of a cell


def _task_files(name: str, data: str, data_dir: str | None) -> list[Path]:
    """The files that `load_task` reads, and neighbours; none for a task of the package, or from the hub."""
    if name.endswith(".json"):
        return [Path(name), Path(name).with_suffix(".jsonl")]
    folder = data_dir or os.environ.get("MINICPT_DATA")
    if data == "real" and folder:
        return sorted(Path(folder).expanduser().glob("*/*.jsonl"))
    return []


# every cell asks for them
_task = remembered(load_task, _task_files, 8)
_base = remembered(load_base, model_files, 1)


@dataclass(frozen=True)
class Cell:
    """One entry of a table for one seed; `hp` overrides hyper-parameters, `labels` "" means the task's default.

    Types are checked here, once: papermill writes 1.0 for a seed 1, which it is, and "1", which is refused; NumPy's
    numbers become Python's. `hp` may be a dictionary, too.
    """

    dataset: str
    method: str
    shots: int
    seed: int
    model: str = "micro"
    data: str = "micro"
    data_dir: str | Path | None = field(default=None, compare=False)
    labels: str = ""
    n_test: int = 200
    per_class: bool = False
    label_score: str = "sum"
    bos: bool = True
    max_length: int | None = None
    text_tokens: int | None = None  # longer texts are cut
    dtype: str = "auto"
    device: str | None = field(default=None, compare=False)
    hp: tuple[tuple[str, object], ...] = ()

    def __post_init__(self):
        check_type("hp", self.hp, dict | tuple)
        given = dict(self.hp).items()
        pairs = sorted((key, x.item() if hasattr(x, "item") else x) for key, x in given)
        object.__setattr__(self, "hp", tuple(pairs))
        for one in fields(self)[:-1]:  # without hp
            value = getattr(self, one.name)
            if one.type is int or (one.type == int | None and value is not None):
                value = whole_number(one.name, value, LEAST.get(one.name, 1))
                object.__setattr__(self, one.name, value)
            check_type(one.name, value, one.type)

    def config(self) -> dict:
        """Everything the result depends on, as plain JSON values; checks the names on the way.

        Where the files of task and model lie does not matter, what they say does: the model's own name stands here, and
        a hash of each, task_sha256 and model_fingerprint.
        """
        task = self.task()
        config = asdict(self)
        del config["data_dir"], config["device"]
        return {
            **config,
            "dataset": task.name,
            "model": model_name(self.model),
            "hp": hyperparameters(self.method, self.model, dict(self.hp)),
            "labels": self.labels or task.default_labels,
            "task_sha256": task.sha256,
            "model_fingerprint": model_fingerprint(self.model),
            "results_version": RESULTS_VERSION,
        }

    def task(self) -> Task:
        return _task(self.dataset, self.data, self.data_dir)

    def split(self) -> Split:
        """The shots, queries, label words and template of this cell's seed."""
        drawn = self.shots, self.seed, self.n_test, self.labels, self.per_class
        return make_split(self.task(), *drawn)

    def key(self) -> str:
        """The name of the result's file."""
        return key_of(self.config())

    def __str__(self) -> str:
        return f"{self.dataset} {self.method} {self.shots}-shot seed {self.seed}"


def distinct(cells: Iterable[Cell]) -> list[Cell]:
    """Each cell once, by its key. Raises `MiniCPTError` for two tasks of one name: a table would mix them."""
    found, tasks = {}, {}
    for cell in cells:
        config = cell.config()
        found.setdefault(key_of(config), cell)
        name, sha256 = config["dataset"], config["task_sha256"]
        if tasks.setdefault(name, sha256) != sha256:
            raise MiniCPTError(
                f"Two different tasks are called {name!r}, and a table would mix them. Give one another "
                '"name" in its file.'
            )
    return list(found.values())


def grid(
    datasets: Iterable[str] = TASKS,
    methods: Iterable[str] = TABLE_METHODS,
    shots: Iterable[int] = TABLE_SHOTS,
    seeds: Iterable[int] = range(5),
    **kwargs,
) -> list[Cell]:
    """All cells of a table, each once; zero-shot knows no shots and stands there once per seed, with shots 0."""
    cells, shots = [], list(dict.fromkeys(shots))
    for dataset, method, seed in product(*map(dict.fromkeys, (datasets, methods, seeds))):
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        for k in [0] if method == "zero" else shots:
            cells.append(Cell(dataset, method, k, seed, **kwargs))
    return cells


# ---- one cell -------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell) -> dict:
    """Compute a cell: draw the split, fit, score the queries and the shots. Returns the JSON that the store keeps.

    Where memory runs out, half as many rows go through the model at once, down to one: the numbers stay the same.
    """
    config = cell.config()  # first: a wrong name must not cost the loading of a model
    threads = torch.get_num_threads()
    if cell.model == "micro":
        # its matrices are so small that a second thread costs time; the result says how many there were
        torch.set_num_threads(1)
    try:
        started = time.perf_counter()
        base = _base(cell.model, cell.device, cell.dtype, cell.bos)
        split = cell.split()
        if cell.config() != config:
            raise MiniCPTError(
                f"The files of {cell.dataset} or {cell.model} changed while they were read. Run the cell again."
            )
        loaded = time.perf_counter() - started
        result = _in_memory(cell, base, split)
    finally:
        torch.set_num_threads(threads)
    result["seconds"] = {"load": loaded, **result["seconds"]}
    return {"config": config, **result}


def _in_memory(cell: Cell, base: BaseModel, split: Split) -> dict:
    rows = ROWS
    while True:
        try:
            return _fit_and_score(cell, base, split, rows)
        except Exception as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
        rows //= 2
        gc.collect()  # outside of `except`: there the error's traceback still holds the tensors
        if base.device.type == "cuda":
            torch.cuda.empty_cache()


def _fit_and_score(cell: Cell, base: BaseModel, split: Split, rows_at_once: int) -> dict:
    reset_peak(base.device)
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predictor = fit(
            cell.method,
            base,
            split,
            dict(cell.hp),
            cell.label_score,
            cell.max_length,
            rows_at_once=rows_at_once,
            text_tokens=cell.text_tokens,
        )
        fitted = time.perf_counter()
        rows = [*split.queries, *split.shots]
        raw, calibrated = predictor.scores([text for text, _ in rows])
    notes = sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)})
    truth = [split.classes.index(label) for _, label in rows]
    losses = -raw[range(len(rows)), truth]  # cross-entropy over the whole vocabulary, at the label
    n = len(split.queries)
    raw, calibrated, truth = raw[:n], calibrated[:n], truth[:n]
    peak = peak_bytes(base.device)
    return {
        "accuracy": accuracy(raw, truth),
        "accuracy_calibrated": accuracy(calibrated, truth),
        "loss": {
            "test": losses[:n].mean().item(),
            "train": losses[n:].mean().item() if split.shots else None,
        },
        "notes": notes,
        "split_sha256": split.sha256,
        "verbalizers": split.verbalizers,
        "template": asdict(split.template),
        "shots": split.shots,
        "history": {"loss": predictor.history},
        "truth": truth,
        "log_scores": _rounded(raw),
        "log_scores_calibrated": _rounded(calibrated),
        "seconds": {"fit": fitted - started, "score": time.perf_counter() - fitted},
        "peak_memory_mb": peak and peak / 2**20,
        "rows_at_once": predictor.rows_at_once,
        "device": str(base.device),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            **{package: version(package) for package in ("torch", "transformers", "peft")},
            "python": platform.python_version(),
        },
    }


def _rounded(scores: Tensor) -> list[list[float]]:
    return [[round(score, 4) for score in row] for row in scores.tolist()]

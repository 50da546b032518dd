"""Executors for real: killed at every dangerous point, out of memory, on a full disk, two runs at once, one per GPU."""

import errno
import functools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minicpt.__main__ import main
from minicpt.core import train
from minicpt.engine import scores
from minicpt.errors import MiniCPTError
from minicpt.lab import cells, executors, report, workers
from minicpt.lab.cells import Cell, grid
from minicpt.lab.executors import plan, run_grid
from minicpt.lab.store import Store
from minicpt.methods import fit, trainers

ROOT = Path(__file__).resolve().parent.parent
CELLS = [
    replace(cell, hp=(("epochs", 2),) if cell.method in ("pt", "cpt") else ())
    for cell in grid(["trec"], ["zero", "icl", "pt", "cpt"], [2], range(2), n_test=8)
]
TIMINGS = ("seconds", "peak_memory_mb")
fork = multiprocessing.get_context(
    "fork"
)  # the children inherit imports and the model: a run takes a second
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch")


def contents(folder):
    """What a store and its table say, timings aside."""
    store = Store(folder)
    found = {store.path(cell).name: store.get(cell) for cell in CELLS}
    report.write(list(filter(None, found.values())), folder, "title")
    results = {
        name: {k: v for k, v in result.items() if k not in TIMINGS}
        for name, result in found.items()
    }
    return results, (folder / "table.csv").read_bytes(), (folder / "table.md").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The single-threaded run in one piece that all others are held against."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_grid(CELLS, Store(folder)) == []
    return contents(folder)


def exit_code(work, *args):
    """Run in a forked child; minus the signal that killed it, or its exit status."""
    child = fork.Process(target=work, args=args)
    child.start()
    child.join(120)
    return child.exitcode


# ---- kill -9 --------------------------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function, at, before=True):
    """The function, killing its process in its call number `at`, before or after doing its work."""
    calls = iter(range(at))

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        last = next(calls, None) is None
        if last and before:
            die()
        result = function(*args, **kwargs)
        if last:
            die()
        return result

    return wrapped


def half_written(path, text, **kwargs):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        die()


def killed_run(folder, point, at):
    if point == "within the temporary file":
        calls, write = iter(range(at)), Path.write_text

        def write_text(path, text, **kwargs):
            last = path.suffix == ".tmp" and next(calls, None) is None
            return (half_written if last else write)(path, text, **kwargs)

        Path.write_text = write_text
    elif point == "between temporary file and rename":
        os.replace = dying(os.replace, at)
    elif point == "after the rename":
        os.replace = dying(os.replace, at, before=False)
    elif point == "in a training step":
        torch.optim.AdamW.step = dying(torch.optim.AdamW.step, at)
    elif point == "in scoring":
        fit.label_scores = dying(scores.label_scores, at)
    elif point == "between two cells":
        executors.attempt = dying(executors.attempt, at)
    run_grid(CELLS, Store(folder))


POINTS = [
    (point, at)
    for point in (
        "within the temporary file",
        "between temporary file and rename",
        "in scoring",
        "after the rename",
        "between two cells",
        "in a training step",
    )
    for at in (0, 1, 3, 6)
]


@linux
@pytest.mark.slow
@pytest.mark.parametrize("point, at", POINTS)
def test_kill_9_then_resume_gives_the_table_of_an_uninterrupted_run(
    point, at, tmp_path, uninterrupted
):
    assert exit_code(killed_run, tmp_path, point, at) == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir() if path.suffix == ".json"}
    assert len(left) < len(CELLS)
    leftovers = list(tmp_path.glob(".*.tmp"))
    assert bool(leftovers) == ("temporary file" in point)
    assert exit_code(run_grid, CELLS, Store(tmp_path)) == 0
    assert contents(tmp_path) == uninterrupted and not Store(tmp_path).errors()


@linux
@pytest.mark.slow
def test_kill_9_at_random_moments_again_and_again(tmp_path, uninterrupted):
    chance, kills = random.Random(0), 0
    while any(Store(tmp_path).get(cell) is None for cell in CELLS):
        child = fork.Process(target=run_grid, args=(CELLS, Store(tmp_path)))
        child.start()
        child.join(
            chance.uniform(0.02, 0.1 + 0.02 * kills)
        )  # longer and longer: a slow machine gets there, too
        kills += child.is_alive()
        child.kill()
        child.join()
    assert kills and contents(tmp_path) == uninterrupted


# ---- signals --------------------------------------------------------------------------------------------------------

SWEEP = """
import os, sys, time
from pathlib import Path
from minicpt.lab import cells

def endless(cell):
    Path(os.environ["MARKS"], str(os.getpid())).touch()
    time.sleep(3600)

cells.run_cell = endless  # in the workers, too: they import this file
if __name__ == "__main__":
    from minicpt.__main__ import main
    sys.exit(main())
"""
PATIENCE = 300  # seconds; a loaded machine takes a minute to import torch three times


def alive(pid):
    """Whether the process runs; one that ended and that nobody has waited for does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


def wait_for(condition):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


def listen():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(
    "number, whom, code",
    [
        (2, "all", 130),  # Ctrl-C reaches every process of the terminal
        (15, "parent", 143),
        (1, "all", 129),  # a closed terminal
        (9, "parent", -9),
    ],
)
def test_a_signal_ends_a_sweep_and_its_workers(number, whom, code, tmp_path):
    marks, out, script = tmp_path / "marks", tmp_path / "out", tmp_path / "sweep.py"
    marks.mkdir()
    script.write_text(SWEEP)
    grid_of = "--datasets trec --methods icl pt --shots 2 --seeds 4 --n-test 8 --workers 2".split()
    run = subprocess.Popen(
        [sys.executable, script, "table", *grid_of, "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MARKS": str(marks), "TQDM_DISABLE": "1"},
        start_new_session=True,
        preexec_fn=listen,  # the tests themselves may run in the background, which ignores signals
    )
    try:
        wait_for(lambda: len(list(marks.iterdir())) == 2 or run.poll() is not None)
        started = [int(mark.name) for mark in marks.iterdir()]
        assert len(started) == 2 and all(map(alive, started))
        (os.killpg if whom == "all" else os.kill)(run.pid, number)
        said, complaint = run.communicate(timeout=PATIENCE)
        wait_for(lambda: not any(map(alive, started)))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == code
    assert number == 9 or "the same command goes on from there" in said
    assert "Traceback" not in complaint
    assert not out.exists() or not list(out.iterdir())


def test_a_worker_ends_between_two_writes(tmp_path, monkeypatch):
    ended, held = threading.Event(), []
    monkeypatch.setattr(workers.os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(cells, "run_cell", lambda cell: {"config": cell.config(), "accuracy": 0.5})
    leash, hand = multiprocessing.Pipe(duplex=False)
    put = Store.put

    def slow_put(store, cell, result):
        hand.close()
        threading.Thread(target=workers._end_with, args=(leash,), daemon=True).start()
        held.append(not ended.wait(0.3))
        put(store, cell, result)

    monkeypatch.setattr(Store, "put", slow_put)
    assert executors.attempt(CELLS[0], Store(tmp_path)) is None
    assert held == [True] and ended.wait(PATIENCE)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_a_signal_that_is_ignored_stays_ignored_as_under_nohup(monkeypatch, capsys):
    before = {number: signal.getsignal(number) for number in workers.ENDING}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        monkeypatch.setattr(sys, "argv", ["minicpt", "models"])
        assert main() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- two at once ----------------------------------------------------------------------------------------------------


@linux
@pytest.mark.slow
def test_two_runs_at_once_on_one_store(tmp_path, uninterrupted):
    runs = [fork.Process(target=run_grid, args=(CELLS, Store(tmp_path))) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0] and contents(tmp_path) == uninterrupted
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".tmp", ".damaged")]


@pytest.mark.slow
def test_one_process_a_gpu_gives_the_table_of_one(tmp_path, uninterrupted, monkeypatch):
    """Without a GPU the processes see none and use the CPU; how they are started and fed is the same."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run_grid(CELLS, Store(tmp_path), gpus=("0", "1")) == []
    assert contents(tmp_path) == uninterrupted


def test_a_cell_that_another_run_finished_meanwhile_is_not_computed(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put(CELLS[0], {"config": CELLS[0].config(), "accuracy": 1.0})
    monkeypatch.setattr(cells, "run_cell", lambda cell: pytest.fail("computed again"))
    assert executors.attempt(CELLS[0], store) is None


# ---- one process a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_gpu_has_a_process_of_its_own_that_sees_no_other(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue, seen = context.SimpleQueue(), []
    for gpu in ("3", "5"):
        queue.put(gpu)
    leash, hand = context.Pipe(duplex=False)
    begin = workers.start_worker, (leash, queue)
    with hand, executors.ProcessPoolExecutor(2, context, *begin) as pool:
        for _ in range(20):
            seen += [job.result() for job in [pool.submit(visible_gpu) for _ in range(4)]]
            if len(set(seen)) == 2:
                break
    assert {gpu for gpu, _ in seen} == {"3", "5"} and len(set(seen)) == 2, "one process a GPU"


@pytest.mark.parametrize(
    "there, visible, asked, said",
    [
        (0, None, ("0",), "sees no CUDA GPU here"),
        (0, "", ("0", "1"), "--gpus 0,1: "),
        (2, None, ("0", "2"), "GPU 2 is not there; valid: 0, 1"),
        (2, "4,5", ("0",), "GPU 0 is not there; valid: 4, 5"),
        (2, None, ("0", "1"), None),
        (2, "4,5", ("4", "5"), None),
        (1, None, ("GPU-3faa8e",), None),
    ],
)
def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_computed(
    there, visible, asked, said, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started = []
    monkeypatch.setattr(
        executors, "in_processes", lambda *args: started.append(args) or (_ for _ in ())
    )
    if said is None:
        run_grid(CELLS, Store(tmp_path), gpus=asked)
        assert started
        return
    with pytest.raises(MiniCPTError) as caught:
        run_grid(CELLS, Store(tmp_path), gpus=asked)
    assert said in str(caught.value) and not started and not list(tmp_path.iterdir())


def visible_gpu():
    time.sleep(0.1)
    return os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()


def test_cells_are_grouped_by_model_and_dtype(tmp_path):
    mixed = [
        Cell("trec", "icl", 2, seed, dtype=dtype)
        for seed in range(3)
        for dtype in ("float32", "bfloat16")
    ]
    order = [cell.dtype for cell in executors.missing_cells(mixed, Store(tmp_path))]
    assert order == ["float32"] * 3 + ["bfloat16"] * 3


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_out_of_memory_halves_the_rows_and_the_numbers_stay(tmp_path, monkeypatch):
    cell = Cell("trec", "cpt", 6, 0, n_test=20, hp=(("epochs", 3), ("batch_size", 4)))
    whole, tried = cells.run_cell(cell), []

    def step(loss_of, parameters, n_rows, recipe, *args):
        tried.append(recipe.at_once)
        if recipe.at_once > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return train.train(loss_of, parameters, n_rows, recipe, *args)

    monkeypatch.setattr(trainers, "train", step)
    halved = cells.run_cell(cell)
    assert tried == [64, 32, 16, 8, 4, 2, 1] and halved["rows_at_once"] == 1
    assert halved["config"] == whole["config"] and halved["accuracy"] == whole["accuracy"]
    assert halved["history"]["loss"] == pytest.approx(whole["history"]["loss"], rel=1e-4)
    assert (
        torch.tensor(halved["log_scores"]).sub(torch.tensor(whole["log_scores"])).abs().max() < 2e-3
    )


@pytest.mark.slow
def test_memory_that_never_suffices_is_an_error_and_the_grid_goes_on(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr(trainers, "train", never)
    store = Store(tmp_path)
    (failure,) = run_grid(
        [Cell("trec", "pt", 2, 0, n_test=4), Cell("trec", "icl", 2, 0, n_test=4)], store
    )
    assert (
        "can't allocate memory" in failure
        and len(store.errors()) == len(list(store.results())) == 1
    )


def test_a_cell_of_the_micro_model_runs_on_one_thread_and_leaves_the_others_their_own():
    torch.set_num_threads(2)
    try:
        result = cells.run_cell(Cell("trec", "icl", 2, 0, n_test=4))
        assert result["threads"] == 1 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_other_errors_are_not_tried_again(monkeypatch):
    tried = []

    def bad(*args, **kwargs):
        tried.append(1)
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(trainers, "train", bad)
    with pytest.raises(RuntimeError, match="multiplied"):
        cells.run_cell(Cell("trec", "pt", 2, 0, n_test=4))
    assert tried == [1]


# ---- a full disk ----------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_and_keeps_what_is_done(tmp_path, monkeypatch):
    write, store = Path.write_text, Store(tmp_path)

    def full(path, text, **kwargs):
        if len(list(tmp_path.glob("*.json"))) == 2:
            write(path, text[:10], **kwargs)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, **kwargs)

    monkeypatch.setattr(cells, "run_cell", lambda cell: {"config": cell.config(), "accuracy": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            run_grid(CELLS, store)
    assert len(list(tmp_path.iterdir())) == 2 == len(list(store.results()))
    assert run_grid(CELLS, store) == [] and len(list(store.results())) == len(CELLS)


@linux
@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", tmp_path]).returncode
    ):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "minicpt",
                "table",
                "--datasets",
                "trec",
                "--methods",
                "icl",
                "--shots",
                "2",
                "--seeds",
                "9",
                "--n-test",
                "40",
                "--out",
                tmp_path,
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert (
            run.returncode == 2
            and "No space left on device" in run.stderr
            and "make room" in run.stderr
        )
        assert "Traceback" not in run.stderr
        done = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
        assert (
            done and all("accuracy" in result for result in done) and not list(tmp_path.glob(".*"))
        )
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# ---- the bar --------------------------------------------------------------------------------------------------------


def test_the_bar_names_the_cell_that_is_being_computed(tmp_path, monkeypatch):
    bars, shown = [], []

    class Bar(executors.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": True})
            bars.append(self)

        def set_description(self, text, **kwargs):
            self.text = text

    def run(cell):
        shown.append((str(cell), bars[0].text))
        return {"config": cell.config(), "accuracy": 0.5}

    monkeypatch.setattr(executors, "tqdm", Bar)
    monkeypatch.setattr(cells, "run_cell", run)
    run_grid(CELLS, Store(tmp_path))
    assert len(shown) == len(CELLS) and all(running == text for running, text in shown)


@pytest.mark.parametrize("where, hidden", [("a log", None), ("a notebook", "shown")])
def test_the_bar_is_hidden_in_logs_and_shown_in_notebooks(where, hidden, tmp_path, monkeypatch):
    given = []

    class Bar(executors.tqdm):
        def __init__(self, *args, **kwargs):
            given.append(kwargs.get("disable", "shown"))
            super().__init__(*args, **{**kwargs, "disable": True})

    monkeypatch.setattr(executors, "tqdm", Bar)
    monkeypatch.setattr(cells, "run_cell", lambda cell: {"config": cell.config(), "accuracy": 0.5})
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if where == "a notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    run_grid(CELLS, Store(tmp_path))
    run_grid(CELLS, Store(tmp_path))  # nothing is missing: nothing to show
    assert given == [hidden, True]


# ---- before a run ---------------------------------------------------------------------------------------------------


def test_the_plan_counts_and_estimates_from_finished_cells(tmp_path):
    store = Store(tmp_path)
    assert "No estimate for 8: no finished cell of that model yet." in plan(CELLS, store)
    for cell, seconds in zip(CELLS, (10.0, 20.0)):  # zero-shot, both seeds
        store.put(
            cell,
            {"config": cell.config(), "accuracy": 0.5, "seconds": {"fit": seconds, "score": 5.0}},
        )
    text = plan(CELLS, store, at_once=2)
    assert "8 cells, 2 done, 6 to compute." in text
    assert "About 1.0 min for 6 of them, 2 at once." in text  # 6 * 20 s / 2
    store.put(
        CELLS[2],
        {"config": CELLS[2].config(), "accuracy": 0.5, "seconds": {"fit": 60.0, "score": 0.0}},
    )
    assert "About 3.2 min for 5 of them, 1 at once." in plan(
        CELLS, store
    )  # ICL 60 s, the others 100 s / 3


@pytest.mark.slow
def test_dry_run_computes_nothing(tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "minicpt",
            "table",
            "--datasets",
            "trec",
            "--seeds",
            "2",
            "--out",
            tmp_path / "none",
            "--dry-run",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (
        run.returncode == 0 and "cells, 0 done" in run.stdout and not (tmp_path / "none").exists()
    )

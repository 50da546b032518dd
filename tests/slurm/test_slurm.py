"""The SLURM executor on a real SLURM of one node: arrays, and a preempted job that requeues."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from minicpt.errors import MiniCPTError
from minicpt.lab import executors
from minicpt.lab.cells import Cell, grid
from minicpt.lab.executors import Shard, in_slurm, run_grid
from minicpt.lab.store import Store

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
needs_slurm = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)),
    reason="needs root and Debian's packages slurm-wlm and munge",
)
pytestmark = pytest.mark.xdist_group("slurm")  # one cluster, in one of the test processes
ONE_CPU = {"timeout_min": 5, "cpus_per_task": 1, "mem_gb": 2}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([HERE / "start.sh", folder], capture_output=True, text=True)
    try:
        if started.returncode:
            pytest.skip(f"SLURM does not start on this machine: {started.stderr[-1000:]}")
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        os.environ["PYTHONPATH"] = str(ROOT)
        yield folder
    finally:
        os.environ.pop("SLURM_CONF", None)
        subprocess.run([HERE / "stop.sh", folder])


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.5)


@needs_slurm
@pytest.mark.slow
def test_an_array_fills_the_store_with_the_numbers_of_a_serial_run(slurm, tmp_path):
    cells = grid(["trec"], ["zero", "icl", "cpt"], [2], range(2), n_test=8)
    cells = [replace(c, hp=(("epochs", 2),)) if c.method == "cpt" else c for c in cells]
    bad = Cell("trec", "cpt", 2, 0, n_test=8, hp=(("decay", 1e30), ("epochs", 1)))
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    assert run_grid(cells, here) == []
    (failure,) = run_grid([*cells, bad], there, workers=2, slurm=ONE_CPU)
    assert "TrainingDiverged" in failure
    for cell in cells:
        ours, theirs = here.get(cell), there.get(cell)
        assert ours["log_scores"] == theirs["log_scores"] and ours["history"] == theirs["history"]
    logs = sorted((tmp_path / "there" / "slurm").glob("*_0_log.out"))
    assert len(logs) == 2 and len({path.name.split("_")[0] for path in logs}) == 1, (
        "one array of two jobs"
    )
    assert (
        run_grid(cells, there, workers=2, slurm=ONE_CPU) == []
    )  # nothing is submitted for a full store
    assert sorted((tmp_path / "there" / "slurm").glob("*_0_log.out")) == logs


@needs_slurm
@pytest.mark.slow
def test_a_preempted_job_requeues_itself_and_only_what_is_missing_is_computed(slurm, tmp_path):
    cells, store = (
        [Cell("trec", "cpt", 2, seed, n_test=8, hp=(("epochs", 60),)) for seed in range(12)],
        Store(tmp_path),
    )
    failures = []
    run = threading.Thread(target=lambda: failures.extend(run_grid(cells, store, slurm=ONE_CPU)))
    run.start()
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert 2 <= len(before) < len(cells)
    queue = subprocess.run(
        ["squeue", "--noheader", "--format=%i %T"], capture_output=True, text=True
    ).stdout
    (job,) = re.findall(r"(\S+) RUNNING", queue)
    subprocess.run(
        ["scancel", "--signal=USR2", job], check=True
    )  # what SLURM sends before it preempts
    while run.is_alive() and time.monotonic() < deadline:
        # SLURM lets a requeued job wait two minutes; the test does not
        subprocess.run(
            ["scontrol", "update", f"jobid={job.split('_')[0]}", "StartTime=now"],
            capture_output=True,
        )
        run.join(1)
    assert not run.is_alive() and failures == [] and all(store.get(cell) for cell in cells)
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in before.items()), (
        "computed twice"
    )
    log = "".join(path.read_text() for path in (tmp_path / "slurm").glob("*_log.*"))
    assert "preempted" in log and "requeue" in log.lower()


@needs_slurm
@pytest.mark.slow
def test_a_killed_job_is_reported_and_the_next_run_goes_on(slurm, tmp_path):
    cells, store = (
        [Cell("trec", "cpt", 2, seed, n_test=8, hp=(("epochs", 200),)) for seed in range(10)],
        Store(tmp_path),
    )
    outcomes = in_slurm(cells, store, 1, ONE_CPU)
    first = next(outcomes)
    assert first[1] is None
    (array,) = {path.name.split("_")[0] for path in (tmp_path / "slurm").glob("*_submitted.pkl")}
    subprocess.run(["scancel", "--signal=KILL", "--full", array], check=True)
    messages = [message for _, message in outcomes if message]
    assert messages and all(
        "its job was killed or ran out of time" in message for message in messages
    )
    missing = [cell for cell in cells if not store.get(cell)][:1]
    assert run_grid(missing, store) == [] and store.get(missing[0])


def test_without_slurm_or_submitit_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(MiniCPTError, match="no SLURM here"):
        run_grid([Cell("trec", "icl", 2, 0, n_test=4)], Store(tmp_path), slurm={})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MiniCPTError, match=r"pip install 'minicpt\[slurm\]'"):
        run_grid([Cell("trec", "icl", 2, 0, n_test=4)], Store(tmp_path), slurm={})


def test_a_shard_asks_to_be_submitted_as_it_is(tmp_path):
    shard = Shard([Cell("trec", "icl", 2, 0, n_test=4)], str(tmp_path))
    assert shard.checkpoint().function is shard

"""Cells, the store and the grid: names, resuming, damage, failures, interruption."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minicpt.__main__ import main
from minicpt.engine.base_models import model_fingerprint
from minicpt.errors import MiniCPTError
from minicpt.lab import cells, report, store, tables
from minicpt.lab.cells import Cell, grid, run_cell
from minicpt.lab.executors import run_grid
from minicpt.lab.store import Store, export

CELL = Cell("trec", "icl", 2, 0, n_test=8)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def counted(monkeypatch):
    """Replace the computation by a stub that counts, so that only the bookkeeping is tested."""
    done = []

    def run(cell):
        done.append(cell)
        if cell.seed == 13:
            raise FloatingPointError("unlucky")
        return {"config": cell.config(), "accuracy": 0.5}

    monkeypatch.setattr(cells, "run_cell", run)
    return done


def test_the_key_names_everything_that_matters():
    keys = {CELL.key()}
    for change in (
        dict(dataset="sst2"),
        dict(method="zero"),
        dict(shots=4),
        dict(seed=1),
        dict(labels="arbitrary"),
        dict(n_test=9),
        dict(dtype="bfloat16"),
        dict(per_class=True),
        dict(label_score="mean"),
        dict(bos=False),
        dict(max_length=100),
        dict(text_tokens=48),
        dict(hp=(("lr", 1.0),)),
    ):
        keys.add(replace(CELL, **change).key())
    assert len(keys) == 14
    assert replace(CELL, labels="canonical").key() == CELL.key()  # the task's default, said aloud
    assert (
        replace(CELL, data_dir="elsewhere").key() == replace(CELL, device="cpu").key() == CELL.key()
    )
    config = CELL.config()
    assert (
        json.loads(json.dumps(config)) == config
        and len(config["task_sha256"]) == len(config["model_fingerprint"]) == 16
    )


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_other_weights_have_another_fingerprint(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"one" * 10)
    first = model_fingerprint(str(tmp_path))
    assert len(first) == 16
    (tmp_path / name).write_bytes(b"two" * 10)
    assert model_fingerprint(str(tmp_path)) != first
    assert model_fingerprint("some/hub-name") == "some/hub-name"


def test_grid_has_zero_shot_once_per_seed():
    cells = grid(["trec", "sst2"], ["zero", "icl"], [2, 4], range(3))
    assert len(cells) == 2 * 3 * (1 + 2) and len({c.key() for c in cells}) == len(cells)
    with pytest.raises(MiniCPTError, match="Unknown method 'iclx'"):
        grid(["trec"], ["iclx"])


def test_a_second_run_computes_nothing_and_a_new_seed_only_itself(tmp_path, counted):
    store, cells = Store(tmp_path), grid(["trec"], ["icl"], [2], range(3))
    assert run_grid(cells, store) == [] and len(counted) == 3
    assert run_grid(cells, store) == [] and len(counted) == 3
    run_grid(grid(["trec"], ["icl"], [2], range(4)), store)
    assert [c.seed for c in counted] == [0, 1, 2, 3]
    assert len(list(store.results())) == 4


def test_a_failure_is_kept_apart_and_the_others_go_on(tmp_path, counted, monkeypatch):
    store, unlucky = Store(tmp_path), grid(["trec"], ["icl"], [2], [12, 13, 14])
    (failure,) = run_grid(unlucky, store)
    assert "seed 13: FloatingPointError: unlucky" in failure
    (error,) = store.errors()
    assert error["config"]["seed"] == 13 and "Traceback" in error["traceback"]
    assert store.get(unlucky[1]) is None and len(list(store.results())) == 2
    monkeypatch.setattr(cells, "run_cell", lambda cell: {"config": cell.config(), "accuracy": 1.0})
    assert run_grid(unlucky, store) == [] and store.errors() == []  # an error never counts as done


@pytest.mark.parametrize("damage", ["", "{", '{"config": {}}', "[]", '{"accuracy": 1}', "\x00\xff"])
def test_a_damaged_file_is_set_aside_and_computed_again(tmp_path, counted, damage):
    store = Store(tmp_path)
    run_grid([CELL], store)
    store.path(CELL).write_bytes(damage.encode("latin-1"))
    with pytest.warns(UserWarning, match="is damaged; moved to"):
        assert store.get(CELL) is None
    assert list(tmp_path.glob("*.damaged"))
    run_grid([CELL], store)
    assert store.get(CELL)["accuracy"] == 0.5


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    target = tmp_path / "result.json"
    store.write_atomically(target, "old")

    def no_replace(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_replace)
        with pytest.raises(KeyboardInterrupt):
            store.write_atomically(target, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"] and target.read_text() == "old"


# ---- results as a CSV -----------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    """Three computed cells and their CSV."""
    grid_of_three = grid(["trec"], ["zero", "icl"], [2], range(2), n_test=8)[:3]
    store, file = Store(tmp_path / "first"), tmp_path / "cells.csv"
    assert run_grid(grid_of_three, store) == []
    file.write_text(export(map(store.get, grid_of_three)))
    return grid_of_three, store, file


def test_a_store_is_refilled_from_its_csv_and_computes_nothing_twice(exported, tmp_path, counted):
    cells, first, file = exported
    second = Store(tmp_path / "second")
    more = grid(["trec"], ["zero", "icl"], [2], range(2), n_test=8)  # one that nobody computed
    assert second.refill(file, more) == 3 and second.refill(file, more) == 0
    for cell in cells:
        old, new = first.get(cell), second.get(cell)
        assert new["source"] == "cells.csv" and new["config"] == old["config"]
        assert new["accuracy"] == pytest.approx(old["accuracy"], abs=1e-6)
        assert new["split_sha256"] == old["split_sha256"] and "log_scores" not in new
    assert export(map(second.get, cells)) == file.read_text()
    assert tables.summary(list(map(second.get, cells))).equals(
        tables.summary(list(second.results()))
    )
    assert run_grid(more, second) == [] and counted == [more[3]]


def test_a_cap_of_text_length_stands_in_configuration_table_and_csv(exported, tmp_path):
    cells, first, file = exported
    assert cells[0].config()["text_tokens"] is None  # whole texts
    cut = [replace(cell, text_tokens=48) for cell in cells]
    assert run_grid(cut, first) == []
    results = list(map(first.get, cut))
    assert results[0]["config"]["text_tokens"] == 48
    csv = tmp_path / "cut.csv"
    csv.write_text(export(results))
    assert ",48,micro," in csv.read_text() and ",,micro," in file.read_text()
    second = Store(tmp_path / "second")
    assert second.refill(file, cut) == 0 and second.refill(csv, cut) == 3
    paths = report.write(results, tmp_path, "Cut")
    assert (
        "text of trec, shot or query, is cut to its first 48 tokens"
        in paths["table.md"].read_text()
    )


def test_a_row_of_another_split_or_configuration_is_not_taken(exported, tmp_path):
    cells, first, file = exported
    split = first.get(cells[2])["split_sha256"]
    file.write_text(file.read_text().replace(split, "1234567890123456"))
    store = Store(tmp_path / "second")
    with pytest.warns(UserWarning, match="1 rows of cells.csv come from other splits"):
        assert store.refill(file, cells) == 2
    assert store.get(cells[2]) is None
    for change in (dict(hp=(("lr", 1.0),)), dict(dtype="bfloat16"), dict(label_score="mean")):
        assert Store(tmp_path / "third").refill(file, [replace(c, **change) for c in cells]) == 0


def test_a_hash_that_looks_like_a_number_stays_a_hash(exported, tmp_path, monkeypatch):
    cells, first, file = exported
    file.write_text(
        file.read_text().replace(first.get(cells[0])["split_sha256"], "0012345678901e10")
    )
    monkeypatch.setattr("minicpt.data.Split.sha256", "0012345678901e10")
    with pytest.warns(UserWarning, match="2 rows"):
        assert Store(tmp_path / "second").refill(file, cells) == 1


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda text: text.replace("split_sha256", "split", 1), "has no column split_sha256"),
        (
            lambda text: text + text.splitlines()[-1] + "\n",
            "line 5: .*an earlier line has its cell",
        ),
        (lambda text: re.sub(r",8,[\d.]+,", ",8,nan,", text, count=1), "line 2: an accuracy is no"),
        (
            lambda text: re.sub(r",8,[\d.]+,", ",8,62.5,", text, count=1),
            "line 2: an accuracy is no",
        ),
    ],
)
def test_a_bad_csv_is_refused_with_the_line(exported, tmp_path, spoil, message):
    cells, _, file = exported
    file.write_text(spoil(file.read_text()))
    with pytest.raises(MiniCPTError, match=message):
        Store(tmp_path / "second").refill(file, cells)
    with pytest.raises(MiniCPTError, match="nowhere.csv does not exist"):
        Store(tmp_path / "second").refill(tmp_path / "nowhere.csv", cells)
    assert not (tmp_path / "second").exists()


@pytest.mark.slow
def test_the_table_command_takes_a_csv_and_shows_calibrated_accuracies(exported, tmp_path):
    cells, first, file = exported
    args = "table --datasets trec --methods zero icl --shots 2 --seeds 2 --n-test 8 --calibrated"
    run = command(*args.split(), "--refill", str(file), "--out", str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    assert "3 cells taken" in run.stdout and "4 cells, 3 already in" in run.stdout
    assert "percent, calibrated: mean" in (tmp_path / "out" / "table.md").read_text()


# ---- a model by what it is ------------------------------------------------------------------------------------------


def test_a_folder_that_moved_finds_its_results_again(tmp_path):
    """And no path enters a result."""
    from minicpt.engine.base_models import MICRO

    for place in ("here", "there"):
        shutil.copytree(MICRO, tmp_path / place / "my_model")
    here, there = (
        replace(CELL, model=str(tmp_path / place / "my_model")) for place in ("here", "there")
    )
    assert here.key() == there.key() != CELL.key()
    assert run_grid([here], Store(tmp_path / "out")) == []
    result = Store(tmp_path / "out").get(there)
    assert result["config"]["model"] == "my_model" and str(tmp_path) not in json.dumps(result)


# ---- the real thing, on the micro model -----------------------------------------------------------------------------


def test_a_cells_result_is_complete_and_reproducible():
    result = run_cell(replace(CELL, method="cpt", hp=(("epochs", 2),)))
    again = run_cell(replace(CELL, method="cpt", hp=(("epochs", 2),)))
    for key in ("config", "accuracy", "history", "log_scores", "split_sha256"):
        assert result[key] == again[key]
    rows = result["log_scores"]
    right = sum(
        max(range(6), key=row.__getitem__) == truth for row, truth in zip(rows, result["truth"])
    )
    assert result["accuracy"] == pytest.approx(right / 8)
    assert len(result["history"]["loss"]) == 2 and json.dumps(result)
    assert {"torch", "transformers", "peft", "python"} == set(result["versions"])


def test_nan_in_training_becomes_an_error_file(tmp_path):
    store, bad = (
        Store(tmp_path),
        replace(CELL, method="cpt", hp=(("decay", 1e30), ("epochs", 1))),
    )
    failures = run_grid([bad, CELL], store)
    assert len(failures) == 1 and "TrainingDiverged" in failures[0]
    assert store.get(CELL) and store.get(bad) is None and len(store.errors()) == 1


@pytest.mark.slow
def test_two_worker_processes_give_the_results_of_one(tmp_path):
    cells = grid(["trec", "set_cls"], ["icl", "cpt"], [2], range(2), n_test=20, hp=(("epochs", 2),))
    for folder, workers in (("one", 1), ("two", 2)):
        assert run_grid(cells, Store(tmp_path / folder), workers) == []
    for cell in cells:
        one, two = (Store(tmp_path / folder).get(cell) for folder in ("one", "two"))
        assert one["log_scores"] == two["log_scores"] and one["history"] == two["history"]


@pytest.mark.slow
def test_a_killed_worker_costs_its_cell_and_the_next_run_goes_on(tmp_path, monkeypatch):
    cells, store = grid(["trec"], ["icl"], [2], range(30), n_test=8), Store(tmp_path)

    def kill_a_worker(progress):
        if sum(1 for _ in store.folder.glob("*.json")) > 3 and (
            workers := multiprocessing.active_children()
        ):
            os.kill(workers[0].pid, signal.SIGKILL)

    monkeypatch.setattr("tqdm.tqdm.update", lambda self, n=1: kill_a_worker(self))
    with pytest.raises(MiniCPTError, match="A worker process died"):
        run_grid(cells, store, 2)
    monkeypatch.undo()
    done = sum(store.get(cell) is not None for cell in cells)
    assert 3 < done < len(cells) and not store.errors()
    assert run_grid(cells, store, 1) == [] and all(store.get(cell) for cell in cells)


# ---- command line ---------------------------------------------------------------------------------------------------


def command(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "minicpt", *args], capture_output=True, text=True, cwd=ROOT, **kwargs
    )


@pytest.mark.slow
def test_table_command_twice(tmp_path):
    args = [
        "table",
        "--datasets",
        "trec",
        "--methods",
        "zero",
        "icl",
        "--shots",
        "2",
        "--seeds",
        "2",
        "--n-test",
        "8",
        "--out",
        str(tmp_path),
    ]
    first = command(*args)
    assert first.returncode == 0, first.stderr
    assert "4 cells, 0 already" in first.stdout and "ICL" in first.stdout
    header = (tmp_path / "table.csv").read_text().splitlines()[0]
    assert (
        header
        == "model,dataset,method,shots,mean,std,ci_low,ci_high,n_seeds,reported,reported_source"
    )
    assert (tmp_path / "table.md").exists()
    assert "Nothing to compute" in command(*args).stdout


@pytest.mark.slow
def test_two_models_real_data_in_one_table(tmp_path):
    """Table 1 as a researcher runs it: models by name, data in the hub's schema, half precision."""
    from minicpt.engine.base_models import MICRO

    rows = [
        {"sentence": f"a {word} film number {i}", "label": i % 2, "idx": i}
        for i, word in enumerate(["bad", "good"] * 10)
    ]
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "data" / "sst2" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(MICRO, tmp_path / "another")
    run = command(
        "table",
        "--model",
        "micro",
        str(tmp_path / "another"),
        "--data",
        "real",
        "--data-dir",
        str(tmp_path / "data"),
        "--datasets",
        "sst2",
        "set_cls",
        "--methods",
        "zero",
        "icl",
        "--shots",
        "2",
        "--seeds",
        "1",
        "--n-test",
        "6",
        "--dtype",
        "bfloat16",
        "--out",
        str(tmp_path / "out"),
    )
    assert run.returncode == 0 and "8 cells, 0 already" in run.stdout, run.stderr
    results = list(Store(tmp_path / "out").results())
    assert {r["config"]["model"] for r in results} == {"micro", "another"}
    assert all(r["dtype"] == r["config"]["dtype"] == "bfloat16" for r in results)
    icl = [r for r in results if r["config"]["method"] == "icl"]
    assert all(r["loss"]["train"] > 0 and r["loss"]["test"] > 0 for r in icl)


@pytest.mark.parametrize(
    "args, message",
    [
        (["cell", "--dataset", "trac"], "Unknown task 'trac'. Did you mean 'trec'"),
        (["cell", "--method", "ctp"], "Unknown method 'ctp'. Did you mean 'cpt'"),
        (["cell", "--model", "./nowhere"], "no model folder"),
        (["cell", "--model", "no-such/model"], "Cannot load the model 'no-such/model'"),
        (["cell", "--shots", "5000"], "Cannot draw 5000 shots from"),
        (["cell", "--shots", "0"], "needs at least one shot"),
        (["cell", "--hp", "{lr: 1}"], "--hp: This is not valid JSON"),
        (["table", "--executor", "slurm", "--slurm", "gpus"], "--slurm takes NAME=VALUE"),
        (
            ["cell", "--hp", '{"epsilom": 1}'],
            "Unknown hyper-parameter 'epsilom'. Did you mean 'epsilon'",
        ),
        (
            [
                "table",
                "--out",
                "/proc/nowhere",
                "--datasets",
                "trec",
                "--methods",
                "zero",
                "--seeds",
                "1",
            ],
            "another --out",
        ),
    ],
)
def test_bad_arguments_end_with_one_clear_line(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minicpt", *args])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and message in error


@pytest.mark.slow
def test_an_error_leaves_the_process_without_a_traceback():
    run = command("cell", "--dataset", "trac")
    assert (
        run.returncode == 2
        and "Unknown task 'trac'" in run.stderr
        and "Traceback" not in run.stderr
    )


def test_help_names_every_command():
    text, names = (
        command("--help").stdout,
        ("table", "ablations", "cell", "tasks", "models", "check-install"),
    )
    assert all(re.search(rf"^\s+{name}\b", text, re.M) for name in names)

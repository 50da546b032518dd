"""A cell's key names all that decides its result, a living process sees edited files, and fields have types."""

import copy
import errno
import json
import os
import platform
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicpt import FewShotClassifier, MiniCPTError, data, fit, load_base
from minicpt.__main__ import main
from minicpt.engine.sources import MICRO, model_fingerprint
from minicpt.lab import cells, executors, store, tables
from minicpt.lab.cells import Cell, distinct, grid, run_cell
from minicpt.lab.executors import run_grid
from minicpt.lab.store import Store

SPEC = {
    "name": "mine",
    "title": "My task",
    "verbalizers": {"a": "good", "b": "bad", "c": "so"},
    "templates": {
        "input": ["text: {}\n", "{} | "],
        "output": ["label: {}"],
        "intra": [""],
        "inter": ["\n\n"],
    },
    "instruction": "Answer {labels}.",
    "arbitrary_labels": ["red", "blue", "green"],
    "default_labels": "canonical",
}
ROWS = [
    {"text": f"row {i}", "label": "abc"[i % 3], "split": "train" if i < 9 else "test"}
    for i in range(18)
]
CELL = Cell("trec", "icl", 2, 0, n_test=8)
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write_task(folder, spec=SPEC, rows=ROWS, name="mine"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(spec))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / f"{name}.json")


# ---- what decides a result is in the key (and what does not, is not) ------------------------------------------------


def swap_words(spec, rows, i):
    words = spec["verbalizers"]
    one, other = list(words)[i % 3], list(words)[(i + 1) % 3]
    words[one], words[other] = words[other], words[one]


def reorder_classes(spec, rows, i):
    first, *others = spec["verbalizers"].items()
    spec["verbalizers"] = dict([*others, first])


def another_template(spec, rows, i):
    part = ("input", "output", "intra", "inter")[i % 4]
    spec["templates"][part] = [f"{text}." for text in spec["templates"][part]]


def another_pool(spec, rows, i):
    spec["templates"]["inter"].append("\n")


def another_instruction(spec, rows, i):
    spec["instruction"] += f" {i}"


def other_arbitrary_words(spec, rows, i):
    spec["arbitrary_labels"][i % 3] = "grey"


def arbitrary_by_default(spec, rows, i):
    spec["default_labels"] = "arbitrary"


def move_a_row_over_the_border(spec, rows, i):
    rows[9]["split"] = "train"  # the first of the test rows becomes the last for training


def swap_splits_of_two_rows(spec, rows, i):
    rows[i % 9]["split"], rows[9 + i % 9]["split"] = "test", "train"


def swap_rows(spec, rows, i):
    rows[i % 8], rows[i % 8 + 1] = rows[i % 8 + 1], rows[i % 8]


def another_text(spec, rows, i):
    rows[i % 18]["text"] += "!"


def another_label(spec, rows, i):
    rows[i % 18]["label"] = "abc"[(i + 1) % 3]


def another_title(spec, rows, i):
    spec["title"] = f"The title {i}"


EDITS = [
    swap_words,
    reorder_classes,
    another_template,
    another_pool,
    another_instruction,
    other_arbitrary_words,
    arbitrary_by_default,
    move_a_row_over_the_border,
    swap_splits_of_two_rows,
    swap_rows,
    another_text,
    another_label,
]


@quick
@given(st.lists(st.sampled_from([*EDITS, another_title]), max_size=3), st.integers(0, 17))
def test_a_task_edited_in_place_has_another_key_where_it_says_something_else(tmp_path, edits, i):
    """In a living process, one edit right after the other; the oracle compares what the files say."""
    spec, rows = copy.deepcopy(SPEC), copy.deepcopy(ROWS)
    before = Cell(write_task(tmp_path / "here"), "icl", 2, 0, n_test=4)
    key, split = before.key(), before.split()
    for edit in edits:
        edit(spec, rows, i)
    after = Cell(write_task(tmp_path / "here", spec, rows), "icl", 2, 0, n_test=4)

    def says(spec, rows):
        by_split = [[row for row in rows if row["split"] == name] for name in ("train", "test")]
        return list(spec["verbalizers"].items()), {**spec, "title": ""}, by_split

    same = says(spec, rows) == says(SPEC, ROWS)
    assert (after.key() == key) == same
    assert after.task() == data.load_task_file(tmp_path / "here" / "mine.json")
    assert after.split() == data.make_split(after.task(), 2, 0, 4)
    if after.split() != split:
        assert after.key() != key


def test_a_moved_task_keeps_its_key(tmp_path):
    here, there = (Cell(write_task(tmp_path / name), "icl", 2, 0, n_test=4) for name in "ab")
    assert here.key() == there.key()


def test_the_key_names_the_version_of_our_arithmetic(monkeypatch):
    key = CELL.key()
    assert CELL.config()["results_version"] == cells.RESULTS_VERSION
    monkeypatch.setattr(cells, "RESULTS_VERSION", cells.RESULTS_VERSION + 1)
    assert CELL.key() != key


def test_an_old_configuration_still_makes_a_cell():
    fields = asdict(replace(CELL, method="cpt", hp=(("lr", 0.1), ("epochs", 2))))
    config = Cell(**fields).config()
    kept = {name: config[name] for name in fields if name in config}
    again = Cell(**{**kept, "hp": dict(config["hp"])})
    assert again.config() == config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The micro model's files in a folder of their own."""
    return Path(shutil.copytree(MICRO, tmp_path_factory.mktemp("models") / "mine"))


@pytest.fixture
def restored(model):
    yield model
    for file in model.iterdir():
        if not (MICRO / file.name).exists():
            file.unlink()
    for file in MICRO.iterdir():
        shutil.copyfile(file, model / file.name)


@settings(parent=quick, max_examples=25)
@given(
    st.sampled_from(
        ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    ),
    st.integers(1, 10**6),
)
def test_a_change_in_any_file_that_decides_gives_another_fingerprint(restored, name, where):
    file, before = restored / name, model_fingerprint(str(restored))
    content = bytearray(file.read_bytes())
    place = next(
        i % len(content)
        for i in range(where, where + len(content))
        if name.endswith("s") or chr(content[i % len(content)]).isdigit()
    )
    content[place] ^= 1
    if b'"transformers_version": "' in content[max(0, place - 40) : place]:
        return  # which says who saved it
    file.write_bytes(content)
    assert model_fingerprint(str(restored)) != before
    file.write_bytes((MICRO / name).read_bytes())
    assert model_fingerprint(str(restored)) == before


def test_other_tokens_and_another_configuration_are_another_cell(restored):
    cell = replace(CELL, model=str(restored))
    keys = {cell.key()}
    for name, old, new in (
        ("tokenizer.json", "Lowercase", "NFC"),
        ("config.json", '"rope_theta": 500.0', '"rope_theta": 400.0'),
    ):
        text = (restored / name).read_text()
        (restored / name).write_text(text.replace(old, new) if old in text else text + " ")
        keys.add(cell.key())
    assert len(keys) == 3


def test_who_saved_a_model_and_where_is_not_in_its_fingerprint(restored):
    before, path = model_fingerprint(str(restored)), restored / "config.json"
    assert before == model_fingerprint("micro")
    path.write_text(path.read_text().replace("5.23.0", "5.99.9"))
    path.write_text(path.read_text().replace("{", '{\n  "_name_or_path": "/home/me/x",', 1))
    (restored / "README.md").write_text("Mine.")
    (restored / "generation_config.json").write_text("{}")
    assert model_fingerprint(str(restored)) == before


def test_a_hub_model_is_named_with_the_commit_that_lies_here(tmp_path, monkeypatch):
    """The hub's main branch moves: other weights under the same name."""
    import huggingface_hub

    name, cell = "somebody/micro-again", replace(CELL, model="somebody/micro-again")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "models--somebody--micro-again"
    (place / "refs").mkdir(parents=True)
    found = {cell.key()}
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(MICRO, place / "snapshots" / commit)
        (place / "refs" / "main").write_text(commit)
        assert model_fingerprint(name) == f"{name}@{commit[:12]}"
        found.add(cell.key())
    assert len(found) == 3
    assert run_cell(cell)["config"]["model_fingerprint"] == f"{name}@{'b' * 12}"


def test_a_table_says_where_results_of_two_kinds_meet():
    def result(seed, **config):
        place = {"model": "micro", "dataset": "trec", "labels": "canonical", "data": "micro"}
        place |= {"method": "icl", "shots": 2, "seed": seed}
        measured = {"accuracy": 0.5, "accuracy_calibrated": 0.5, "split_sha256": "s"}
        return {"config": place | config, **measured, "seconds": {"fit": 1.0, "score": 1.0}}

    kinds = {"results_version": 1, "task_sha256": "b"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tables.frame([result(0, **kinds), result(1, **kinds)])
    for other in ({}, {**kinds, "results_version": 2}, {**kinds, "task_sha256": "c"}):
        with pytest.warns(UserWarning, match="different kinds stand side by side for trec"):
            tables.frame([result(0, **kinds), result(1, **other)])
    with pytest.raises(MiniCPTError, match="differ in results_version, task_sha256. Keep"):
        tables.frame([result(0, **kinds), result(0)])


# ---- a living process sees what a new one would ---------------------------------------------------------------------


def by_hand(cell):
    """What a new process computes: everything read anew."""
    split = data.make_split(data.load_task(cell.dataset, cell.data), *drawn(cell))
    predictor = fit(cell.method, load_base(cell.model, "cpu"), split)
    return predictor.scores([text for text, _ in split.queries])[0].tolist()


def drawn(cell):
    return cell.shots, cell.seed, cell.n_test


def test_a_cell_of_an_edited_task_is_computed_anew(tmp_path):
    results, out = [], Store(tmp_path / "out")
    for edit in (lambda *_: None, swap_words, move_a_row_over_the_border):
        spec, rows = copy.deepcopy(SPEC), copy.deepcopy(ROWS)
        edit(spec, rows, 0)
        cell = Cell(write_task(tmp_path / "task", spec, rows), "icl", 2, 0, n_test=9, device="cpu")
        assert run_grid([cell], out) == []
        results.append(out.get(cell))
        assert results[-1]["log_scores"] == [pytest.approx(row, abs=1e-3) for row in by_hand(cell)]
    assert len({result["split_sha256"] for result in results}) == 3
    assert len(list(out.results())) == 3


def other_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights = {name: w.flip(0) if w.ndim == 1 else -w for name, w in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_an_overwritten_model_is_loaded_anew(restored):
    cell = replace(CELL, model=str(restored), device="cpu")
    texts, labels = zip(*data.load_task("trec").train[:12])
    found = []
    for change in (lambda folder: None, other_weights):
        change(restored)
        scores = run_cell(cell)["log_scores"]
        assert scores == [pytest.approx(row, abs=1e-3) for row in by_hand(cell)]
        classifier = FewShotClassifier("icl", model=str(restored), shots=3).fit(texts, labels)
        base = classifier.predictor_.model.get_input_embeddings().weight
        assert torch.equal(base, load_base(str(restored)).model.get_input_embeddings().weight)
        found.append(scores)
    assert found[0] != found[1]


def test_an_overwritten_real_data_set_of_the_same_time_is_read_anew(tmp_path):
    (tmp_path / "sst2").mkdir()
    seen = []
    for flip in (0, 1):
        for split in ("train", "test"):
            file = tmp_path / "sst2" / f"{split}.jsonl"
            rows = [{"sentence": f"film {i}", "label": (i + flip) % 2} for i in range(20)]
            file.write_text("\n".join(map(json.dumps, rows)))
            os.utime(file, (1e9, 1e9))
        cell = Cell("sst2", "icl", 2, 0, data="real", data_dir=str(tmp_path))
        seen.append((cell.key(), cell.task().train[0]))
    assert [row for _, row in seen] == [("film 0", "negative"), ("film 0", "positive")]
    assert seen[0][0] != seen[1][0]


def test_files_that_change_while_a_cell_reads_them_are_an_error(tmp_path, monkeypatch):
    cell = Cell(write_task(tmp_path), "icl", 2, 0, n_test=4)
    base = cells._base

    def edited_meanwhile(*args):
        write_task(tmp_path, {**SPEC, "instruction": "Another."})
        return base(*args)

    monkeypatch.setattr(cells, "_base", edited_meanwhile)
    with pytest.raises(MiniCPTError, match="changed while they were read"):
        run_cell(cell)


def test_a_result_is_kept_under_what_it_was_computed_with(tmp_path, monkeypatch):
    """Also where the task is edited while the cell is being computed."""
    cell, out = Cell(write_task(tmp_path), "icl", 2, 0, n_test=4), Store(tmp_path / "out")

    def run(cell):
        config = cell.config()
        write_task(tmp_path, {**SPEC, "instruction": "Another."})
        return {"config": config, "accuracy": 0.5}

    monkeypatch.setattr(cells, "run_cell", run)
    run_grid([cell], out)
    assert out.get(cell) is None  # the edited task's cell is still to be computed
    write_task(tmp_path)
    assert out.get(cell)["accuracy"] == 0.5


# ---- fields have types ----------------------------------------------------------------------------------------------


@given(
    st.integers(-(2**20), 2**20),
    st.sampled_from([int, float, np.int64, np.int32, np.float64, np.float32]),
)
def test_a_whole_number_is_one_number_however_it_is_written(number, kind):
    seed, shots = kind(number), kind(abs(number) % 6 + 1)
    plain, cell = (
        Cell("trec", "icl", k, s, n_test=n, max_length=n)
        for k, s, n in ((int(shots), number, 5), (shots, seed, kind(5)))
    )
    assert cell == plain and cell.key() == plain.key() and json.dumps(cell.config())
    task = plain.task()
    assert data.make_split(task, shots, seed, kind(5)) == plain.split() == cell.split()


@given(
    st.one_of(
        st.floats().filter(lambda x: not x.is_integer()),
        st.integers().map(str),
        st.booleans(),
        st.sampled_from([None, np.float64(1.5), np.True_, [1], 1 + 0j, torch.tensor(1)]),
    )
)
def test_what_is_no_whole_number_is_an_error_that_names_field_and_value(value):
    for field in ("shots", "seed", "n_test"):
        with pytest.raises(MiniCPTError) as refused:
            replace(CELL, **{field: value})
        said = str(refused.value)
        assert said.startswith(f"{field} must be a whole number") and repr(value) in said
    task = CELL.task()
    for arguments in ((value, 0), (2, value), (2, 0, value)):
        with pytest.raises(MiniCPTError, match="must be a whole number"):
            data.make_split(task, *arguments)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("shots", -1, "shots must be a whole number from 0, such as 4; got -1"),
        ("n_test", 0, "n_test must be a whole number from 1"),
        ("max_length", 0, "max_length must be a whole number from 1"),
        ("max_length", "100", "max_length must be a whole number from 1, such as 4; got '100'"),
        ("per_class", "False", "per_class must be bool, got 'False'"),
        ("bos", 1, "bos must be bool, got 1"),
        ("dataset", 3, "dataset must be str, got 3"),
        ("model", Path("micro"), "model must be str, got "),
        ("device", 0, "device must be str | None, got 0"),
    ],
)
def test_a_field_of_another_type_is_an_error(field, value, message):
    with pytest.raises(MiniCPTError) as refused:
        replace(CELL, **{field: value})
    assert str(refused.value).startswith(message)


def test_numpys_numbers_are_hyper_parameters_too(tmp_path):
    hp = {"lr": np.float64(0.01), "epochs": np.int64(1)}
    cell = Cell("trec", "cpt", 2, 0, n_test=4, hp=hp)
    assert cell.hp == (("epochs", 1), ("lr", 0.01))
    assert cell == replace(cell, hp=(("lr", 0.01), ("epochs", 1)))
    (from_numpy,) = grid(["trec"], ["cpt"], np.array([2]), np.arange(1), n_test=4, hp=hp)
    assert from_numpy.key() == cell.key()
    assert run_grid([from_numpy], Store(tmp_path)) == []


def test_fit_and_the_classifier_take_the_same_numbers(random_base):
    split = data.make_split(data.load_task("trec"), 2, 1, 4)
    texts = [text for text, _ in split.queries]
    expected = fit("pt", random_base, split, {"epochs": 1}).scores(texts)[0]
    for seed in (1.0, np.int64(1)):
        found = fit("pt", random_base, replace(split, seed=seed), {"epochs": 1}).scores(texts)[0]
        assert torch.equal(found, expected)
    for bad in (1.5, "1", True):
        with pytest.raises(MiniCPTError, match="seed must be a whole number"):
            fit("pt", random_base, replace(split, seed=bad))
    X, y = zip(*data.load_task("trec").train[:12])
    drawn = [
        FewShotClassifier("icl", shots=shots, random_state=seed).fit(X, y).shots_
        for shots, seed in ((4, 3), (4.0, 3.0), (np.int64(4), np.int64(3)), (np.float64(4), 3))
    ]
    assert drawn == [drawn[0]] * 4
    for bad in ({"random_state": "3"}, {"random_state": 3.5}, {"random_state": True}):
        with pytest.raises(MiniCPTError, match="random_state must be a whole number"):
            FewShotClassifier("icl", **bad).fit(X, y)
    with pytest.raises(MiniCPTError, match="shots must be a whole number from 1"):
        FewShotClassifier("icl", shots=True).fit(X, y)
    with pytest.raises(MiniCPTError, match="calibrated must be bool, got 'False'"):
        FewShotClassifier("icl", calibrated="False").fit(X, y)


# ---- named twice ----------------------------------------------------------------------------------------------------

NAMES = st.lists(st.sampled_from(["trec", "sst2", "set_cls"]), min_size=1, max_size=5)
METHODS = st.lists(st.sampled_from(["zero", "icl", "cpt"]), min_size=1, max_size=5)
NUMBERS = st.lists(st.sampled_from([1, 2, 4, 4.0, np.int64(2)]), min_size=1, max_size=5)


@given(NAMES, METHODS, NUMBERS, NUMBERS)
def test_a_grid_holds_each_cell_once(datasets, methods, shots, seeds):
    found = grid(datasets, methods, (k for k in shots), seeds)
    keys = {cell.key() for cell in found}
    per_dataset = sum(1 if m == "zero" else len({*shots}) for m in {*methods})
    assert len(found) == len(keys) == len({*datasets}) * per_dataset * len({*seeds})


def test_one_model_and_one_task_under_two_names_are_one(model, tmp_path):
    one, other = (Cell(write_task(tmp_path, name=n), "icl", 2, 0, n_test=4) for n in ("x", "y"))
    assert distinct([one, other, one]) == [one]
    moved = shutil.copytree(model, tmp_path / "mine")
    here, there = (replace(CELL, model=str(place)) for place in (model, moved))
    assert distinct([here, there]) == [here]


def test_commands_compute_what_is_named_twice_once(tmp_path, monkeypatch, capsys):
    def command(*args):
        monkeypatch.setattr("sys.argv", ["minicpt", *args])
        return main()

    where = "--shots", "2", "2", "--seeds", "1", "--n-test", "8", "--datasets", "trec", "trec"
    out = "--out", str(tmp_path / "out")
    twice = "--methods", "zero", "zero", "icl", "--model", "micro", "micro"
    assert command("table", *twice, *where, *out) == 0
    assert "2 cells, 0 already in" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
    with pytest.raises(SystemExit):
        command("ablations", *where, "--variants", "icl", "icl", "--dry-run", *out)
    assert "2 cells, 1 done" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mine", "trec"])
def test_two_tasks_of_one_name_are_refused_before_anything_is_computed(
    tmp_path, monkeypatch, capsys, name
):
    first = write_task(tmp_path / "a", {**SPEC, "name": name})
    second = write_task(tmp_path / "b", {**SPEC, "name": name}, ROWS[1:])
    tasks = [first, second] if name == "mine" else ["trec", second]
    monkeypatch.setattr(executors, "attempt", lambda *_: pytest.fail("it computes"))
    for command in ("table", "ablations"):
        args = [command, "--datasets", *tasks, "--seeds", "1", "--out", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", ["minicpt", *args])
        assert main() == 2
        assert f"Two different tasks are called '{name}'" in capsys.readouterr().err


# ---- files that others write too ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1), min_size=4, max_size=4))
def test_two_hosts_with_one_process_id_tear_nothing(tmp_path_factory, order):
    """Both write the same file, each in two acts (the temporary file, then its place), in any order of these acts."""
    path, acts, replaced = tmp_path_factory.mktemp("shared") / "result.json", {}, os.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 4711)
        patch.setattr(os, "replace", lambda *files: acts.setdefault(host, files))
        for host in (*order, 0, 1):
            if host not in acts:
                store.write_atomically(path, json.dumps({"from": host}))
            elif acts[host]:
                replaced(*acts[host])
                acts[host] = None
                assert json.loads(path.read_text()) == {"from": host}
        for host, files in acts.items():
            if files:
                replaced(*files)
    assert json.loads(path.read_text())["from"] in (0, 1)
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_a_temporary_name_holds_the_host_and_a_random_part_and_the_file_has_the_usual_rights(
    tmp_path, monkeypatch
):
    seen, replaced = [], os.replace

    def replace_file(source, target):
        seen.append(Path(source).name)
        replaced(source, target)

    monkeypatch.setattr(os, "replace", replace_file)
    for _ in range(2):
        store.write_atomically(tmp_path / "a.json", "{}")
    (tmp_path / "plain").write_text("")
    assert len({*seen}) == 2 and all(platform.node() in name for name in seen)
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "out"


def full_disk(tmp_path, monkeypatch):
    """A kilobyte still fits."""
    write = Path.write_text

    def until_full(self, text, *args, **kwargs):
        if len(text) > 1024:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", until_full)
    return tmp_path / "out"


def read_only(tmp_path, monkeypatch):
    def refused(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refused)
    return tmp_path / "out"


@pytest.mark.parametrize("out", [no_folder, full_disk, read_only])
def test_a_folder_that_takes_no_files_is_noticed_before_the_first_cell(out, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "attempt", lambda *_: pytest.fail("it computes"))
    folder = out(tmp_path, monkeypatch)
    with pytest.raises(OSError):
        run_grid([CELL], Store(folder))
    assert not folder.is_dir() or not list(folder.iterdir())


def test_looking_for_room_leaves_nothing_behind(tmp_path):
    Store(tmp_path / "out").check_room()
    assert list((tmp_path / "out").iterdir()) == []

"""The data script: rows from a folder in the hub's schema, cards, hashes that notice a change, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minicpt.data import ASSETS, load_real_task, real_specs, split_hashes
from minicpt.errors import MiniCPTError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data_scripts"))
import prepare_data  # noqa: E402


@pytest.fixture
def source(tmp_path):
    """TREC and RTE in the hub's schema, a few made-up rows."""
    rows = {
        "trec": [
            {"text": f"what is {i} ?", "coarse_label": i % 6, "fine_label": i} for i in range(24)
        ],
        "rte": [
            {"premise": f"p {i}", "hypothesis": f"h {i}", "idx": i, "label": i % 2}
            for i in range(24)
        ],
    }
    for name, table in rows.items():
        (tmp_path / "source" / name).mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / "source" / name / f"{split}.jsonl").write_text(
                "\n".join(map(json.dumps, table))
            )
    return tmp_path / "source"


def prepare(*args):
    return subprocess.run(
        [sys.executable, ROOT / "data_scripts" / "prepare_data.py", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"},
    )


@pytest.mark.slow
def test_rows_cards_and_hashes_from_a_folder(source, tmp_path):
    out = tmp_path / "out"
    run = prepare("trec", "rte", "--out", out, "--from-dir", source)
    assert run.returncode == 0 and "24 train" in run.stdout and "not seen before" in run.stdout, (
        run.stderr
    )
    for name in ("trec", "rte"):
        columns = set(json.loads((out / name / "train.jsonl").read_text().splitlines()[0]))
        assert columns == set(
            json.loads((source / name / "train.jsonl").read_text().splitlines()[0])
        )
        assert load_real_task(name, out) == load_real_task(name, source)
    card = (out / "trec" / "README.md").read_text()
    assert (
        "| 0 | ABBR | Abbreviation | 4 | 4 |" in card
        and "| 2 | DESC | Description | 4 | 4 |" in card
    )
    assert "not the whole split, which has 5452 on the hub" in card and "Older hub versions" in card
    (source / "trec" / "train.jsonl").unlink()  # fetched once: the source is not asked again
    assert prepare("trec", "--out", out, "--from-dir", source).returncode == 0


@pytest.mark.slow
def test_what_goes_wrong_is_said_and_the_others_get_their_turn(source, tmp_path):
    (source / "rte" / "test.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 0}')
    run = prepare("rte", "sst2", "tree", "trec", "--out", tmp_path / "out", "--from-dir", source)
    assert run.returncode == 1 and "Traceback" not in run.stderr and "trec" in run.stdout
    assert (
        "rte/test.jsonl has no column 'hypothesis'; it has sentence1, sentence2, label"
        in run.stderr
    )
    assert "sst2/train.jsonl does not exist" in run.stderr and "Unknown task 'tree'" in run.stderr
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_frozen_hashes_notice_another_sampler(source, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "FROZEN", tmp_path / "frozen.json")
    (tmp_path / "frozen.json").write_text("{}")
    task = load_real_task("trec", source)
    assert "not seen before (0 other" in prepare_data.check("trec", task, freeze=False)
    assert prepare_data.check("trec", task, freeze=True) == "hashes recorded"
    assert prepare_data.check("trec", task, freeze=False) == "splits as frozen"
    monkeypatch.setattr(
        prepare_data, "split_hashes", lambda task: split_hashes(task, seeds=range(1, 6))
    )
    with pytest.raises(MiniCPTError, match="the sampler has changed"):
        prepare_data.check("trec", task, freeze=True)


def test_the_committed_hashes_hold_no_rows_and_every_real_task():
    frozen = json.loads((ASSETS / "real_splits.json").read_text())
    assert set(frozen) == set(real_specs())
    for versions in frozen.values():
        for sha, kept in versions.items():
            assert (
                len(sha) == 16
                and set(kept) == {"train", "test", "splits"}
                and len(kept["splits"]) == 15
            )
            assert all(len(value) == 16 for value in kept["splits"].values())


def test_label_order_is_that_of_the_hub():
    classes = {name: list(spec["verbalizers"]) for name, spec in real_specs().items()}
    assert classes["trec"] == ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
    assert classes["rte"] == ["entailment", "not_entailment"] and classes["boolq"] == [
        "False",
        "True",
    ]
    assert (
        classes["ag_news"] == ["World", "Sports", "Business", "Sci/Tech"]
        and len(classes["dbpedia"]) == 14
    )

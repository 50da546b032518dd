"""The tuning script: what it tries, how it reads finished cells, what it writes into hyperparameters.json."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from minicpt.data import ASSETS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data_scripts"))
import tune  # noqa: E402

CHOSEN = json.loads((ASSETS / "hyperparameters.json").read_text())


def means_of(model: str, accuracy) -> pd.Series:
    """A mean for every setting: `accuracy(method, number of the setting)`."""
    plan, rows = tune.PLANS[model], {}
    for method in plan.grids:
        for i, setting in enumerate(tune.settings(plan, model, method)):
            rows[method, json.dumps(setting)] = accuracy(method, i)
    return pd.Series(rows).rename_axis(["method", "setting"])


@pytest.mark.parametrize("model", tune.PLANS)
def test_every_method_gets_eight_settings(model):
    means = means_of(model, lambda method, i: 0.5)
    assert {*means.groupby("method").size()} == {8}


def test_the_committed_values_of_micro_are_the_winners_of_its_committed_trials():
    trials = CHOSEN["micro_tuning"]
    again = tune.choose(
        CHOSEN, "micro", means_of("micro", lambda method, i: trials[method][i]["accuracy"])
    )
    for part in ("micro", "micro_tuning"):
        assert {**again[part], "how": ""} == {**CHOSEN[part], "how": ""}
    assert again["hub"] == CHOSEN["hub"]


def test_smollm2s_winners_serve_their_relatives_and_leave_the_papers_values_alone():
    new = tune.choose(CHOSEN, "smollm2", means_of("smollm2", lambda method, i: i / 10))
    hub = new["hub"]
    assert (hub["cpt"]["lr"], hub["cpt"]["epsilon"], hub["cpt"]["epsilon_format"]) == (
        0.1,
        1.0,
        1.0,
    )
    assert hub["cpt"]["epsilon_unit"] == "mean_norm" and hub["cpt"]["epochs"] == 20
    assert hub["lora"] == {"lr": 0.01, "epochs": 20, "batch_size": 0, "rank": 8, "alpha": 16}
    assert hub["cpt_instr"] == hub["cpt"]
    assert hub["cpt_train_label"] == {**hub["cpt"], "context_weight": 0.0}
    assert hub["pt_instr"] == {name: hub["pt"][name] for name in ("lr", "epochs", "batch_size")}
    for method in ("cpt_paper_eps", "iapt", "ct_prompt", "ct_kv"):
        assert hub[method] == CHOSEN["hub"][method]
    assert [trial["accuracy"] for trial in new["hub_tuning"]["pt"]] == [i / 10 for i in range(8)]
    assert new["micro"] == CHOSEN["micro"]


@pytest.fixture
def store(tmp_path):
    """Finished cells as an older version wrote them: another name of the model, no `bos`, other fields besides."""
    tried = tune.trials("smollm2", ["lora"])
    for i, (_, _, cell) in enumerate(tried):
        config = {**vars(cell), "hp": dict(cell.hp), "model": "a-folder", "task_sha256": "0"}
        del config["bos"], config["data_dir"], config["device"]
        (tmp_path / f"{i:040}.json").write_text(
            json.dumps({"config": config, "accuracy": i / len(tried), "notes": []})
        )
    return tmp_path, [cell for *_, cell in tried]


def test_finished_cells_of_an_older_version_are_read(store):
    folder, cells = store
    found = tune.accuracies(folder, cells)
    assert found == pytest.approx([i / len(cells) for i in range(len(cells))], abs=1e-4)
    assert len(cells) == 8 * 2 * 3


def test_a_missing_cell_and_two_that_differ_are_refused(store):
    folder, cells = store
    first = folder / f"{0:040}.json"
    other = json.loads(first.read_text())
    first.unlink()
    with pytest.raises(SystemExit, match="lacks 1 of 48 cells"):
        tune.accuracies(folder, cells)
    for number, accuracy in ((0, 0.5), (99, 0.6)):
        content = json.dumps({**other, "accuracy": accuracy})
        (folder / f"{number:040}.json").write_text(content)
    with pytest.raises(SystemExit, match="two results that differ"):
        tune.accuracies(folder, cells)

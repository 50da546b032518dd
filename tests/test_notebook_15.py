"""The capstone's committed run: the cells are what the notebook says, and its conclusions say what they say."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from minicpt.data import ASSETS, TASKS
from minicpt.lab.statistics import interval, signed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def cells():
    return pd.read_csv(ASSETS / "reference_capstone.csv")


def test_the_settings_were_chosen_on_other_seeds_from_as_many_as_cpt_had(cells):
    tuning, test = cells[cells.stage == "tuning"], cells[cells.stage == "test"]
    assert {*tuning.seed} == {100, 101, 102} and {*test.seed} == {*range(10)}
    means = tuning.groupby(["lr", "epsilon"]).accuracy.agg(["mean", "size"])
    assert len(means) == 8 and {*means["size"]} == {3 * len(TASKS)}
    mine = test[test.method == "mine"][["lr", "epsilon"]].drop_duplicates()
    assert mine.values.tolist() == [[*means["mean"].idxmax()]]


def test_all_methods_met_on_the_same_splits(cells):
    test = cells[cells.stage == "test"]
    assert len(test) == 3 * 10 * len(TASKS)
    met = test.groupby(["task", "seed"]).agg({"split": "nunique", "method": "nunique"})
    assert {*met.split} == {1} and {*met.method} == {3}


def test_the_conclusions_give_the_intervals_of_the_committed_cells(cells):
    test = cells[cells.stage == "test"]
    by_seed = test.pivot_table("accuracy", "seed", "method")
    book = nbformat.read(ROOT / "notebooks" / "15_capstone.ipynb", as_version=4)
    page = next(cell.source for cell in book.cells if cell.id == "s6").replace("−", "-")
    for rival in ("ICL", "CPT"):
        mean, _, low, high = interval(by_seed["mine"] - by_seed[rival])
        assert signed(mean, low, high) in page, rival
    means = test.groupby("method").accuracy.mean().round(1)
    said = re.search(r"ICL ([\d.]+), CPT ([\d.]+), mine ([\d]+\.\d)", page)
    assert [float(value) for value in said.groups()] == means[["ICL", "CPT", "mine"]].tolist()

"""Notebook 03's stored grids: the script makes the committed rows, and the notebook quotes what they say."""

import importlib
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

from minicpt.data import ASSETS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data_scripts"))
script = importlib.import_module("soft_prompt_grid")
sys.path.pop(0)
INTERVAL = re.compile(r"[+-]\d+ \[[+-]\d+, [+-]\d+\]")


@pytest.fixture(scope="module")
def micro():
    torch.set_num_threads(1)
    return script.load_base("micro", "cpu")


def split(seed):
    return script.make_split(
        script.load_task("ag_news"), script.SHOTS, seed, script.QUERIES, "arbitrary"
    )


@pytest.mark.slow
def test_the_script_makes_the_committed_rows(micro):
    settings = [("scaled", 0.01), ("labels", 0.1)]
    stored = pd.read_csv(ASSETS / "reference_soft_prompts.csv")
    rows = pd.DataFrame(script.cells(micro, split(0), 1, 25, settings))
    both = rows.merge(stored, on=["init", "tokens", "rate", "seed"])
    assert len(both) == len(settings)
    assert (both.accuracy_x - both.accuracy_y).abs().max() <= 0.02
    assert (both.loss_x - both.loss_y).abs().max() < 0.01


def test_prompts_trained_together_end_where_they_end_alone(micro):
    rows = script.unanswered(micro, split(0), split(0).shots)
    starts = torch.stack([script.start(micro, split(0), init, 2) for init in ("random", "labels")])
    together, _ = script.train_prompts(micro.model, starts, [1e-3, 0.1], 3, rows)
    for prompt, begin, rate in zip(together, starts, [1e-3, 0.1]):
        alone, _ = script.train_prompts(micro.model, begin[None], [rate], 3, rows)
        assert torch.allclose(prompt, alone[0], atol=1e-4)


@pytest.mark.parametrize("table", script.FILES)
def test_the_stored_grids_are_whole(table):
    plan, name, keys, values = script.FILES[table]
    stored = pd.read_csv(ASSETS / name)
    assert list(stored.columns) == keys + values
    assert not stored.duplicated(keys).any()
    assert len(stored) == len(script.SEEDS) * sum(len(settings) for _, _, settings in plan)


def test_the_two_stored_grids_agree_where_they_meet():
    short = (
        pd.read_csv(ASSETS / "reference_soft_prompt_steps.csv")
        .query("steps == 25")
        .assign(tokens=8)
    )
    both = short.merge(
        pd.read_csv(ASSETS / "reference_soft_prompts.csv"), on=["init", "tokens", "rate", "seed"]
    )
    assert len(both) == len(short) > 0
    assert (both.accuracy_x == both.accuracy_y).all()


def test_every_interval_that_notebook_03_quotes_stands_in_a_table_of_it():
    book = nbformat.read(ROOT / "notebooks" / "03_soft_prompts.ipynb", as_version=4)
    printed = {
        found
        for cell in book.cells
        for output in cell.get("outputs", [])
        for text in (output.get("text", ""), output.get("data", {}).get("text/html", ""))
        for found in INTERVAL.findall(text)
    }
    told = [
        found
        for cell in book.cells
        if cell.cell_type == "markdown"
        for found in INTERVAL.findall(cell.source)
    ]
    assert len(told) >= 6
    assert [found for found in told if found not in printed] == []

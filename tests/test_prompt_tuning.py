"""The script that compares prompt tuning with its rivals, on the micro model: every method leaves an honest row."""

import importlib
import json
from pathlib import Path

import pandas as pd
import pytest

from minicpt import load_base, load_task

SCRIPTS = Path(__file__).resolve().parent.parent / "data_scripts"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("compare_prompt_tuning")
    monkeypatch.setattr(script, "load_task", lambda name, data: load_task(name))
    monkeypatch.setattr(script, "BASE", load_base("micro", "cpu"), raising=False)
    monkeypatch.setattr(script, "STEPS", 4)
    monkeypatch.setattr(script, "TRAIN_TOKENS", 20)
    monkeypatch.setattr(script, "CONTEXT_TOKENS", 100)
    return script


@pytest.mark.parametrize(
    "method, lr, prompt, trained",
    [
        ("icl", 0.0, (), 0),
        (
            "lora",
            3e-2,
            (),
            4 * 2 * 8 * (128 + 128),
        ),  # q and v of four layers, rank 8, both matrices
        ("full", 1e-3, (), None),
        ("prompt", 0.1, (8, "random"), 8 * 128),
        ("prompt", 0.1, (8, "text"), 8 * 128),
    ],
)
def test_a_trial_leaves_a_row_whose_numbers_are_what_they_say(
    compare, tmp_path, method, lr, prompt, trained
):
    trial = compare.Trial(method, 16, 0, 6, lr, *prompt)
    base = compare.BASE
    weights = sum(p.numel() for p in base.model.parameters())
    compare.measure(trial, tmp_path)
    row = json.loads(compare.path_of(trial, tmp_path).read_text())
    assert row["trained"] == (weights if trained is None else trained)
    assert row["bytes"] >= 4 * row["trained"] and 0 <= row["accuracy"] <= 1
    assert row["steps"] == (0 if method == "icl" else 4)
    if method == "icl":
        assert 0 < row["context_rows"] < 16 and row["context_tokens"] <= 100
    else:
        assert row["loss_last"] < row["loss_first"]


def test_all_methods_see_the_same_queries_and_a_larger_number_of_rows_holds_the_smaller(compare):
    draws = [compare.draw(compare.BASE, compare.Trial("icl", n, 0, 6)) for n in (16, 64)]
    assert draws[0].queries == draws[1].queries
    assert set(draws[0].shots) <= set(draws[1].shots)
    lengths = map(len, compare.BASE.tokenizer([text for text, _ in draws[1].shots])["input_ids"])
    assert max(lengths) <= compare.TRAIN_TOKENS


def test_the_tables_hold_means_of_the_comparison_and_nothing_of_the_tuning(compare, tmp_path):
    rows = []
    for seed, accuracy in ((0, 0.5), (1, 0.7), (100, 0.0)):
        row = dict(method="prompt", tokens=8, start="text", rows=64, seed=seed, lr=0.1)
        row |= dict(accuracy=accuracy, trained=1024, bytes=4096, peak_fit_mb=512.0)
        rows.append(row | dict(peak_score_mb=256.0, seconds_step=0.5, seconds_switch=0.25))
    table = pd.DataFrame(rows)
    assert "| prompt, 8 tokens, text | 60.0 ±14.1 (2) |" in compare.accuracy_block(table)
    expected = "| prompt, 8 tokens, text | 1,024 | 4 | 0.50 | 0.25 | 0.50 | 0.25 |"
    assert expected in compare.cost_block(table)


def test_the_best_rate_is_that_of_the_best_mean_and_the_smaller_on_a_tie(compare):
    found = []
    for method, rates in compare.RATES.items():
        for lr, accuracy in zip(rates, (0.5, 0.6, 0.6)):
            found.append(dict(method=method, lr=lr, accuracy=accuracy))
    assert compare.best_rates(found) == {m: rates[1] for m, rates in compare.RATES.items()}

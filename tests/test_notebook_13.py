"""Notebook 13 beyond the micro model: architectures that name their layers otherwise; its picture and its runs."""

import io
import itertools
import re
import sys
import warnings
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image

from minicpt import load_base
from minicpt.data import ASSETS
from minicpt.lab.statistics import interval

ROOT = Path(__file__).resolve().parent.parent
BOOK = nbformat.read(ROOT / "notebooks" / "13_lora_and_peft.ipynb", as_version=4)
D = 32
SMALL = dict(hidden_size=D, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
LLAMA = SMALL | dict(intermediate_size=48, num_key_value_heads=2, head_dim=8)
FEED = SMALL | dict(intermediate_size=48)
ARCHITECTURES = {
    "Llama": LLAMA,  # two keys for four queries
    "Qwen2": {k: v for k, v in LLAMA.items() if k != "head_dim"},  # biases on q, k and v
    "Gemma": LLAMA,
    "GPTNeoX": FEED,  # q, k and v in one layer
    "Bloom": dict(hidden_size=D, n_layer=2, n_head=4, initializer_range=0.2),
    "OPT": SMALL | dict(ffn_dim=48, word_embed_proj_dim=D),
    "Phi": FEED,
}
SETTINGS = dict(steps=2, n_test=4, shots=2, seeds=2, tuning_seeds=1, rates=[0.01], rounds=1, live=1)


def folder_of(architecture, folder):
    """A tiny random model with the micro model's tokenizer, saved to a folder."""
    tokenizer = load_base("micro").tokenizer
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, **ARCHITECTURES[architecture]
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_cells(last, **parameters):
    """Run the notebook's code cells up to one, figures and all, and return its names."""
    names = {"display": print}
    for cell in BOOK.cells:
        if cell.cell_type == "code" and "check" not in cell.metadata.get("tags", []):
            exec(compile(cell.source, cell.id, "exec"), names)  # noqa: S102  our own notebook
            if "parameters" in cell.metadata.get("tags", []):
                assert parameters.keys() <= names.keys()
                names.update(parameters)
            if cell.id == last:
                return names
    raise AssertionError(f"no cell {last}")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_methods_equal_peft_on_other_architectures(architecture, tmp_path, capsys):
    with warnings.catch_warnings():
        names = run_cells("contract-counts", model=folder_of(architecture, tmp_path), **SETTINGS)
    assert "start as the base model: True" in capsys.readouterr().out
    assert len(names["apart"]) == 5 and max(map(max, names["apart"].values())) < 1e-4


@pytest.mark.slow
def test_the_whole_notebook_runs_on_another_model(tmp_path):
    file = tmp_path / "runs.csv"
    with warnings.catch_warnings():
        folder = folder_of("Llama", tmp_path / "model")
        names = run_cells("costs", model=folder, runs_file=file, **SETTINGS)
    runs = pd.read_csv(file)
    assert len(runs) == 7 * (1 + 2) + 2 and set(runs.method) == {*names["names"], "zero-shot"}
    assert set(names["times"].index) == {*names["names"], "zero-shot"}


def test_finished_runs_tune_every_method_with_equal_effort():
    runs = pd.read_csv(ASSETS / "reference_peft_methods.csv")
    parameters = next(cell for cell in BOOK.cells if "parameters" in cell.metadata.get("tags", []))
    given = {}
    exec(parameters.source, given)  # noqa: S102
    tuning, reported = runs[runs.seed >= 100], runs[runs.seed < 100]
    trained = reported[reported.method != "zero-shot"]
    assert tuning.method.nunique() == trained.method.nunique() == 7
    for method, tried in tuning.groupby("method"):
        means = tried.groupby("rate").accuracy.agg(["mean", "count"])
        assert list(means.index) == given["rates"] and set(means["count"]) == {
            given["tuning_seeds"]
        }
        chosen = trained[trained.method == method]
        assert set(chosen.rate) == {means["mean"].idxmax()}
    for _, rows in reported.groupby("method"):
        assert sorted(rows.seed) == list(range(given["seeds"]))


def test_what_the_text_says_of_the_runs_holds():
    """Section 5 names the pairs that ten draws cannot rank, and the best method at each of five rates."""
    runs = pd.read_csv(ASSETS / "reference_peft_methods.csv")
    reported = runs[runs.seed < 100].pivot(index="seed", columns="method", values="accuracy")
    undecided = set()
    for one, other in itertools.combinations(reported, 2):
        _, _, low, high = interval(reported[one] - reported[other])
        if low <= 0 <= high:
            undecided.add(frozenset((one, other)))
    pairs = [("IA³", "BitFit"), ("IA³", "full fine-tuning"), ("LoRA", "prompt tuning")]
    pairs.append(("prompt tuning", "prefix tuning"))
    assert undecided == set(map(frozenset, pairs))
    assert reported.mean().idxmin() == "zero-shot" and round(reported["zero-shot"].mean()) == 45
    tuning = runs[runs.seed >= 100].groupby(["method", "rate"]).accuracy.mean().unstack()
    best = {
        0.001: "full fine-tuning",
        0.01: "adapter",
        0.1: "BitFit",
        0.3: "IA³",
        1.0: "prompt tuning",
    }
    assert {rate: tuning[rate].idxmax() for rate in best} == best
    assert [round(tuning.loc["LoRA", rate]) for rate in (0.01, 0.03, 0.1)] == [75, 76, 23]
    assert round(reported["LoRA"].mean()) == 63


def test_map_is_small_and_says_what_the_methods_are():
    png = (ROOT / "docs/peft_map.png").read_bytes()
    assert len(png) < 100_000 and Image.open(io.BytesIO(png)).width > 1200
    sys.path.insert(0, str(ROOT / "data_scripts"))
    try:
        from draw_peft_map import LEGEND
    finally:
        sys.path.pop(0)
    source = "\n".join(cell.source for cell in BOOK.cells)
    alt = re.search(r"!\[(.+?)\]\(\.\./docs/peft_map\.png\)", source, re.S)[1]
    for name, *_ in LEGEND:
        assert name.split()[0].lower() in alt.lower(), name

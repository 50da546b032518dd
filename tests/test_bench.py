"""The benchmark of whole cells compares equals, and runs where neither the real model nor real text is."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minicpt.engine.base_models import MICRO, BaseModel

PATH = Path(__file__).parent / "bench" / "cells.py"
sys.path.insert(0, str(PATH.parent))  # it reads bench.py


@pytest.fixture(scope="module")
def cells():
    spec = importlib.util.spec_from_file_location("cells", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.N_TEST, module.TOKENS = 24, 200
    return module


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return BaseModel("smollm2", model, AutoTokenizer.from_pretrained(MICRO), "random")


@pytest.mark.parametrize("name", ["sst2-4", "dbpedia-4"])
def test_all_ways_of_a_cell_give_the_same_numbers_and_a_row_of_the_table(cells, small, name):
    result = cells.measure(small, False, name, rounds=1)
    assert max(result["equality"].values()) < 1e-4
    text = cells.table({"threads": 1, "cells": [result]})
    assert text.count("4 shots") == 3 and "Random weights" in text


def test_ways_that_disagree_are_not_timed(cells, small):
    cell = cells.Cell(small, cells.the_split("sst2", 4, False)[0])
    cell.our_scores = lambda queries: torch.zeros(len(queries), 2)
    with pytest.raises(SystemExit, match="disagree.*Nothing was timed"):
        cell.check_equal()

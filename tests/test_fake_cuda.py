"""On a GPU that is none (`pretend_gpu.py`): no operation mixes devices, no step waits, the numbers are the CPU's."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minicpt.core.train import LOOK
from minicpt.methods.registry import METHODS

HERE = Path(__file__).parent
# runs that are not a method by its name alone
OTHERS = [
    "cpt, two rows a step",
    "pt, eleven steps",
    "pt in a ball",
    "iapt, held-out rows",
    "ct_prompt, other rows each",
]
READS_LOSSES = "minicpt/core/train.py:train"
READS_SCORES = "minicpt/engine/scores.py:label_token_scores"
# transformers asks twice whether a mask hides anything, where rows are run whole and some are padded
LOOKS_AT_MASK = "transformers/masking_utils.py:_ignore_causal_mask_sdpa"

# one process computes the table for all of them
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fake_cuda")]


@pytest.fixture(scope="module")
def pretended():
    """All that is looked at here, from one process: a device that is registered stays registered."""
    command = [sys.executable, str(HERE / "pretend_gpu.py")]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_what_cuda_refuses_is_refused_and_what_it_allows_is_not(pretended):
    for name, refusal in pretended["mixtures"].items():
        if name.startswith("allowed"):
            assert refusal is None, name
        else:
            assert "same device" in refusal, name


def test_a_tensor_that_was_forgotten_on_the_cpu_is_found(pretended):
    assert "same device" in pretended["bug"]


def test_masks_projection_and_loss_are_the_cpus(pretended):
    assert len(pretended["core"]) == 10
    assert max(pretended["core"].values()) < 1e-6


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_every_method_trains_and_scores_there_as_on_the_cpu(pretended, name):
    found = pretended["methods"][name]
    assert found["steps"] == 0 or found["steps"] >= 3
    assert found["losses differ by"] < 1e-4
    assert found["scores differ by"] < 1e-4


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_no_step_waits_and_the_losses_are_read_every_ten_steps(pretended, name):
    found = pretended["methods"][name]
    waits = dict(found["waits in the loop"])
    assert waits.pop(READS_LOSSES, 0) == math.ceil(found["steps"] / LOOK)
    passes = found["steps"] * (2 if "held-out" in name else 1)
    assert waits.pop(LOOKS_AT_MASK, 0) in (0, 2 * passes)
    assert waits == {}


def test_a_context_that_is_shared_lets_not_even_transformers_wait(pretended):
    for name in ("cpt", "cpt_instr", "ipt", "ct_kv"):
        assert LOOKS_AT_MASK not in pretended["methods"][name]["waits in the loop"]


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_scores_are_read_once(pretended, name):
    waits = dict(pretended["methods"][name]["waits of scoring"])
    assert waits.pop(READS_SCORES) == 1
    # a batch of padded rows without a prefix; IAPT has to know where the answer begins
    assert waits.pop(LOOKS_AT_MASK, 0) <= 2
    assert waits.pop("minicpt/dropin/iapt.py:forward", 0) <= 1
    assert waits == {}


def test_the_wrapped_model_takes_tensors_of_the_gpu_and_reads_each_once(pretended):
    found = pretended["wrapped"]
    assert found["loss"] < 1e-5
    assert found["gradient"] < 1e-5
    assert found["scores"] < 1e-4
    assert found["same text"]
    assert found["waits"] == 4  # ids, mask, labels and roles; all four at the call's beginning

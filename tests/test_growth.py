"""What tests/bench compares is the same: PEFT's numbers are minicpt's, many prompts' those of each alone."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest

from minicpt import load_base


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))


def test_both_libraries_agree_on_labels_of_several_tokens():
    import growth

    point = growth.Point("classes", 3, K=2, text=16, C=3, label=2, size=1)
    work = growth.Work(growth.base_model(1), point)
    work.check_equal()
    assert len(work.score_by_peft()) == growth.ROWS  # of three beginnings for each of two queries
    work.models["PEFT"].prompt_encoder["default"].delta_embedding.weight.data[3] += 0.01
    with pytest.raises(AssertionError):
        work.check_equal()


def test_peft_runs_fewer_rows_where_four_would_be_too_large(monkeypatch):
    import growth

    point = growth.Point("size", 1, K=2, text=16, size=1)
    base = growth.base_model(1)
    needed = growth.training_bytes(base, 2, 62, 29, False, 62 + 29)
    monkeypatch.setattr(growth, "LARGEST", needed)
    work = growth.Work(base, point)
    assert work.rows == 2
    calls = work.calls()
    assert calls["step", "PEFT"][1:] == (2, 2)
    assert calls["step", "minicpt"][1:] == (1, 1)
    work.check_equal()


def test_a_slope_is_the_exponent_of_growth():
    import growth

    points = pd.DataFrame({"value": [2, 8, 50], "seconds": [3 * x**1.5 for x in (2, 8, 50)]})
    assert growth.slope(points, "seconds") == pytest.approx(1.5)


def test_a_point_is_measured_once_and_anew_when_its_meaning_changes(tmp_path, monkeypatch):
    import growth

    class Here:  # instead of a process
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, _, point):
            asked.append(point)
            return self

        def result(self):
            return [{"seconds": 1.0}]

    asked = []
    monkeypatch.setattr(growth, "ProcessPoolExecutor", Here)
    point = growth.Point("size", 1, size=1)
    for _ in range(2):
        assert growth.measured(point, tmp_path, {"torch": "2"}) == [{"seconds": 1.0}]
    assert asked == [point]
    assert json.loads((tmp_path / "size_1.json").read_text())["asked"]["K"] == asdict(point)["K"]
    growth.measured(replace(point, K=5), tmp_path, {"torch": "2"})
    growth.measured(replace(point, K=5), tmp_path, {"torch": "3"})
    assert len(asked) == 3


def test_prompts_trained_in_one_batch_have_the_losses_and_gradients_they_have_alone():
    import many

    model = load_base("micro").model
    prompts = [many.Alone(model, 3, 13, seed) for seed in range(3)]
    together = many.Together(model, prompts)
    many.check_equal(prompts, together)
    together.step()
    alone = many.Alone(model, 3, 13, 2)
    alone.step()
    assert (prompts[2].delta - alone.delta).abs().max() < 1e-5 * alone.delta.abs().max() + 1e-7
    together.targets = together.targets.roll(1, 0)
    with pytest.raises(AssertionError):
        many.check_equal(prompts, together)

"""Tables: against scipy and pandas done by hand, properties of the intervals, and the errors people will meet."""

import copy
import json
import math
import os
import statistics as plain

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from minicpt.errors import MiniCPTError
from minicpt.lab import report, statistics, tables

BLOOM = "bigscience/bloom-1b7"
ACCURACIES = st.lists(st.floats(0, 1, width=16), min_size=2, max_size=14)


def result(
    method="icl",
    accuracy=0.5,
    seed=0,
    shots=2,
    dataset="sst2",
    labels="canonical",
    model="micro",
    data="real",
    **extra,
):
    config = {
        "table": "few_shot",
        "model": model,
        "dataset": dataset,
        "labels": labels,
        "method": method,
        "shots": shots,
        "seed": seed,
        "data": data,
    }
    return {
        "config": config,
        "accuracy": accuracy,
        "accuracy_calibrated": None,
        "seconds": {"fit": 1.5, "score": 0.5},
        "split_sha256": f"{dataset}-{shots}-{seed}",
        **extra,
    }


@pytest.fixture
def results():
    """Two datasets, ICL and CPT, 2 and 4 shots, three seeds; CPT is 0.1 + 0.01 * seed above ICL."""
    found = [result("zero", 0.25, dataset=dataset, shots=0) for dataset in ("trec", "sst2")]
    for dataset, base in (("trec", 0.3), ("sst2", 0.6)):
        for shots in (2, 4):
            for seed in range(3):
                icl = base + 0.02 * shots + 0.05 * seed
                found += [
                    result("cpt", icl + 0.1 + 0.01 * seed, seed, shots, dataset),
                    result("icl", icl, seed, shots, dataset),
                ]
    return found


# --- frame


def test_frame_is_one_row_a_result_in_reading_order(results):
    table = tables.frame(results)
    assert list(table.columns) == [
        "model",
        "dataset",
        "labels",
        "method",
        "shots",
        "seed",
        "data",
        "accuracy",
        "accuracy_calibrated",
        "split_sha256",
        "seconds",
    ]
    assert len(table) == len(results) and list(table.dataset.unique()) == ["sst2", "trec"]
    assert list(table.method.unique()) == ["zero", "icl", "cpt"]
    assert (
        table.seconds.eq(2).all()
        and table.accuracy.max() < 1
        and table.accuracy_calibrated.isna().all()
    )


def test_frame_refuses_nothing_and_the_same_cell_twice(results):
    with pytest.raises(ValueError, match="There are no results"):
        tables.frame([])
    with pytest.raises(ValueError, match="two results for the cell.*'cpt'"):
        tables.frame([*results, result("cpt", 0.9)])


# --- intervals


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_interval_below_ten_values_is_scipys_t_interval(values):
    mean, std, low, high = statistics.interval(values)
    assert mean == pytest.approx(plain.fmean(values), abs=1e-9)
    assert std == pytest.approx(plain.stdev(values), abs=1e-6)
    if std > 1e-6:
        expected = stats.t.interval(
            0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
        )
        assert (low, high) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_interval_from_ten_values_is_scipys_percentile_bootstrap_expanded():
    values = np.random.default_rng(3).beta(2, 1, 20)
    _, _, low, high = statistics.interval(values)
    level = 1 - 2 * stats.norm.cdf(stats.t.ppf(0.025, 19) * math.sqrt(20 / 19))
    assert level == pytest.approx(0.968, abs=0.001)
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", confidence_level=level, n_resamples=50_000, rng=1
    )
    assert (low, high) == pytest.approx(
        tuple(expected.confidence_interval), abs=0.004
    )  # up to resampling noise
    t_low, t_high = stats.t.interval(0.95, 19, loc=values.mean(), scale=stats.sem(values))
    assert abs(low - t_low) > 1e-4 and abs(high - t_high) > 1e-4  # and it is not the t interval


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 10])
def test_interval_holds_the_mean_in_95_of_100_cases(n):
    """Of 1,500 experiments: standard error 0.6 points, so 93 is more than three of them away, as are the 90 of plain
    percentiles at 10 values."""
    random = np.random.default_rng(0)
    ends = [statistics.interval(random.normal(size=n))[2:] for _ in range(1500)]
    assert 0.93 < np.mean([low <= 0 <= high for low, high in ends]) < 0.97


@settings(deadline=None, max_examples=40)
@given(ACCURACIES, st.randoms(use_true_random=False))
def test_interval_contains_the_mean_and_ignores_the_order(values, random):
    mean, std, low, high = statistics.interval(values)
    assert low - 1e-9 <= mean <= high + 1e-9 and std >= 0
    shuffled = random.sample(values, len(values))
    assert statistics.interval(shuffled) == (mean, std, low, high)


def test_one_value_has_a_mean_and_no_spread():
    mean, *spread = statistics.interval([0.3])
    assert mean == 0.3 and all(map(math.isnan, spread))
    assert all(map(math.isnan, statistics.prediction_interval([0.3])))


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_interval_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="finite numbers"):
        statistics.interval(values)


def test_prediction_interval_covers_a_new_observation_in_95_of_100_draws():
    draws = np.random.default_rng(0).normal(60, 5, (4000, 6))
    covered = 0
    for *seen, new in draws.tolist():
        low, high = statistics.prediction_interval(seen)
        covered += low <= new <= high
    assert 0.94 < covered / len(draws) < 0.96  # standard error 0.0034
    low, high = statistics.prediction_interval([1.0, 2.0, 3.0])  # 2 ± 4.30265 * 1 * sqrt(4/3)
    assert (low, high) == pytest.approx((2 - 4.968277, 2 + 4.968277), abs=1e-5)


# --- summary


def test_summary_is_pandas_by_hand(results):
    table = tables.summary(results)
    assert list(table.columns) == [
        "model",
        "dataset",
        "method",
        "shots",
        "mean",
        "std",
        "ci_low",
        "ci_high",
        "n_seeds",
        "reported",
        "reported_source",
        "calibrated",
    ]
    grouped = pd.DataFrame([{**r["config"], "accuracy": 100 * r["accuracy"]} for r in results])
    grouped = grouped.groupby(["model", "dataset", "method", "shots"]).accuracy
    for row in table.itertuples():
        values = grouped.get_group((row.model, row.dataset, row.method, row.shots))
        assert row.n_seeds == len(values) and row.mean == pytest.approx(values.mean())
        assert row.std == pytest.approx(values.std(), nan_ok=True)
    assert (
        len(table) == len(grouped)
        and table.reported.isna().all()
        and (table.reported_source == "").all()
    )


@pytest.fixture(scope="module")
def found_and_tables():
    found = [
        result(method, 0.1 * seed + 0.07 * shots, seed, shots, dataset)
        for method in ("icl", "cpt")
        for dataset in ("sst2", "mine")
        for shots in (2, 4)
        for seed in range(4)
    ]
    return found, tables.summary(found), tables.paired(found)


@settings(deadline=None, max_examples=10)
@given(random=st.randoms(use_true_random=False))
def test_order_of_results_is_irrelevant(found_and_tables, random):
    found, summary, paired = found_and_tables
    shuffled = random.sample(found, len(found))
    pd.testing.assert_frame_equal(tables.summary(shuffled), summary)
    pd.testing.assert_frame_equal(tables.paired(shuffled), paired)


def test_reported_needs_the_same_model_dataset_method_shots_and_canonical_labels():
    found = [
        result("cpt", model=BLOOM, dataset="dbpedia"),
        result("cpt", model=BLOOM, dataset="dbpedia", shots=4),
        result("cpt", dataset="dbpedia"),
        result("cpt", model=BLOOM, dataset="dbpedia", labels="arbitrary"),
    ]
    table = tables.summary(found).set_index(["model", "dataset", "shots"])
    assert table.reported[BLOOM, "dbpedia", 2] == 58.85
    assert table.reported_source[BLOOM, "dbpedia", 2] == "cpt (review)"
    assert table.reported.notna().sum() == 1
    micro = tables.summary([result("cpt", model=BLOOM, dataset="dbpedia", data="micro")])
    assert micro.reported.isna().all()  # a big model on our own task of that name


def test_set_cls_keeps_its_name_and_is_never_beside_a_number():
    cell = {
        "model": "micro",
        "dataset": "set_cls",
        "method": "icl",
        "shots": 2,
        "value": 10.0,
        "source": "a",
        "evidence": "b",
    }
    table = tables.summary(
        [result(dataset="set_cls", labels="arbitrary"), result(labels="arbitrary")],
        published={"cells": [cell]},
    )
    assert list(table.dataset) == ["set_cls", "sst2*"] and table.reported.isna().all()


# --- paired


def test_paired_differences_are_taken_seed_by_seed(results):
    table = tables.paired(results)
    assert list(table.columns) == [
        "model",
        "dataset",
        "method",
        "shots",
        "difference",
        "std",
        "ci_low",
        "ci_high",
        "n",
    ]
    assert set(table.method) == {"cpt"} and table.n.eq(3).all()
    assert table.difference.to_numpy() == pytest.approx(11) and table[
        "std"
    ].to_numpy() == pytest.approx(1)
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert table.ci_low.to_numpy() == pytest.approx(
        11 - half
    ) and table.ci_high.to_numpy() == pytest.approx(11 + half)


def test_paired_uses_the_seeds_both_have(results):
    without_seed_2 = [
        r for r in results if (r["config"]["method"], r["config"]["seed"]) != ("icl", 2)
    ]
    table = tables.paired(without_seed_2)
    assert table.n.eq(2).all() and table.difference.to_numpy() == pytest.approx(10.5)


def test_paired_with_another_baseline_changes_sign(results):
    flipped = tables.paired(results, baseline="cpt")
    assert set(flipped.method) == {"icl"} and flipped.difference.to_numpy() == pytest.approx(-11)


def test_paired_does_not_mix_labels():
    found = [
        result("icl", 0.5),
        result("cpt", 0.6),
        result("icl", 0.1, labels="arbitrary"),
        result("cpt", 0.4, labels="arbitrary"),
    ]
    table = tables.paired(found).set_index("dataset")
    assert table.difference["sst2"] == pytest.approx(10) and table.difference[
        "sst2*"
    ] == pytest.approx(30)
    with pytest.raises(ValueError, match=r"no 'icl'.*sst2\*"):
        tables.paired([*found[:2], found[3]])


def test_paired_names_what_is_missing(results):
    with pytest.raises(ValueError, match="no 'icl' result.*cpt"):
        tables.paired([r for r in results if r["config"]["method"] != "icl"])
    with pytest.raises(ValueError, match="no 'icl' result.*trec / cpt / 4"):
        tables.paired(
            [
                r
                for r in results
                if (r["config"]["method"], r["config"]["dataset"], r["config"]["shots"])
                != ("icl", "trec", 4)
            ]
        )
    with pytest.raises(ValueError, match="another method"):
        tables.paired([result("icl")])
    with pytest.raises(ValueError, match="saw another split than the others at"):
        tables.paired([result("icl"), result("cpt", split_sha256="another")])


# --- what people read


def test_wide_marks_the_best_and_averages_the_datasets(results):
    table = tables.wide(tables.summary(results))
    assert list(table.columns) == ["sst2", "trec", "mean"]
    assert list(table.index) == [
        ("micro", 0, "zero-shot"),
        ("micro", 2, "ICL"),
        ("micro", 2, "CPT"),
        ("micro", 4, "ICL"),
        ("micro", 4, "CPT"),
    ]
    assert table.loc[("micro", 2, "ICL")].tolist() == ["69.0 ±5.0", "39.0 ±5.0", "54.0"]
    assert table.loc[("micro", 2, "CPT")].tolist() == ["**80.0 ±6.0**", "**50.0 ±6.0**", "**65.0**"]
    assert table.loc[("micro", 0, "zero-shot")].tolist() == [
        "25.0",
        "25.0",
        "25.0",
    ]  # alone: best of nothing


def test_wide_marks_every_tie_and_leaves_gaps_empty():
    found = [
        result("icl", 0.61241),
        result("cpt", 0.61239),
        result("pt", 0.5),
        result("icl", 0.4, dataset="trec"),
        result("icl", 0.9, labels="arbitrary"),
    ]
    table = tables.wide(tables.summary(found)).droplevel(["model", "shots"])
    assert table.sst2.to_dict() == {"ICL": "**61.2**", "PT": "50.0", "CPT": "**61.2**"}
    assert table.trec["CPT"] == "" and table["mean"].to_dict() == {
        "ICL": "50.6",
        "PT": "",
        "CPT": "",
    }
    assert list(table.columns) == ["sst2", "trec", "mean", "sst2*"]


def test_methods_and_datasets_come_in_reading_order():
    methods = ["zz_own", "cpt_paper_eps", *reversed(tables.TITLES)]
    found = [
        result(m, 0.5, dataset=d)
        for m in dict.fromkeys(methods)
        for d in ("mine", "set_cls", "sst2")
    ]
    table = tables.wide(tables.summary(found))
    assert list(table.index.get_level_values("method")) == [*tables.TITLES.values(), "zz_own"]
    assert list(table.columns) == ["sst2", "set_cls", "mine", "mean"]


def test_text_fits_a_terminal_and_shows_each_block(results):
    many = [
        result(m, 0.5 + 0.01 * seed, seed, shots, d, "arbitrary" if star else "canonical")
        for m in ("icl", "cpt", "cpt_paper_eps")
        for seed in range(2)
        for shots in (2, 4)
        for d in tables.DATASETS
        for star in ([True] if d == "set_cls" else [False, True])
    ]
    text = report.to_text(tables.summary(many))
    assert (
        max(map(len, text.splitlines())) <= 120 and "CPT (paper's ε)" in text and "dbpedia*" in text
    )
    lines = report.to_text(tables.summary(results)).splitlines()
    assert (
        lines[0] == "micro, accuracy in percent: raw / calibrated"
        and sum(line.startswith(("0 ", "2 ", "4 ")) for line in lines) == 3
    )
    assert any("80.0 ±6.0 <" in line for line in lines)


def test_markdown_has_one_row_a_method_and_the_published_numbers():
    found = [
        result(m, x, seed, model=BLOOM, dataset="dbpedia", accuracy_calibrated=x - 0.1)
        for seed in range(3)
        for m, x in (("icl", 0.3 + 0.01 * seed), ("cpt", 0.9 + 0.01 * seed))
    ]
    text = report.to_markdown(tables.summary(found), "Few shot", ["A note.", "Another."])
    assert (
        text.startswith("# Few shot\n\nA note.\n\nAnother.\n")
        and f"## {BLOOM}" in text
        and "(seeds: 3)" in text
    )
    assert "| 2 | CPT | **91.0 ±1.0** / 81.0 |" in text and "| 2 | ICL | 31.0 ±1.0 / 21.0 |" in text
    low, high = statistics.prediction_interval([90, 91, 92])
    assert f"| 58.85 | cpt (review) | +32.1 | {low:.1f} to {high:.1f} | ours is higher |" in text
    assert report.to_markdown(tables.summary([found[0]]), "t").count("one seed") == 1
    assert "published" not in report.to_markdown(tables.summary([result()]), "t")


def test_beside_judges_by_the_prediction_interval_and_says_where_there_is_no_number():
    found = [
        result(m, a + s * seed, seed, k, dataset, model=BLOOM)
        for seed in range(3)
        for m, k, dataset, a, s in [
            ("cpt", 2, "dbpedia", 0.2, 0.01),
            ("icl", 2, "dbpedia", 0.9, 0.01),
            ("icl", 4, "dbpedia", 0.2, 0.1),
            ("pt", 2, "dbpedia", 0.5, 0.1),
        ]
    ]
    found += [result("icl", 0.5), result("zero", 0.475, 0, 0, "dbpedia", model=BLOOM)]
    table = tables.beside(tables.summary(found))
    assert set(table.model) == {BLOOM}, "a model without any published number is not beside one"
    verdict = table.set_index(["method", "shots"]).verdict.to_dict()
    assert verdict == {
        ("CPT", 2): "ours is lower",
        ("ICL", 2): "ours is higher: check the baseline (anchor)",
        ("ICL", 4): "inside",
        ("PT", 2): "no published number",
        ("zero-shot", 0): "one seed: no verdict",
    }
    row = table.set_index(["method", "shots"]).loc["CPT", 2]
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert row.ours == f"21.0 ±1.0 [{21 - half:.1f}, {21 + half:.1f}]" and row.difference == "-37.9"
    assert tables.beside(tables.summary([result()])).empty


def test_latex_escapes_and_rules():
    found = [
        result(m, 0.5, seed, k, "ag_news")
        for m in ("icl", "cpt_instr")
        for seed in (0, 1)
        for k in (2, 4)
    ]
    text = report.to_latex(tables.summary(found))
    assert text.startswith("\\begin{tabular}{llll}\n\\toprule\n") and text.endswith(
        "\\bottomrule\n\\end{tabular}\n"
    )
    assert "ag\\_news" in text and "CPT$^\\dagger$" in text and "\\textbf{50.0 $\\pm$0.0}" in text
    assert all(
        line.count("&") == 3 for line in text.splitlines() if "&" in line
    ) and "_" not in text.replace("\\_", "")


def test_write_leaves_files_that_can_be_read_back(tmp_path, results):
    paths = report.write(results, tmp_path / "new", "Title")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "table.csv",
        "overall.csv",
        "cells.csv",
        "table.md",
        "table.tex",
    }
    numbers = ["std", "ci_low", "ci_high", "reported"]
    back = pd.read_csv(
        paths["table.csv"], keep_default_na=False, na_values=dict.fromkeys(numbers, "")
    )
    expected = tables.summary(results).drop(columns="calibrated")
    pd.testing.assert_frame_equal(back, expected, check_dtype=False, atol=1e-4)
    assert paths["table.md"].read_text(encoding="utf-8").startswith("# Title")


def test_write_never_leaves_half_a_table(tmp_path, results, monkeypatch):
    report.write(results, tmp_path, "first")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report.write(results[:4], tmp_path, "second")
    monkeypatch.undo()
    assert len(pd.read_csv(tmp_path / "table.csv")) == 10 and (
        tmp_path / "table.md"
    ).read_text().startswith("# first")


# --- published numbers

PUBLISHED = tables.load_published()


def test_published_numbers_are_those_of_the_notes():
    cells = {tuple(cell[key] for key in tables.KEYS): cell for cell in PUBLISHED["cells"]}
    assert len(cells) == 31 and sum(cell["source"] == "cpt" for cell in cells.values()) == 7
    assert cells["meta-llama/Meta-Llama-3-8B", "sst2", "icl", 6]["value"] == 83.10
    assert cells["EleutherAI/gpt-j-6b", "dbpedia", "cpt_instr", 4]["value"] == 77.30
    anchor = cells[BLOOM, "ag_news", "icl", 2]
    assert (anchor["value"], anchor["std"], anchor["n"], anchor["source"]) == (
        52.0,
        22.7,
        50,
        "voronov",
    )
    assert all((cell["std"] is None) == (cell["source"] == "cpt") for cell in cells.values())
    ablation = PUBLISHED["ablations"][0]["rows"]
    assert [[row[shots] for shots in "246"] for row in ablation] == [[58, 61, 66], [69, 73, 76]]


def _drop_source(data):
    del data["cells"][3]["source"]


def _twice(data):
    data["cells"].append(dict(data["cells"][2], value=1.0))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_drop_source, r"cells\[3\]: source is missing; an entry is an object with model"),
        (lambda data: data.pop("statements"), "the file: statements is missing"),
        (
            lambda data: data["cells"][0].update(source="blog"),
            r"cells\[0\]: Unknown source 'blog'. Valid: cpt, voronov",
        ),
        (
            lambda data: data["cells"][0].update(method="CPT"),
            r"Unknown method 'CPT'. .*Valid: .*icl",
        ),
        (
            lambda data: data["statements"][1].update(evidence="sure"),
            r"statements\[1\]: Unknown evidence 'sure'",
        ),
        (_twice, r"cells\[31\]: the same cell as cells\[2\]"),
        (
            lambda data: data["cells"][5].update(value=101),
            r"cells\[5\]: value 101 is not a percentage",
        ),
        (lambda data: data["cells"][5].update(value=math.nan), r"cells\[5\]: value nan"),
        (lambda data: data["cells"][5].update(value="96.5"), r"cells\[5\]: value '96.5'"),
        (
            lambda data: data["cells"][8].update(std=-1),
            r"cells\[8\]: std -1 is not percentage points",
        ),
        (lambda data: data["cells"][8].update(n=1.5), r"cells\[8\]: n 1.5 is not a number of runs"),
        (
            lambda data: data["cells"][8].update(shots="2"),
            r"cells\[8\]: shots '2' is not a number of shots",
        ),
        (
            lambda data: data["cells"].append("58.85"),
            r"cells\[31\]: model, .* is missing; an entry is an object with model",
        ),
        (
            lambda data: data["sources"].update(blog={"url": "x"}),
            r"sources\[blog\]: citation is missing",
        ),
    ],
)
def test_a_bad_published_file_names_the_entry(tmp_path, spoil, message):
    data = copy.deepcopy(PUBLISHED)
    spoil(data)
    path = tmp_path / "published.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tables.load_published(path)


def test_a_published_file_that_is_no_json_says_where(tmp_path):
    (tmp_path / "published.json").write_text('{"sources": {},}')
    with pytest.raises(MiniCPTError, match="published.json is not valid JSON: .*line 1.*comma"):
        tables.load_published(tmp_path / "published.json")


def test_a_readers_own_number_stands_beside_ours(tmp_path):
    data = copy.deepcopy(PUBLISHED)
    data["sources"]["mine"] = {"citation": "A later paper, Table 7.", "url": "doi:10/x"}
    data["evidence"]["read"] = "read in the paper"
    data["cells"].append(
        {
            "model": BLOOM,
            "dataset": "rte",
            "method": "cpt",
            "shots": 4,
            "value": 60,
            "source": "mine",
            "evidence": "read",
        }
    )
    (tmp_path / "mine.json").write_text(json.dumps(data))
    published = tables.load_published(tmp_path / "mine.json")
    found = [result("cpt", 0.5 + seed / 100, seed, 4, "rte", model=BLOOM) for seed in range(3)]
    table = tables.beside(tables.summary(found, published=published), published)
    assert (
        table.loc[0, "published"] == "60.00" and table.loc[0, "source (evidence)"] == "mine (read)"
    )


def test_overall_is_the_paired_difference_of_the_seeds_means():
    rows = []
    accuracies = {"zero": [0.3, 0.4], "icl": [0.5, 0.7], "cpt": [0.6, 0.9]}
    for method, by_seed in accuracies.items():
        for seed, value in enumerate(by_seed):
            for dataset, shift in (("trec", 0.0), ("sst2", 0.1)):
                for shots in [0] if method == "zero" else [2, 4]:
                    # at 4 shots 0.02 more: the mean over shots is value + shift + 0.01
                    rows.append(
                        result(
                            dataset=dataset,
                            method=method,
                            shots=shots,
                            seed=seed,
                            accuracy=value + shift + (0.02 if shots == 4 else 0),
                        )
                    )
    table = tables.overall(rows).set_index("method")
    assert list(table.index) == ["zero", "icl", "cpt"] and list(table.columns[1:3]) == [
        "sst2",
        "trec",
    ]
    assert table.loc["cpt", "trec"] == pytest.approx(100 * (0.75 + 0.01))
    assert table.loc["cpt", "mean"] == pytest.approx(100 * (0.75 + 0.05 + 0.01))
    assert (
        table.loc["cpt", "difference"] == pytest.approx(15) and table.loc["icl", "difference"] == 0
    )
    expected = stats.t.interval(
        0.95, 1, 15, 10 / math.sqrt(2) / math.sqrt(2)
    )  # differences 10 and 20
    assert (table.loc["cpt", "ci_low"], table.loc["cpt", "ci_high"]) == pytest.approx(expected)
    assert table.loc["zero", "difference"] == pytest.approx(-26)

    header, cells = tables.overall_rows(tables.overall(rows))
    assert header == ["method", "sst2", "trec", "mean", "minus ICL [95 %]"] and cells[1][-1] == ""

    other = [{**row, "split_sha256": row["config"]["method"]} for row in rows]
    with pytest.raises(MiniCPTError, match="saw another split than the others"):
        tables.overall(other)
    incomplete = [
        row for row in rows if (row["config"]["method"], row["config"]["shots"]) != ("cpt", 4)
    ]
    assert list(tables.overall(incomplete).method) == [
        "zero",
        "icl",
    ]  # half a method has no overall mean
    with pytest.raises(ValueError, match="no complete set of 'icl' results"):
        tables.overall([row for row in rows if row["config"]["method"] != "icl"])


# --- calibrated accuracies, answers, models of one name


def scored(answered, truth, method="icl", seed=0, calibrated=None, **kwargs):
    """A result with the answers given, of three classes."""
    log_scores = np.log(0.1 + 0.7 * np.eye(3)[answered]).tolist()
    other = np.log(0.1 + 0.7 * np.eye(3)[answered if calibrated is None else calibrated]).tolist()
    return result(
        method,
        np.mean(np.equal(answered, truth)),
        seed,
        accuracy_calibrated=np.mean(
            np.equal(answered if calibrated is None else calibrated, truth)
        ),
        log_scores=log_scores,
        log_scores_calibrated=other,
        truth=truth,
        verbalizers={"person": "who", "place": "where", "thing": "what"},
        **kwargs,
    )


def test_the_calibrated_table_is_the_raw_one_of_the_calibrated_accuracies(results):
    both = [{**r, "accuracy_calibrated": 0.9 * r["accuracy"] ** 2} for r in results]
    swapped = [{**r, "accuracy": r["accuracy_calibrated"]} for r in both]
    expected = tables.summary(swapped).drop(columns="calibrated")
    table = tables.summary(both, score="calibrated")
    pd.testing.assert_frame_equal(table.drop(columns="raw"), expected)
    assert table.raw.to_numpy() == pytest.approx(tables.summary(both)["mean"].to_numpy())
    for function in (tables.paired, tables.overall):
        pd.testing.assert_frame_equal(function(both, score="calibrated"), function(swapped))


def test_raw_and_calibrated_stand_side_by_side_and_each_file_says_which_it_holds(tmp_path, results):
    both = [{**r, "accuracy_calibrated": r["accuracy"] - 0.2} for r in results]
    raw, calibrated = tmp_path / "raw", tmp_path / "calibrated"
    report.write(both, raw, "Title")
    report.write(both, calibrated, "Title", "calibrated")
    for name in ("table.csv", "calibrated.csv", "overall.csv", "cells.csv"):
        assert (raw / name).read_bytes() == (calibrated / name).read_bytes()
    assert "calibrated" not in (raw / "table.csv").read_text()
    assert "| 2 | CPT | **80.0 ±6.0** / 60.0 |" in (raw / "table.md").read_text()
    text = (calibrated / "table.md").read_text()
    assert "| 2 | CPT | **60.0 ±6.0** / 80.0 |" in text and "percent, calibrated: mean" in text
    assert "60.0 ±6.0 < / 80.0" in report.to_text(tables.summary(both, score="calibrated"))


def test_answers_counts_what_is_answered_and_names_a_constant_answer(tmp_path):
    truth = [0, 0, 1, 2]
    found = [
        scored([1, 1, 1, 1], truth, seed=0, calibrated=[0, 0, 1, 1]),
        scored([0, 1, 1, 2], truth, seed=1),
        scored([2, 2, 2, 2], truth, seed=2),
        scored([0, 0, 1, 2], truth, "cpt"),
    ]
    table = tables.answers(found)
    assert list(table.columns) == [
        *tables.KEYS,
        "answer",
        "answered",
        "truth",
        "constant",
        "n_seeds",
    ]
    icl = table[table.method == "icl"].set_index("answer")
    assert list(icl.index) == ["person", "place", "thing"] and icl.n_seeds.eq(3).all()
    assert icl.answered.to_numpy() == pytest.approx([100 / 12, 50, 500 / 12])
    assert icl.truth.to_numpy() == pytest.approx([50, 25, 25])
    assert icl.constant.to_numpy() == pytest.approx([0, 100 / 3, 100 / 3])
    assert table[table.method == "cpt"].constant.eq(0).all()
    lines = report.constant_answers(table).splitlines()
    assert (
        len(lines) == 2 and "ICL, 2 shots: in 33 % of 3 seeds" in lines[0] and "'place'" in lines[0]
    )
    calibrated = tables.answers(found, score="calibrated").set_index(["method", "answer"])
    assert calibrated.loc[("icl", "place"), "constant"] == 0
    report.write(found, tmp_path, "Title")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "answers.csv"), table, check_dtype=False, atol=1e-4
    )
    assert lines[1] in (tmp_path / "table.md").read_text()
    assert report.constant_answers(table[table.method == "cpt"]).startswith("In no seed")


def test_answers_leaves_results_without_scores_out():
    assert tables.answers([result()]).empty
    assert set(tables.answers([result("cpt"), scored([0], [0])]).method) == {"icl"}


def test_models_of_one_name_and_other_weights_stand_in_rows_of_their_own():
    def weights(fingerprint, accuracy):
        found = [result(method, accuracy) for method in ("icl", "cpt")]
        return [{**r, "config": {**r["config"], "model_fingerprint": fingerprint}} for r in found]

    one, two = weights("a" * 16, 0.5), weights("b" * 16, 0.7)
    assert set(tables.summary(one).model) == {"micro"}
    table = tables.summary(one + two)
    assert (
        set(table.model) == {"micro (aaaaaaaa)", "micro (bbbbbbbb)"} and table.n_seeds.eq(1).all()
    )
    assert dict(zip(table.model, table["mean"])) == {
        "micro (aaaaaaaa)": 50,
        "micro (bbbbbbbb)": pytest.approx(70),
    }
    assert (
        set(tables.paired(one + two).model)
        == set(tables.overall(one + two).model)
        == set(table.model)
    )


def test_a_single_incomplete_model_leaves_the_means_out_and_other_errors_are_not_swallowed(
    tmp_path, results, monkeypatch
):
    without = [r for r in results if r["config"]["method"] != "icl"]
    assert "overall.csv" not in report.write(without, tmp_path, "Title")

    def broken(*args, **kwargs):
        raise MiniCPTError("something else")

    monkeypatch.setattr(report, "overall", broken)
    with pytest.raises(MiniCPTError, match="something else"):
        report.write(results, tmp_path, "Title")


def test_seeds_that_all_agree_have_a_difference_and_no_interval_of_no_width():
    for values, text in [([7.5, 7.5], "+7.5"), ([-3.0], "-3.0"), ([7, 8], "+7.5 [+1.1, +13.9]")]:
        mean, _, low, high = statistics.interval(values)
        assert statistics.signed(mean, low, high) == text

"""Tasks and splits: the sampler's promises, frozen hashes, the reader's own task, real data through `datasets`."""

import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpt import data
from minicpt.errors import MiniCPTError

SETTINGS = settings(max_examples=60, deadline=None)
label_lists = st.lists(st.integers(0, 4).map(str), min_size=8, max_size=40)


# ---- sampler --------------------------------------------------------------------------------------------------------


@SETTINGS
@given(label_lists, st.integers(0, 8), st.integers(0, 10**6))
def test_shots_in_total_come_from_distinct_classes_first(labels, k, seed):
    chosen = data.sample_shots(labels, k, seed)
    assert len(set(chosen)) == len(chosen) == k
    counts = Counter(labels[i] for i in chosen)
    available = Counter(labels)
    # no class has two shots more than another that still has rows
    for c in available:
        if counts[c] < available[c]:
            assert all(counts[other] <= counts[c] + 1 for other in counts)
    assert chosen == data.sample_shots(labels, k, seed)


@SETTINGS
@given(label_lists, st.integers(1, 3), st.integers(0, 100))
def test_shots_per_class(labels, k, seed):
    available = Counter(labels)
    if min(available.values()) < k:
        with pytest.raises(MiniCPTError, match="too few rows"):
            data.sample_shots(labels, k, seed, per_class=True)
    else:
        chosen = data.sample_shots(labels, k, seed, per_class=True)
        assert Counter(labels[i] for i in chosen) == {c: k for c in available}


def test_fewer_shots_of_a_seed_are_among_its_more_and_seeds_differ():
    labels = [str(i % 6) for i in range(60)]
    for seed in range(5):
        assert set(data.sample_shots(labels, 2, seed)) <= set(data.sample_shots(labels, 4, seed))
    assert len({tuple(data.sample_shots(labels, 4, seed)) for seed in range(20)}) > 15


def test_every_class_and_position_gets_its_turn():
    """Label "0" included: samplers have been seen to stop at it."""
    labels = [str(i % 3) for i in range(30)]
    firsts = Counter(labels[data.sample_shots(labels, 2, seed)[0]] for seed in range(300))
    assert set(firsts) == {"0", "1", "2"} and min(firsts.values()) > 60


def test_global_random_states_are_left_alone():
    states = random.getstate(), torch.random.get_rng_state()
    data.make_split(data.load_task("trec"), 4, 0)
    assert random.getstate() == states[0] and torch.equal(torch.random.get_rng_state(), states[1])


def test_numbers_out_of_range():
    task = data.load_task("trec")
    with pytest.raises(
        MiniCPTError, match="shots must be a whole number from 0, such as 4; got -1"
    ):
        data.make_split(task, -1, 0)
    with pytest.raises(
        MiniCPTError, match="n_test must be a whole number from 1, such as 4; got 0"
    ):
        data.make_split(task, 2, 0, n_test=0)


def test_too_few_rows():
    with pytest.raises(MiniCPTError, match="Cannot draw 5 shots from 3"):
        data.sample_shots(["a", "b", "a"], 5, 0)


# ---- embedded tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, classes", [("sst2", 2), ("ag_news", 4), ("trec", 6), ("dbpedia", 14), ("set_cls", 4)]
)
def test_embedded_tasks(name, classes):
    task = data.load_task(name)
    assert len(task.verbalizers) == classes
    assert not {t for t, _ in task.train} & {
        t for t, _ in task.test
    }  # no test text is a training text
    assert min(Counter(label for _, label in task.train).values()) >= 6
    assert len(task.test) >= 600
    assert not set(task.arbitrary_labels) & set(task.verbalizers.values())


def test_arbitrary_words_of_real_tasks_are_many_and_name_no_class(tmp_path):
    words = data.ARBITRARY
    assert len({*words}) == len(words) >= 20
    named = " ".join(
        f"{word} {name}"
        for spec in data.real_specs().values()
        for name, word in spec["verbalizers"].items()
    ).lower()
    assert not [word for word in words if word in named.split()]
    write_trec(tmp_path, [{"text": f"what is {i} ?", "coarse_label": i} for i in range(6)])
    task = data.load_task("trec", "real", tmp_path)
    drawn = [data.make_split(task, 2, seed, labels="arbitrary").verbalizers for seed in (0, 1)]
    assert {*drawn[0].values()} < {*words} and drawn[0] != drawn[1]
    assert (
        data.make_split(task, 2, 0).verbalizers == task.verbalizers
    )  # only where they are asked for


def test_splits_share_queries_words_and_template_across_shots_and_differ_across_seeds():
    task = data.load_task("set_cls")
    two, four, other = (data.make_split(task, k, s) for k, s in ((2, 0), (4, 0), (4, 1)))
    assert (two.queries, two.verbalizers, two.template) == (
        four.queries,
        four.verbalizers,
        four.template,
    )
    assert two.sha256 != four.sha256 != other.sha256 and other.queries != four.queries
    assert other.verbalizers != four.verbalizers  # arbitrary labels are drawn per seed
    assert set(four.verbalizers.values()) <= set(task.arbitrary_labels)


def test_instruction_names_the_labels_of_the_split():
    split = data.make_split(data.load_task("set_cls"), 2, 3)
    assert all(word in split.instruction for word in split.verbalizers.values())


def test_frozen_manifest():
    """The splits of the main table are frozen: whoever changes rows or sampler must say so here."""
    manifest = json.loads((data.ASSETS / "splits.json").read_text())
    assert manifest == data.manifest()


# ---- own task -------------------------------------------------------------------------------------------------------

SPEC = {
    "name": "mine",
    "verbalizers": {"y": "yes", "n": "no"},
    "templates": {"input": ["Q: {}"], "output": ["A: {}"], "intra": ["\n"], "inter": ["\n"]},
}
ROWS = [
    {"text": f"row {i}", "label": "yn"[i % 2], "split": "train" if i < 6 else "test"}
    for i in range(10)
]


def write_task(folder, spec=SPEC, rows=ROWS):
    (folder / "mine.json").write_text(json.dumps(spec))
    (folder / "mine.jsonl").write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
    )
    return str(folder / "mine.json")


def test_own_task(tmp_path):
    split = data.make_split(data.load_task(write_task(tmp_path)), 4, 0)
    assert len(split.shots) == 4 and len(split.queries) == 4 and split.template.input == "Q: {}"


@pytest.mark.parametrize(
    "spec, rows, message",
    [
        ({"name": "mine"}, ROWS, "'verbalizers' must be .*; it is missing"),
        (SPEC, [*ROWS, "not json"], "line 11"),
        (SPEC, [{"text": "a", "label": "y"}], "line 1.*split"),
        (SPEC, [{"text": "a", "label": "y", "split": "dev"}], "line 1.*dev"),
        (
            SPEC,
            [{"text": " ", "label": "y", "split": "train"}],
            "line 1: The key 'text' must be a text that is not blank",
        ),
        (
            SPEC,
            [{"text": "a", "label": "yy", "split": "train"}],
            "Unknown label 'yy'. Did you mean 'y'",
        ),
        ({**SPEC, "verbalizers": {"y": "yes", "n": "yes"}}, ROWS, "share the label word 'yes'"),
        ({**SPEC, "templates": {"input": ["{}"]}}, ROWS, "'templates.output' .* missing"),
        ({**SPEC, "default_labels": "arbitrary"}, ROWS, "lists 0 arbitrary labels"),
        ({**SPEC, "sha256": "0"}, ROWS, "has changed"),
        (SPEC, [r for r in ROWS if r["split"] == "train"], "no test rows"),
    ],
)
def test_malformed_own_tasks(tmp_path, spec, rows, message):
    with pytest.raises(MiniCPTError, match=message):
        data.make_split(data.load_task(write_task(tmp_path, spec, rows)), 2, 0)


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(MiniCPTError, match="does not exist"):
        data.load_task(str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").write_text("{")
    (tmp_path / "mine.jsonl").write_text("")
    with pytest.raises(MiniCPTError, match="not valid JSON"):
        data.load_task(str(tmp_path / "mine.json"))
    with pytest.raises(MiniCPTError, match="Unknown task 'tre'. Did you mean 'trec'"):
        data.load_task("tre")
    with pytest.raises(MiniCPTError, match="Unknown data"):
        data.load_task("trec", data="fake")


# ---- real tasks, from a folder in the hub's schema ------------------------------------------------------------------


def write_trec(folder, rows):
    (folder / "trec").mkdir()
    for split in ("train", "test"):
        (folder / "trec" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_real_task_from_a_folder(tmp_path, monkeypatch):
    rows = [{"text": f"what is {i} ?", "coarse_label": i, "fine_label": i} for i in range(6)]
    write_trec(tmp_path, rows)
    task = data.load_task("trec", "real", tmp_path)
    # hub order: 0 ABBR, 1 ENTY, 2 DESC (the trap: another order circulates)
    assert task.train[0] == ("what is 0 ?", "ABBR") and task.train[2] == ("what is 2 ?", "DESC")
    assert task.verbalizers["DESC"] == "Description"
    monkeypatch.setenv("MINICPT_DATA", str(tmp_path))
    assert data.load_task("trec", "real").sha256 == task.sha256


def test_real_task_errors(tmp_path):
    with pytest.raises(MiniCPTError, match="trec/train.jsonl"):
        data.load_task("trec", "real", tmp_path)
    write_trec(tmp_path, [{"question": "a", "coarse_label": 0}])
    with pytest.raises(MiniCPTError, match="no column 'text'; it has question, coarse_label"):
        data.load_task("trec", "real", tmp_path)
    with pytest.raises(MiniCPTError, match="Unknown real task 'sst5'. Did you mean 'sst2'"):
        data.load_task("sst5", "real", tmp_path)
    (tmp_path / "trec" / "train.jsonl").write_text("no json")
    with pytest.raises(MiniCPTError, match="train.jsonl: .* one JSON object per line"):
        data.load_task("trec", "real", tmp_path)
    assert data.load_task("set_cls", "real", tmp_path) == data.load_task("set_cls"), (
        "generated: there is no other"
    )


@pytest.mark.parametrize(
    "name, row, text, label",
    [
        (
            "rte",
            {"premise": "a {} b", "hypothesis": "c", "idx": 0, "label": 1},
            "claim: c\ntext: a {} b",
            "not_entailment",
        ),
        (
            "boolq",
            {"question": "is it", "passage": "it is", "idx": 0, "label": 1},
            "question: is it?\ntext: it is",
            "True",
        ),
    ],
)
def test_tasks_of_two_columns(tmp_path, name, row, text, label):
    (tmp_path / name).mkdir()
    for split in ("train", "test"):
        (tmp_path / name / f"{split}.jsonl").write_text(
            "\n".join(json.dumps({**row, "label": i}) for i in (0, 1))
        )
    assert data.load_task(name, "real", tmp_path).train[1] == (text, label)
    for split in ("train", "test"):
        (tmp_path / name / f"{split}.jsonl").write_text(json.dumps({"text": "a", "label": 0}))
    with pytest.raises(
        MiniCPTError, match="has no column '(hypothesis|question)'; it has text, label"
    ):
        data.load_task(name, "real", tmp_path)


@pytest.mark.parametrize(
    "message",
    [
        "Dataset 'CogComp/trec' is a gated dataset on the Hub. You must be authenticated.",
        "Dataset 'CogComp/trec' doesn't exist on the Hub or cannot be accessed.",
    ],
)
def test_a_gated_or_missing_data_set_is_explained(message, monkeypatch):
    import datasets

    def refused(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError(message)

    monkeypatch.delenv("MINICPT_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(
        MiniCPTError, match="Cannot load CogComp/trec from the hub: Dataset .* Without a network"
    ):
        data.load_task("trec", "real")


def test_no_network_when_the_hub_is_asked(monkeypatch):
    monkeypatch.delenv("MINICPT_DATA", raising=False)
    with pytest.raises(MiniCPTError, match="Cannot load CogComp/trec from the hub"):
        data.load_task("trec", "real")

"""What people hand over: of whatever shape it is, it is taken as meant, or refused in words; never a wrong number.

Property tests: a wrong shape raises `MiniCPTError`, and any right one arrives as it was.
"""

import copy
import dataclasses
import json
import math
import warnings
from enum import Enum
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.ensemble import VotingClassifier
from test_data import ROWS, SPEC, write_task, write_trec

from minicpt import FewShotClassifier, MiniCPTError, data
from minicpt.__main__ import main
from minicpt.engine.base_models import MICRO, BaseModel, load_base
from minicpt.engine.scores import calibrate
from minicpt.lab.cells import Cell, run_cell
from minicpt.methods.fit import fit
from minicpt.methods.inputs import read_labels, read_texts, words_of
from minicpt.methods.registry import METHODS, hyperparameter_file, hyperparameters

SETTINGS = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
FEW = settings(SETTINGS, max_examples=8)
# half a character is what no file, no hash and no tokenizer can hold
characters = st.characters(exclude_categories=["Cs"])
texts = st.text(characters, min_size=1, max_size=12).filter(str.strip)
plain = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4)
anything = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def kind(words):
    """Whether this is a list of one or more whole texts."""
    return bool(words) and isinstance(words, list) and all(map(is_text, words))


def is_text(value):
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


# ---- a task's files -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@SETTINGS
@given(
    st.sampled_from(["input", "output", "intra", "inter"]),
    anything | st.lists(st.sampled_from(["a {}", "{}", "{} {}", "\n", "", "{label}"]), max_size=3),
)
def test_a_pool_is_taken_as_it_stands_or_refused(tmp_path, part, pool):
    spec = {**SPEC, "templates": {**SPEC["templates"], part: pool}}
    valid = kind(pool)
    if part in ("input", "output"):
        valid = valid and all(form.count("{}") == 1 for form in pool)
    path = write_task(tmp_path, spec)
    if valid:
        assert [getattr(template, part) for template in data.load_task(path).templates] == pool
    else:
        with pytest.raises(MiniCPTError, match=f"mine.json: The key 'templates.{part}.* must be"):
            data.load_task(path)


@SETTINGS
@given(anything | st.dictionaries(texts, texts, max_size=4))
def test_verbalizers_of_a_task_give_each_class_a_word_or_are_refused(tmp_path, verbalizers):
    rows = [{"text": "a", "label": "x", "split": "test"}] * 2
    if isinstance(verbalizers, dict):
        rows = [{"text": "a", "label": label, "split": "test"} for label in verbalizers]
    path = write_task(tmp_path, {**SPEC, "verbalizers": verbalizers}, rows)
    try:
        task = data.load_task(path)
    except MiniCPTError:
        if isinstance(verbalizers, dict) and len(verbalizers) > 1:
            words = [word.strip().casefold() for word in verbalizers.values() if is_text(word)]
            clean = [
                word for word in verbalizers.values() if is_text(word) and word == word.strip()
            ]
            assert len({*words} - {""}) < len(verbalizers) or len(clean) < len(verbalizers)
        return
    assert task.verbalizers == verbalizers and len(verbalizers) > 1
    assert all(is_text(word) and word.strip() for word in verbalizers.values())


@pytest.mark.slow
@SETTINGS
@given(st.sampled_from(["text", "label", "split"]), anything)
def test_a_row_is_taken_as_it_stands_or_refused_with_its_line(tmp_path, key, value):
    path = write_task(tmp_path, rows=[*ROWS, {**ROWS[0], key: value}])
    if key == "text" and is_text(value) and value.strip():
        assert data.load_task(path).train[-1] == (value, "y")
    elif not (key == "label" and value in ("y", "n")) and value not in ("train", "test"):
        with pytest.raises(MiniCPTError, match="line 11: The key|train row 7: Unknown label"):
            data.load_task(path)


@SETTINGS
@given(
    st.lists(texts, min_size=2, max_size=5),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\n", "\r\n\r\n"]),
    st.booleans(),
)
def test_rows_arrive_whatever_else_ends_a_line(tmp_path, given, newline, end, mark):
    """U+2028 and NEL inside a text, blank last lines, Windows line ends, a byte order mark."""
    given = [*given, "a\u2028b\x85c\x0bd"]
    rows = [{"text": t, "label": "yn"[i % 2], "split": "train"} for i, t in enumerate(given)]
    lines = newline.join(json.dumps(row, ensure_ascii=False) for row in rows) + end
    start = "\ufeff" if mark else ""
    write_task(tmp_path)
    (tmp_path / "mine.jsonl").write_bytes((start + lines).encode())
    (tmp_path / "mine.json").write_bytes((start + json.dumps(SPEC)).encode())
    assert [text for text, _ in data.load_task(tmp_path / "mine.json").train] == given


@FEW
@given(
    st.text("äöüéßab", min_size=1).filter(lambda text: not text.isascii()),
    st.sampled_from(["cp1252", "utf-16", "utf-16-le", "utf-32"]),
    st.sampled_from(["mine.json", "mine.jsonl"]),
)
def test_another_encoding_is_named(tmp_path, text, encoding, file):
    path = write_task(tmp_path, {**SPEC, "title": text}, [{**row, "text": text} for row in ROWS])
    content = json.loads((tmp_path / "mine.json").read_text())
    (tmp_path / file).write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    with pytest.raises(MiniCPTError, match=f"{file} is not in UTF-8.*Save it as UTF-8"):
        data.load_task(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"instrution": "x"}, "Unknown key 'instrution'. Did you mean 'instruction'"),
        ({"instruction": "say {label}"}, "'instruction' must be .* no other word is in braces"),
        ({"instruction": None}, "'instruction' must be a text.* got None"),
        ({"arbitrary_labels": "red blue"}, "must be a list of different words.* got 'red blue'"),
        ({"arbitrary_labels": ["red", "Red", "b"]}, "share the label word 'Red'"),
        ({"verbalizers": {"y": "Yes", "n": "yes"}}, "share the label word 'yes' .capitals"),
        ({"verbalizers": {"y": "yes ", "n": "no"}}, "'verbalizers.y' .* without spaces around it"),
        ({"verbalizers": {"y": "yes"}}, "two or more classes"),
        ({"name": ""}, "'name' must be a short text"),
    ],
)
def test_what_else_a_file_may_get_wrong(tmp_path, changes, message):
    with pytest.raises(MiniCPTError, match=message):
        data.load_task(write_task(tmp_path, {**SPEC, **changes}))


def test_a_key_that_stands_twice_and_rows_of_one_class(tmp_path):
    path = write_task(tmp_path)
    twice = json.dumps(SPEC).replace('"n": "no"', '"n": "no", "n": "never"')
    Path(path).write_text(twice)
    with pytest.raises(MiniCPTError, match="The key 'n' stands there twice"):
        data.load_task(path)
    with pytest.raises(MiniCPTError, match="all training rows are of the class 'y'"):
        data.load_task(write_task(tmp_path, rows=[{**row, "label": "y"} for row in ROWS]))


def test_a_real_row_without_text_is_named(tmp_path):
    rows = [{"text": "what ?", "coarse_label": 0}, {"text": None, "coarse_label": 1}]
    write_trec(tmp_path, rows)
    with pytest.raises(MiniCPTError, match="trec, train row 2: the column 'text' .* got None"):
        data.load_task("trec", "real", tmp_path)


def test_names_may_be_paths():
    assert load_base(Path(MICRO)).name == load_base(str(MICRO)).name
    assert data.load_task(data.ASSETS / "tasks" / "sst2.json") == data.load_task("sst2")
    for wrong in (None, 3, ["micro"]):
        with pytest.raises(MiniCPTError, match="A model is named by text or a Path"):
            load_base(wrong)
        with pytest.raises(MiniCPTError, match="Unknown task"):
            data.load_task(wrong)


# ---- hyper-parameters -----------------------------------------------------------------------------------------------

VALUES = hyperparameter_file()["micro"].values()
HP = {name: value for group in VALUES if isinstance(group, dict) for name, value in group.items()}


@pytest.mark.parametrize("place", ["micro", "hub"])
def test_every_chosen_hyperparameter_has_its_shape_in_the_schema(place):
    schema = json.loads((data.ASSETS / "hyperparameters.schema.json").read_text())
    chosen = hyperparameter_file()[place]
    assert set(schema["properties"]) == {n for m in METHODS for n in chosen.get(m, {})}
    for method in METHODS:
        values = chosen.get(method, {})
        again = hyperparameters(method, place, dict(values))
        assert again == values and [*map(type, again.values())] == [*map(type, values.values())]


@settings(SETTINGS, max_examples=200)
@given(
    st.sampled_from(sorted(HP)),
    anything | st.floats(0, 3) | st.sampled_from([np.float32(0.5), np.int64(2), np.bool_(True)]),
)
def test_a_hyperparameter_is_of_its_kind_or_refused(name, value):
    try:
        found = hyperparameters("cpt", "micro", {name: value})[name]
    except MiniCPTError as error:
        assert f"The hyper-parameter '{name}' must be" in str(error) and "got" in str(error)
        if type(HP[name]) is float and name != "token_dropout":
            assert type(value) not in (int, float) or not 0 <= value <= 1e30
        return
    assert found == value and type(found) is type(HP[name])
    assert isinstance(value, bool | np.bool_) == isinstance(HP[name], bool)
    if isinstance(found, float):
        assert math.isfinite(found) and found >= 0
    elif isinstance(found, int) and name != "batch_size":
        assert found > 0 or isinstance(found, bool)


@pytest.mark.parametrize(
    "hp",
    ['{"lr": "0.1"}', '{"lr": NaN}', '{"epochs": 0}', '{"lr": 1, "lr": 2}', "[1]", "null", "x"],
)
def test_the_command_refuses_them_too(hp, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["minicpt", "cell", "--hp", hp])
    assert main() == 2 and "--hp: Th" in capsys.readouterr().err


# ---- texts, labels and words in Python ------------------------------------------------------------------------------


@SETTINGS
@given(st.lists(texts, min_size=1))
def test_ordered_texts_arrive_in_their_order_and_others_are_refused(given):
    for ordered in (given, tuple(given), np.array(given, object), pd.Series(given, index=given)):
        assert read_texts(ordered) == given
    iterator = iter(given)
    for wrong in ({*given}, dict.fromkeys(given), given[0], iterator, None, [given], [*given, 3]):
        with pytest.raises(MiniCPTError, match="one-dimensional list|is no string"):
            read_texts(wrong)


class Colour(Enum):
    RED = 1
    BLUE = 2


scalars = [
    st.integers(-3, 3),
    st.booleans(),
    st.text(max_size=3),
    st.floats(allow_nan=False),
    st.tuples(st.integers(0, 2), st.text(max_size=1)),
    st.sampled_from(Colour),
]


@SETTINGS
@given(st.sampled_from(scalars).flatmap(lambda one: st.lists(one, min_size=1, max_size=9)))
def test_labels_are_the_same_values_whatever_holds_them(labels):
    held = [labels, tuple(labels), pd.Series(labels, dtype=object)]
    if isinstance(labels[0], int):
        held += [np.array(labels), torch.tensor(labels), pd.Series(labels, dtype="Int64")]
        held += [[np.array(label) for label in labels], [*map(torch.tensor, labels)]]
    for column in held:
        assert read_labels(column, len(labels)) == labels


@pytest.mark.parametrize(
    "missing", [None, float("nan"), pd.NA, pd.NaT, object(), torch.tensor([1, 2]), np.array([1])]
)
def test_missing_labels_and_those_that_equal_nothing_are_refused(missing):
    with pytest.raises(MiniCPTError, match="Label 1 is .* must be hashable, equal to their copies"):
        read_labels(["a", missing], 2)


@SETTINGS
@given(
    anything | st.lists(texts, min_size=2, max_size=2) | st.fixed_dictionaries({0: texts, 1: texts})
)
def test_words_are_those_given_or_refused(given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            words = words_of([0, 1], given)
        except MiniCPTError:
            return
    expected = {0: "0", 1: "1"} if given is None else dict(enumerate([given[0], given[1]]))
    assert words == {label: word.strip() for label, word in expected.items()}
    assert words[0].casefold() != words[1].casefold() and all(words.values())


def test_numbers_as_words_are_warned_of_and_names_are_not():
    for labels in ([0, 1], ["0", "1"], [-1.5, 2.0]):
        with pytest.warns(UserWarning, match="say nothing about the classes. Give words"):
            words_of(labels, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words_of(["a", "b"], None)
        words_of([False, True], None)
        words_of([0, 1], ["a", "b"])


@pytest.fixture(scope="module")
def reviews():
    task = data.load_task("sst2")
    return map(list, (*zip(*task.train[:12]), *zip(*task.test[:40])))


def test_words_in_the_order_of_the_classes_suit_estimators_that_encode_labels(reviews, tmp_path):
    X, y, queries, _ = reviews
    one = FewShotClassifier("icl", shots=4, verbalizers=["negative", "positive"])
    expected = FewShotClassifier("icl", shots=4).fit(X, y).predict(queries)
    voting = VotingClassifier([("one", one)], voting="soft").fit(X, y)
    assert (
        voting.predict(queries).tolist()
        == expected.tolist()
        == one.fit(X, y).predict(queries).tolist()
    )
    one.save(tmp_path)
    assert FewShotClassifier.load(tmp_path).get_params() == one.get_params()


def test_the_classifiers_instruction_names_its_words():
    labels = ["good", "bad"] * 4
    told = FewShotClassifier("cpt_instr", shots=2, instruction="{labels}?", hp={"epochs": 1})
    said = FewShotClassifier("cpt_instr", shots=2, instruction="bad or good?", hp={"epochs": 1})
    X = [f"the film {i}" for i in range(8)]
    assert (told.fit(X, labels).predict_proba(X) == said.fit(X, labels).predict_proba(X)).all()
    for name, value in (("instruction", 3), ("calibrated", "no")):
        with pytest.raises(MiniCPTError, match=f"{name} must be"):
            FewShotClassifier(**{name: value}).fit(X, labels)


@pytest.fixture(scope="module")
def two():
    """A split of two classes with four queries."""
    return data.make_split(data.load_task("sst2"), 4, 0, n_test=4)


@FEW
@given(st.text(st.characters(), max_size=6), st.sampled_from(["\ud800", "\udfff"]))
def test_half_a_character_is_named_wherever_it_stands(random_base, two, text, half):
    broken = f"a {text}{half}"
    predictor = fit("icl", random_base, two)
    words = {"negative": broken, "positive": "b"}
    for call in (
        lambda: predictor.predict([broken]),
        lambda: fit("icl", random_base, dataclasses.replace(two, shots=[(broken, "negative")] * 2)),
        lambda: fit("zero", random_base, dataclasses.replace(two, verbalizers=words)),
        lambda: fit("pt_instr", random_base, dataclasses.replace(two, instruction=broken)),
    ):
        with pytest.raises(MiniCPTError, match="half a character"):
            call()


# ---- texts longer than the model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def absolute(random_base):
    """A random GPT-2, which has 200 positions and no more, with the micro model's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    n = len(random_base.tokenizer)
    sizes = {"vocab_size": n, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 200}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    return BaseModel("gpt2", model, random_base.tokenizer, "random")


@pytest.mark.parametrize("method", ["zero", "lora", "ct_kv", "cpt"])
@pytest.mark.parametrize("positions", ["rotary", "absolute"])
def test_a_predictor_cuts_what_is_longer_than_the_model_and_says_so(
    method, positions, random_base, absolute, two
):
    base = random_base if positions == "rotary" else absolute
    hp = {"epochs": 1} if METHODS[method].trains else None
    predictor = fit(method, base, two, hp)
    short = two.queries[0][0]
    expected = predictor.scores([short])[0]

    @FEW
    @given(st.integers(0, 800), st.sampled_from(["banana ", "x", "é漢"]))
    def check(n, word):
        text = word * n
        longest = len(predictor.prompt.encode([(text, None)])[0]) + predictor.prompt.taken
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (query,) = predictor.encode_queries([text])
            scores, _ = predictor.scores([short, text])
        taken, limit = len(query) + predictor.prompt.taken, base.max_length
        # a character may be of several tokens
        assert taken == longest <= limit or limit - 8 < taken <= limit < longest
        said = ["were cut at their end" in str(warning.message) for warning in caught]
        assert any(said) == (longest > base.max_length)
        torch.testing.assert_close(scores[:1], expected, rtol=1e-4, atol=1e-4)
        assert scores.isfinite().all()

    check()
    predictor.close()


# ---- a number or an error -------------------------------------------------------------------------------------------


class Masked(torch.nn.Module):
    """A head that never gives some tokens, as constrained decoding has it."""

    def __init__(self, head, ids):
        super().__init__()
        self.head, self.ids = head, ids

    def forward(self, hidden):
        logits = self.head(hidden).clone()
        logits[..., self.ids] = -torch.inf
        return logits


def break_weight(model, ids):
    model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan


def break_head(model, ids):
    model.lm_head = Masked(model.lm_head, ids)


def break_precision(model, ids):
    model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    model.half()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("harm", [break_weight, break_head, break_precision])
@torch.no_grad()
def test_scores_and_losses_that_are_not_finite_are_an_error(method, harm, random_base, two):
    label = fit("zero", random_base, two).candidates[0]
    base = dataclasses.replace(random_base, model=copy.deepcopy(random_base.model))
    harm(base.model, label)
    message = "not finite|loss became .* load the model in float32"
    if harm is break_precision and METHODS[method].trains:
        message = "is not trained in float16"
    with pytest.raises(MiniCPTError, match=message):
        with torch.enable_grad():
            fit(method, base, two).predict(["a film"])


@pytest.mark.parametrize("method", METHODS)
def test_words_with_one_first_token_are_refused_where_only_it_counts(method, random_base, two):
    words = {"negative": "north one", "positive": "north two"}
    with pytest.raises(MiniCPTError, match="the same first token"):
        fit(method, random_base, dataclasses.replace(two, verbalizers=words), label_score="first")


def test_so_are_they_in_cells_and_classifiers(tmp_path):
    words = {"y": "north one", "n": "north two"}
    path = write_task(tmp_path, {**SPEC, "verbalizers": words})
    with pytest.raises(MiniCPTError, match="the same first token"):
        run_cell(Cell(path, "icl", 2, 0, label_score="first"))
    few = FewShotClassifier("icl", shots=2, verbalizers=[*words.values()], label_score="first")
    with pytest.raises(MiniCPTError, match="the same first token"):
        few.fit(["a", "b", "c", "d"], ["n", "y"] * 2)


rows = st.lists(st.floats(-600, 0, width=32), min_size=3, max_size=3)


@SETTINGS
@given(st.lists(rows, min_size=1, max_size=4), st.lists(rows, min_size=1, max_size=3))
def test_calibrated_scores_are_finite_and_those_of_a_wider_number(given, content_free):
    """Long labels lie hundreds of nats apart: their probability is no float32, its logarithm is."""
    given, content_free = torch.tensor(given), torch.tensor(content_free)
    wide = content_free.double().log_softmax(-1).logsumexp(0) - math.log(len(content_free))
    expected = given.double().log_softmax(-1) - wide
    found = calibrate(given, content_free)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)

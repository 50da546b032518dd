"""The scikit-learn estimator: its contract check by check, labels of all kinds, saving, and what it shares."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score, cross_validate
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from minicpt import FewShotClassifier, MiniCPTError, data
from minicpt.core.templates import Template, encode
from minicpt.core.train import TrainingDiverged
from minicpt.methods import classifier
from minicpt.methods.registry import METHODS

HP = {"epochs": 2, "lr": 0.02}  # mechanics only
TRAINED = ["cpt", "pt", "ipt", "lora"]


@pytest.fixture(scope="module")
def rows():
    """Twenty labelled sentences and some more: texts, labels, other texts, their labels."""
    task = data.load_task("set_cls")
    texts, labels = map(list, zip(*task.train[:20]))
    return texts, labels, *map(list, zip(*task.test[:40]))


def small(method="cpt", **kwargs):
    return FewShotClassifier(
        method, **{"shots": 4, "hp": HP if METHODS[method].trains else None, **kwargs}
    )


# ---- what it is for -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["set_cls", "trec"])
@pytest.mark.parametrize("method, shots", [("icl", 4), ("icl", 6), ("cpt", 6)])
def test_better_than_chance(name, method, shots):
    task = data.load_task(name)
    (texts, labels), (X, y) = zip(*task.train[:20]), zip(*task.test[:100])
    fitted = FewShotClassifier(method, shots=shots).fit(texts, labels)
    assert fitted.score(X, y) > 1 / len(fitted.classes_) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_and_gives_probabilities(rows, method):
    texts, labels, X, y = rows
    for calibrated in (False, True):
        fitted = small(method, instruction="name the kind of things.", calibrated=calibrated).fit(
            texts, labels
        )
        p = fitted.predict_proba(X)
        assert p.shape == (40, 4) and (p >= 0).all()
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
        assert (fitted.classes_[p.argmax(1)] == fitted.predict(X)).all()
        assert fitted.score(X, y) == pytest.approx(np.mean(fitted.predict(X) == np.array(y)))
        scores = fitted.predictor_.scores(X)[calibrated].double()
        np.testing.assert_allclose(p, scores.softmax(-1), atol=1e-6)


def test_it_is_methods_fit_with_the_rest_as_extra_rows(rows):
    """The same shots, seed and rows through `fit` by hand give the same probabilities."""
    from minicpt.methods.fit import fit

    texts, labels, X, _ = rows
    ours = small(random_state=3).fit(texts, labels)
    pairs, words = list(zip(texts, labels)), sorted(set(labels))
    assert ours.shots_ == data.sample_shots(labels, 4, 3)
    split = data.Split(
        "", [pairs[i] for i in ours.shots_], [], {w: w for w in words}, Template(), "", 3
    )
    rest = [pair for i, pair in enumerate(pairs) if i not in ours.shots_]
    by_hand = fit(
        "cpt", classifier._shared_base("micro"), split, {**HP, "batch_size": 16}, extra=rest
    )
    assert len(by_hand.history) == 2 * 2  # 2 epochs of 20 rows in batches of 16
    assert by_hand.history == ours.predictor_.history
    np.testing.assert_allclose(
        ours.predict_proba(X), by_hand.scores(X)[0].double().softmax(-1), atol=1e-6
    )
    alone = fit("cpt", classifier._shared_base("micro"), split, {**HP, "batch_size": 16})
    assert len(alone.history) == 2 and alone.history != by_hand.history  # the rest does train


# ---- the context ----------------------------------------------------------------------------------------------------


def test_how_many_shots_nobody_asked_for(rows):
    texts, labels, *_ = rows
    base = classifier._shared_base("micro")

    def chosen(texts, labels, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if kwargs.pop("cut", False) else "error")
            fitted = FewShotClassifier("icl", **kwargs).fit(texts, labels)
        assert len({labels[i] for i in fitted.shots_}) == min(len(fitted.shots_), len(set(labels)))
        return fitted, len(fitted.shots_)

    assert chosen(texts, labels)[1] == 8
    assert chosen(texts[:5], labels[:5])[1] == 5  # all there are
    assert chosen(texts, [f"kind {i % 10}" for i in range(20)])[1] == 10  # one a class
    fitted, k = chosen(texts, labels, max_length=90)
    assert 4 <= k < 8  # as many as fit: one more would not
    length = [len(e) for e in encode(base.tokenizer, Template(), list(zip(texts, labels)))]
    rest = max(length) + max(map(len, fitted.predictor_.candidates))
    assert fitted.predictor_.prefix.shape[1] + rest <= 90
    assert sum(length[i] for i in data.sample_shots(labels, k + 1, 0)) + rest > 90
    with pytest.warns(UserWarning, match="were cut to"):
        FewShotClassifier("icl", max_length=60).fit([t + " banana" * 30 for t in texts], labels)
    assert (
        chosen([t + " banana" * 30 for t in texts], labels, max_length=60, cut=True)[1] == 4
    )  # not below one a class


def test_shots_asked_for(rows):
    texts, labels, *_ = rows
    assert len(small("icl", shots=np.int64(6)).fit(texts, labels).shots_) == 6
    with pytest.raises(MiniCPTError, match="Cannot draw 21 shots from 20"):
        small("icl", shots=21).fit(texts, labels)
    for shots in (0, 2.5, "4"):
        with pytest.raises(MiniCPTError, match="shots must be a whole number from 1"):
            small("icl", shots=shots).fit(texts, labels)


def test_a_query_longer_than_all_that_was_seen_is_cut_and_others_do_not_notice(rows):
    texts, labels, X, _ = rows
    fitted = small("icl", max_length=100).fit(texts, labels)
    expected = fitted.predict_proba(X[:2])
    with pytest.warns(UserWarning, match="1 of 6 texts were cut .* fits into 100"):
        both = fitted.predict_proba([*X[:2], "banana " * 300])
    np.testing.assert_allclose(both[:2], expected, atol=1e-6)
    assert np.isfinite(both).all()


# ---- labels ---------------------------------------------------------------------------------------------------------

WORDS = ["fruit", "tool", "instrument", "clothing"]
KINDS = {
    "str": ["b", "a", "d", "c"],
    "int": [3, -1, 20, 0],
    "float": [0.5, 2.0, -1.5, 1e9],
    "tuple": [("b", (1, "x")), ("a", ()), ("a", (1,)), ("c", (0,))],
    "mixed": ["a", 1, (2, "b"), 2.5],
    "frozenset": [frozenset({n}) for n in range(4)],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [True, False])
def test_labels_of_any_hashable_type(rows, kind, given, tmp_path):
    texts, old, X, old_y = rows
    new = dict(zip(WORDS, KINDS[kind]))
    labels, y = [new[label] for label in old], [new[label] for label in old_y]
    verbalizers = {label: word for word, label in new.items()} if given else None
    fitted = small("icl", verbalizers=verbalizers).fit(texts, labels)
    assert set(fitted.classes_.tolist()) == set(labels) and fitted.classes_.shape == (4,)
    predicted = fitted.predict(X)
    assert predicted.shape == (40,) and set(predicted.tolist()) <= set(labels)
    assert fitted.score(X, y) == np.mean([p == t for p, t in zip(predicted, y)])
    if given:
        assert fitted.score(X, y) > 0.35
    if kind not in ("mixed", "frozenset"):
        assert fitted.classes_.tolist() == sorted(set(labels))
    if kind == "frozenset":
        with pytest.raises(MiniCPTError, match="cannot be saved"):
            fitted.save(tmp_path)
        return
    fitted.save(tmp_path)
    loaded = FewShotClassifier.load(tmp_path)
    assert (
        loaded.classes_.dtype == fitted.classes_.dtype
        and loaded.classes_.tolist() == fitted.classes_.tolist()
    )
    assert [*map(type, loaded.classes_.tolist())] == [*map(type, fitted.classes_.tolist())]
    assert loaded.predict(X).tolist() == predicted.tolist() and loaded.verbalizers == verbalizers


def test_bools_arrays_and_series(rows):
    texts, labels, X, _ = rows
    is_tool = [label == "tool" for label in labels]
    expected = small("icl").fit(texts, is_tool).predict(X)
    assert expected.dtype == bool
    for T, L in [
        (np.array(texts), np.array(is_tool)),
        (pd.Series(texts, index=range(5, 25)), pd.Series(is_tool)),
        (tuple(texts), tuple(is_tool)),
        (np.array(texts, object), np.array(is_tool, object)),
    ]:
        fitted = small("icl").fit(T, L)
        assert (
            fitted.classes_.tolist() == [False, True]
            and (fitted.predict(np.array(X)) == expected).all()
        )


def test_words_that_cannot_tell_the_labels_apart(rows):
    texts, labels, *_ = rows
    two = [label == "tool" for label in labels]
    for verbalizers, message in [
        ({True: "yes", False: "yes "}, "labels False and True share the label word 'yes'"),
        ({True: "yes"}, "no word for the label False"),
        ({True: "yes", False: " "}, "no word for the label False"),
    ]:
        with pytest.raises(MiniCPTError, match=message):
            small("icl", verbalizers=verbalizers).fit(texts, two)
    with pytest.raises(MiniCPTError, match="labels .* and .* share the label word '1'"):
        small("icl").fit(texts, [1, "1"] * 10)
    with pytest.raises(
        MiniCPTError, match="same first token"
    ):  # "first" sees the space before a digit alone
        small("icl", label_score="first").fit(texts, [0, 1] * 10)
    small("icl").fit(texts, [0, 1] * 10)


# ---- the estimator's contract ---------------------------------------------------------------------------------------


def test_unfitted(rows, tmp_path):
    for call in (
        lambda c: c.predict(["a"]),
        lambda c: c.predict_proba(["a"]),
        lambda c: c.score(["a"], ["b"]),
        lambda c: c.save(tmp_path),
    ):
        with pytest.raises(NotFittedError):
            call(FewShotClassifier())
    assert is_classifier(FewShotClassifier())


def test_parameters_are_kept_as_given_and_fitting_changes_none(rows):
    texts, labels, *_ = rows
    given = dict(
        method="cpt",
        model="micro",
        shots=4,
        template=Template("text: {}"),
        verbalizers={w: w for w in WORDS},
        instruction="",
        hp=dict(HP),
        label_score="sum",
        calibrated=True,
        max_length=300,
        random_state=1,
    )
    estimator = FewShotClassifier(**given)
    assert (
        all(value is given[name] for name, value in estimator.get_params().items())
        and len(given) == 11
    )
    copies = {name: pickle.dumps(value) for name, value in given.items()}
    inputs = pickle.dumps((texts, labels))
    assert estimator.fit(texts, labels) is estimator
    assert all(value is given[name] for name, value in estimator.get_params().items())
    assert {name: pickle.dumps(value) for name, value in given.items()} == copies
    assert pickle.dumps((texts, labels)) == inputs


def test_clone_and_set_params(rows):
    texts, labels, X, _ = rows
    fitted = small(calibrated=True).fit(texts, labels)
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params() and not hasattr(copy, "predictor_")
    assert (copy.fit(texts, labels).predict_proba(X) == fitted.predict_proba(X)).all()
    assert (
        copy.set_params(method="icl", shots=6) is copy and len(copy.fit(texts, labels).shots_) == 6
    )
    with pytest.raises(ValueError, match="Invalid parameter"):
        copy.set_params(shot=2)
    assert "method='icl'" in repr(copy)


@pytest.mark.parametrize(
    "texts, labels, message",
    [
        ([], [], "no text; .* at least one"),
        (["a", "b"], ["x"], "2 texts and 1 labels"),
        (["a", 3], ["x", "y"], "Text 1 is no string but 3"),
        (["a", None], ["x", "y"], "Text 1 is no string but None"),
        (["a", " "], ["x", "y"], "Text 1 is empty"),
        (["a", "b"], ["x", "x"], "All labels are 'x'; a classifier needs at least two classes"),
        ([["a"], ["b"]], ["x", "y"], "Text 0 is no string but ..a"),
        (np.array([["a"], ["b"]]), ["x", "y"], r"one-dimensional list .* \(2, 1\)"),
        (pd.DataFrame({"text": ["a", "b"]}), ["x", "y"], "one-dimensional list"),
        (["a", "b"], np.array([["x"], ["y"]]), "labels must be a one-dimensional"),
        ("a text", ["x"], "one-dimensional list"),
        (None, ["x"], "one-dimensional list"),
        (["a", "b"], None, "labels must be a one-dimensional"),
        (["a", "b"], ["x", None], "Label 1 is None"),
        (["a", "b"], [1.0, float("nan")], "Label 1 is nan"),
        (["a", "b"], [["x"], ["y"]], "Label 0 is .* hashable"),
    ],
)
def test_bad_rows(texts, labels, message):
    with pytest.raises(MiniCPTError, match=message):
        small("icl", shots=1).fit(texts, labels)


def test_bad_rows_to_predict(rows):
    texts, labels, X, y = rows
    fitted = small("icl").fit(texts, labels)
    for bad in ([], "a text", [3], [["a"]], np.array([["a"]])):
        with pytest.raises(ValueError):
            fitted.predict(bad)
    with pytest.raises(MiniCPTError, match="40 texts and 3 labels"):
        fitted.score(X, y[:3])
    assert fitted.predict([""]).shape == (1,)  # a query may be empty


@pytest.mark.parametrize(
    "params, message",
    [
        ({"method": "ctp"}, "Unknown method 'ctp'. Did you mean 'cpt'"),
        ({"model": "./no_such_folder"}, "no model folder"),
        ({"label_score": "men"}, "Did you mean 'mean'"),
        ({"template": "text: {}"}, "template must be a Template"),
        ({"hp": {"epoch": 3}}, "Unknown hyper-parameter 'epoch'. Did you mean 'epochs'"),
        ({"method": "cpt_instr"}, 'cpt_instr needs an instruction, .*instruction="..."'),
        ({"max_length": 0}, "max_length must be a whole number"),
        ({"max_length": 5}, "does not fit"),
    ],
)
def test_bad_parameters(rows, params, message):
    with pytest.raises(MiniCPTError, match=message):
        FewShotClassifier(**params).fit(*rows[:2])


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_reproducible_and_the_global_random_state_is_left_alone(rows, method):
    texts, labels, X, _ = rows
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, second, other = (
        small(method, random_state=s).fit(texts, labels).predict_proba(X) for s in (5, 5, 6)
    )
    assert (first == second).all() and not (first == other).all()
    assert torch.equal(before, torch.random.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()
    a, b = (small(method, random_state=np.random.RandomState(1)).fit(texts, labels) for _ in "ab")
    assert a.seed_ == b.seed_ and (a.predict_proba(X) == b.predict_proba(X)).all()


def test_a_failed_fit_leaves_the_old_one(rows, monkeypatch):
    texts, labels, X, _ = rows
    fitted = small("icl").fit(texts, labels)
    expected = fitted.predict_proba(X)
    fitted.set_params(method="cpt", hp={"decay": 1e30})
    with pytest.raises(TrainingDiverged):
        fitted.fit(texts, labels)
    assert (fitted.predict_proba(X) == expected).all()


# ---- in scikit-learn's hands ----------------------------------------------------------------------------------------


def test_pipeline_and_grid_search(rows):
    texts, labels, X, y = rows
    steps = [
        ("lower", FunctionTransformer(lambda X: [x.lower() for x in X])),
        ("few", small("icl")),
    ]
    pipeline = Pipeline(steps).fit([t.upper() for t in texts], labels)
    assert (pipeline.predict(X) == small("icl").fit(texts, labels).predict(X)).all()
    search = GridSearchCV(
        pipeline, {"few__shots": [2, 4], "few__method": ["icl", "zero"]}, cv=2
    ).fit(texts, labels)
    assert not np.isnan(search.cv_results_["mean_test_score"]).any() and search.score(X, y) >= 0
    verbalizers = {
        (w, 0): w for w in WORDS
    }  # tuples: the cross-validation must not look at the labels
    scores = cross_val_score(
        small("icl", verbalizers=verbalizers), texts, [(w, 0) for w in labels], cv=KFold(2)
    )
    assert (scores > 0).all()


@pytest.mark.slow
def test_two_processes(rows):
    texts, labels, X, _ = rows
    fitted = small("lora").fit(
        texts, labels
    )  # scikit-learn's scorer carries it along, fitted as it is
    args = dict(X=texts, y=labels, cv=2, error_score="raise", return_estimator=True)
    one, two = (cross_validate(fitted, **args, n_jobs=n) for n in (1, 2))
    assert (one["test_score"] == two["test_score"]).all()
    for here, there in zip(
        one["estimator"], two["estimator"]
    ):  # back from the other process, fitted
        np.testing.assert_allclose(here.predict_proba(X), there.predict_proba(X), atol=1e-6)
    assert len(cross_val_score(small("icl"), texts, labels, cv=2, n_jobs=2)) == 2  # unfitted
    with pytest.raises(MiniCPTError, match="not pickled"):
        pickle.dumps(fitted)


# ---- one base model, many classifiers -------------------------------------------------------------------------------


def test_fitted_classifiers_do_not_disturb_each_other(rows):
    texts, labels, X, _ = rows
    base = classifier._shared_base("micro")
    weights = {k: v.clone() for k, v in base.model.state_dict().items()}
    fitted, expected = [], []
    for method, seed in [("lora", 0), ("cpt", 0), ("lora", 1), ("icl", 0), ("pt", 0)]:
        fitted.append(small(method, random_state=seed).fit(texts, labels))
        expected.append(fitted[-1].predict_proba(X))
    for one, p in zip(fitted, expected):
        assert (one.predict_proba(X) == p).all()
    assert classifier._shared_base("micro") is base and not base.model.training
    after = base.model.state_dict()
    assert weights.keys() == after.keys() and all(
        torch.equal(weights[k], after[k]) for k in weights
    )
    assert not any(p.requires_grad for p in base.model.parameters())
    assert (clone(fitted[3]).fit(texts, labels).predict_proba(X) == expected[3]).all()


# ---- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zero", "icl", *TRAINED])
def test_save_and_load(rows, method, tmp_path):
    texts, labels, X, _ = rows
    fitted = small(
        method, calibrated=True, template=Template("text: {}"), max_length=np.int64(200)
    ).fit(texts, labels)
    fitted.save(tmp_path / "new" / "folder")
    state = torch.random.get_rng_state()
    loaded = FewShotClassifier.load(tmp_path / "new" / "folder")
    assert torch.equal(state, torch.random.get_rng_state())
    assert (loaded.predict_proba(X) == fitted.predict_proba(X)).all()
    assert loaded.get_params() == fitted.get_params()
    assert loaded.shots_ == fitted.shots_ and loaded.predictor_.history == fitted.predictor_.history
    assert (loaded.fit(texts, labels).predict_proba(X) == fitted.predict_proba(X)).all()
    fitted.save(tmp_path / "new" / "folder")  # again, over the old one
    assert [f.name for f in (tmp_path / "new" / "folder").iterdir()] == ["classifier.safetensors"]


def test_pickling_is_for_the_unfitted(rows):
    texts, labels, X, _ = rows
    estimator = pickle.loads(pickle.dumps(small("icl")))
    estimator.fit(texts, labels)
    with pytest.raises(MiniCPTError, match=r"save\(folder\) and FewShotClassifier.load\(folder\)"):
        pickle.dumps(estimator)


def test_an_interrupted_save_leaves_the_old_one(rows, tmp_path, monkeypatch):
    texts, labels, X, _ = rows
    old = small("icl").fit(texts, labels)
    old.save(tmp_path)

    def stop(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        small("icl", shots=6).fit(texts, labels).save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["classifier.safetensors"]
    assert (FewShotClassifier.load(tmp_path).predict_proba(X) == old.predict_proba(X)).all()


def test_damaged_foreign_and_missing_files(rows, tmp_path, monkeypatch):
    texts, labels, *_ = rows
    path = tmp_path / "classifier.safetensors"
    with pytest.raises(MiniCPTError, match="Cannot read .*classifier.safetensors"):
        FewShotClassifier.load(tmp_path)
    small("icl").fit(texts, labels).save(tmp_path)
    content = path.read_bytes()
    for damage in (content[:-10], content[:20], b"", b"not a safetensors file at all"):
        path.write_bytes(damage)
        with pytest.raises(MiniCPTError, match="Cannot read .*classifier.safetensors"):
            FewShotClassifier.load(tmp_path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(MiniCPTError, match="not written by FewShotClassifier.save"):
        FewShotClassifier.load(tmp_path)
    path.write_bytes(content)
    monkeypatch.setattr(classifier._shared_base("micro"), "fingerprint", "another")
    with pytest.raises(MiniCPTError, match="configuration of 'micro' are not those of the fit"):
        FewShotClassifier.load(tmp_path)

"""`FewShotClassifier`: every method as a scikit-learn estimator, for people with twenty labelled sentences."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from numbers import Integral
from pathlib import Path

import numpy as np
from joblib.externals.loky.backend.reduction import register as register_for_joblib
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..core.templates import Template
from ..data import Split, sample_shots
from ..engine.base_models import BaseModel, load_base
from ..errors import MiniCPTError
from . import persistence
from .fit import ONE_AT_A_TIME, Predictor, fit
from .prepare import Prompt, read_task
from .registry import METHODS, hyperparameters

DEFAULT_SHOTS = 8  # a longer context costs time in every step and every prediction
BATCH = 16  # rows, where the tuned batch is all rows: here these may be many
_shared_base = lru_cache(maxsize=1)(load_base)  # a grid search loads it once a process


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Classify texts with a frozen language model and a few examples: `.fit(texts, labels).predict(texts)`.

    - `method`: a name of `METHODS`; `model`: "micro", a folder in Hugging Face format, or a hub name
    - `shots`: examples in the context, drawn from distinct classes first; methods that train also train on the rest
      (zero, PT and LoRA have no context, ICL leaves the rest out). None: 8, or one a class if there are more classes;
      fewer if the longest example, as a query, would not fit uncut, but not below one a class or 8 (then texts are cut)
    - `verbalizers`: {label: label word}, by default `str(label)`; `instruction`: text for the "_instr" methods
    - `hp`: overrides single hyper-parameters; where the tuned batch is "all rows", it is at most 16 rows here
    - `label_score`, `calibrated`, `max_length`: see `label_scores`, `calibrate` and `methods.fit`

    Labels may be of any hashable type. Once fitted: `classes_` (C,), the order of `predict_proba`'s columns; `shots_`,
    the rows in the context; `seed_`; `predictor_`. Texts are no features: there is no `n_features_in_`.
    Fitted classifiers do not disturb each other: they share one base model that none of them changes, in any number of
    threads (fits wait for each other). Bad input raises `MiniCPTError`, a `ValueError`.
    """

    def __init__(
        self,
        method="cpt",
        model="micro",
        shots=None,
        template=Template(),
        verbalizers=None,
        instruction="",
        hp=None,
        label_score="sum",
        calibrated=False,
        max_length=None,
        random_state=0,
    ):
        self.method = method
        self.model = model
        self.shots = shots
        self.template = template
        self.verbalizers = verbalizers
        self.instruction = instruction
        self.hp = hp
        self.label_score = label_score
        self.calibrated = calibrated
        self.max_length = max_length
        self.random_state = random_state

    def fit(self, X: Sequence[str], y: Sequence[Hashable]) -> "FewShotClassifier":
        """Fit on N texts and their N labels. Raises `MiniCPTError` for bad parameters or rows, or a single class."""
        texts, labels = _texts(X), _labels(y, X)
        if "" in texts:
            raise MiniCPTError(f"Text {texts.index('')} is empty; leave the row out.")
        classes = _classes(labels)
        hp, word_of = self._hyperparameters(), self._words(classes)
        # inside, a class is called by its word
        rows = [(text, word_of[label]) for text, label in zip(texts, labels)]
        base, seed = self._base(), self.random_state
        if not isinstance(seed, Integral):
            seed = check_random_state(seed).randint(2**31 - 1)
        everything = Split(
            "FewShotClassifier",
            rows,
            [],
            {word: word for word in word_of.values()},
            self.template,
            self.instruction,
            int(seed),
        )
        options = (hp, self.label_score, self.max_length)
        prompt = read_task(self.method, base, everything, *options)
        chosen = self._choose(prompt, everything)
        split = replace(everything, shots=[rows[i] for i in chosen])
        rest = [row for i, row in enumerate(rows) if i not in chosen]
        predictor = fit(self.method, base, split, *options, extra=rest)
        return self._set_fitted(predictor, classes, chosen, split.seed, base.fingerprint)

    def _hyperparameters(self) -> dict:
        """Those of this fit; raises for parameters that have no meaning."""
        hp = hyperparameters(self.method, self.model, self.hp)
        if not isinstance(self.template, Template):
            raise MiniCPTError(
                f'template must be a Template, such as Template("text: {{}}"); got {self.template!r}.'
            )
        for name, value in (("shots", self.shots), ("max_length", self.max_length)):
            if value is not None and not (isinstance(value, Integral) and value >= 1):
                raise MiniCPTError(f"{name} must be None or a whole number from 1, got {value!r}.")
        if METHODS[self.method].trains is None:
            return {}
        return hp | {"batch_size": hp["batch_size"] or BATCH} | (self.hp or {})

    def _base(self) -> BaseModel:
        """The base model that all classifiers share."""
        with ONE_AT_A_TIME:
            return _shared_base(self.model)

    def _words(self, classes: list) -> dict[Hashable, str]:
        """The label word of each class; raises if one has none, or two share one."""
        given = {c: c for c in classes} if self.verbalizers is None else self.verbalizers
        words, label_of = {}, {}
        for label in classes:
            word = str(given.get(label, "")).strip()  # outer spaces belong to the template
            if not word:
                raise MiniCPTError(
                    f"There is no word for the label {label!r}; verbalizers must give every label one."
                )
            if word in label_of:
                raise MiniCPTError(
                    f"The labels {label_of[word]!r} and {label!r} share the word {word!r}; give each its own."
                )
            words[label], label_of[word] = word, label
        return words

    def _choose(self, prompt: Prompt, split: Split) -> list[int]:
        """Which of the split's rows stand in the context, in its order."""
        words = [word for _, word in split.shots]
        if self.shots is not None:
            return sample_shots(words, self.shots, split.seed)
        lengths = [len(row) for row in prompt.encode(split.shots)]
        room = prompt.limit - prompt.taken - max(lengths)  # the longest row as the query
        most = min(max(DEFAULT_SHOTS, len(split.classes)), len(words))
        least = min(DEFAULT_SHOTS, len(split.classes))
        for k in range(most, least, -1):
            chosen = sample_shots(words, k, split.seed)
            if sum(lengths[i] for i in chosen) <= room:
                return chosen
        return sample_shots(words, least, split.seed)

    def _set_fitted(
        self, predictor: Predictor, classes: list, chosen: list[int], seed: int, fingerprint: str
    ) -> "FewShotClassifier":
        """Keep what prediction and `save` need."""
        if len({*map(type, classes)}) == 1 and type(classes[0]) in (str, int, float, bool):
            self.classes_ = np.array(classes)
        else:  # the None keeps NumPy from making a table of tuples
            self.classes_ = np.array([*classes, None], dtype=object)[:-1]
        self.shots_ = chosen
        self.seed_ = seed
        self.predictor_ = predictor
        self._fingerprint = fingerprint
        return self

    def predict_proba(self, X: Sequence[str]) -> np.ndarray:
        """Probabilities (N, C) of the classes in `classes_`: the label scores' softmax, calibrated if asked for."""
        check_is_fitted(self, "predictor_")
        raw, calibrated = self.predictor_.scores(_texts(X))
        return (calibrated if self.calibrated else raw).double().softmax(-1).numpy()

    def predict(self, X: Sequence[str]) -> np.ndarray:
        """The most probable class of each text, (N,)."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def score(self, X: Sequence[str], y: Sequence[Hashable], sample_weight=None) -> float:
        """Accuracy; scikit-learn's own would take a tuple for several labels."""
        right = [predicted == label for predicted, label in zip(self.predict(X), _labels(y, X))]
        return float(np.average(right, weights=sample_weight))

    def __getstate__(self):
        if hasattr(self, "predictor_"):
            raise MiniCPTError(
                "A fitted FewShotClassifier holds a language model and is not pickled or deep-copied: "
                "use save(folder) and FewShotClassifier.load(folder), or clone()."
            )
        return super().__getstate__()

    def _state(self) -> tuple[dict, dict[str, Tensor]]:
        """All that was fitted but the base model: JSON values and tensors on the CPU."""
        fitted, tensors = persistence.take_apart(self.predictor_)
        params = {
            **self.get_params(deep=False),
            "template": asdict(self.template),
            "random_state": self.seed_,
            "verbalizers": self.verbalizers is not None,
        }
        state = {
            "params": params,
            "classes": self.classes_.tolist(),
            "shots": self.shots_,
            "fingerprint": self._fingerprint,
            "predictor": fitted,
        }
        return state, tensors

    @classmethod
    def _from_state(cls, state: dict, tensors: dict[str, Tensor]) -> "FewShotClassifier":
        params, classes = dict(state["params"]), [_tuples(label) for label in state["classes"]]
        params["template"] = Template(**params["template"])
        words = state["predictor"]["classes"]
        params["verbalizers"] = dict(zip(classes, words)) if params["verbalizers"] else None
        self = cls(**params)
        base = self._base()
        if base.fingerprint != state["fingerprint"]:
            raise MiniCPTError(
                f"The weights of {self.model!r} are not those of the fit; fit again, or restore them."
            )
        predictor = persistence.put_together(state["predictor"], tensors, base, self.template)
        return self._set_fitted(
            predictor, classes, state["shots"], params["random_state"], base.fingerprint
        )

    def save(self, folder: str | Path) -> None:
        """Write all but the base model to one file in `folder`; an interrupted save leaves an older file whole.

        A `random_state` that is no number is saved as the seed it gave.
        Raises `NotFittedError`, and `MiniCPTError` for labels other than text, numbers, bools and tuples of them.
        """
        check_is_fitted(self, "predictor_")
        persistence.write(folder, *self._state())

    @classmethod
    def load(cls, folder: str | Path) -> "FewShotClassifier":
        """Load what `save` wrote. Raises `MiniCPTError` for a damaged or foreign file and for another base model."""
        return cls._from_state(*persistence.read(folder))


def _between_processes(classifier: FewShotClassifier):
    """How joblib carries a classifier: scikit-learn sends fitted ones to its workers, inside scorers, and back."""
    if hasattr(classifier, "predictor_"):
        return FewShotClassifier._from_state, classifier._state()
    return classifier.__reduce_ex__(4)


# with n_jobs=2 alone: pickle itself goes on refusing fitted classifiers, and a worker loads a base model of its own
register_for_joblib(FewShotClassifier, _between_processes)


def _tuples(label) -> Hashable:
    """A label as it was before JSON made lists of its tuples; no label is a list, lists have no hash."""
    return tuple(map(_tuples, label)) if isinstance(label, list) else label


def _classes(labels: list[Hashable]) -> list[Hashable]:
    """The distinct labels, sorted; labels without an order keep that of their first appearance."""
    classes = list(dict.fromkeys(labels))
    if len(classes) < 2:
        raise MiniCPTError(
            f"All labels are {labels[0]!r}; a classifier needs at least two classes."
        )
    try:
        return sorted(classes)
    except TypeError:
        return classes


def _texts(X: Sequence[str]) -> list[str]:
    """Check that X is a list (or array, or series) of strings; outer spaces belong to the template."""
    texts = _column(X, "texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise MiniCPTError(
                f"Text {i} is no string but {text!r}; convert the texts, or leave it out."
            )
    return [str(text).strip() for text in texts]


def _labels(y: Sequence[Hashable], X: Sequence[str]) -> list[Hashable]:
    """Check that y holds one hashable label a text, and turn NumPy's scalars into Python's."""
    labels = [
        label.item() if isinstance(label, np.generic) else label for label in _column(y, "labels")
    ]
    if len(X) != len(labels):
        raise MiniCPTError(
            f"There are {len(X)} texts and {len(labels)} labels; each text needs one label."
        )
    for i, label in enumerate(labels):
        if not isinstance(label, Hashable) or label is None or label != label:
            raise MiniCPTError(f"Label {i} is {label!r}; labels must be hashable and not missing.")
    return labels


def _column(values: Sequence, what: str) -> list:
    if (
        isinstance(values, str)
        or not hasattr(values, "__len__")
        or getattr(values, "ndim", 1) != 1
        or len(values) == 0
    ):
        given = getattr(values, "shape", None) or repr(values)[:60]
        raise MiniCPTError(
            f"The {what} must be a one-dimensional list with at least one entry, got {given}."
        )
    return list(values)

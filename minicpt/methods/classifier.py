"""`FewShotClassifier`: every method as a scikit-learn estimator, for people with twenty labelled sentences."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, replace
from numbers import Real
from pathlib import Path

import numpy as np
from joblib.externals.loky.backend.reduction import register as register_for_joblib
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..core.templates import Template
from ..data import Split, fill_instruction, sample_shots
from ..engine.base_models import BaseModel, load_base
from ..engine.sources import model_files, remembered
from ..errors import MiniCPTError, check_type, whole_number
from . import persistence
from .fit import ONE_AT_A_TIME, Predictor, fit
from .inputs import distinct, read_labels, read_texts, words_of
from .prepare import Prompt, read_task
from .registry import METHODS, hyperparameters

DEFAULT_SHOTS = 8  # a longer context costs time in every step and every prediction
BATCH = 16  # rows, where the tuned batch is all rows: here these may be many
_shared_base = remembered(load_base, model_files, 1)  # a grid search loads it once a process


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Classify texts with a frozen language model and a few examples: `.fit(texts, labels).predict(texts)`.

    - `method`: a name of `METHODS`; `model`: "micro", a folder in Hugging Face format, or a hub name
    - `shots`: examples in the context, drawn from distinct classes first; methods that train also train on the rest
      (zero, PT and LoRA have no context, ICL leaves the rest out). None: 8, or one a class if there are more classes;
      fewer if the longest example, as a query, would not fit uncut, but not below one a class or 8 (then texts are cut)
    - `verbalizers`: {label: label word}, or a list of words in the order of `classes_`, which also suits estimators
      that turn labels into 0 … C-1 (VotingClassifier, StackingClassifier, OneVsRestClassifier); by default the labels
      as text, with a warning for numbers, which tell a model nothing
    - `instruction`: text for the "_instr" methods; {labels} in it stands for the label words
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
        texts = _texts(X)
        labels = read_labels(y, len(texts))
        if "" in texts:
            raise MiniCPTError(f"Text {texts.index('')} is empty; leave the row out.")
        classes = distinct(labels)
        hp, word_of = self._hyperparameters(), words_of(classes, self.verbalizers)
        # inside, a class is called by its word
        rows = [(text, word_of[label]) for text, label in zip(texts, labels)]
        base, seed = self._base(), self.random_state
        if isinstance(seed, (Real, str)):
            seed = whole_number("random_state", seed)
        else:
            seed = check_random_state(seed).randint(2**31 - 1)
        everything = Split(
            "FewShotClassifier",
            rows,
            [],
            {word: word for word in word_of.values()},
            self.template,
            fill_instruction(self.instruction or "", [*word_of.values()]),
            seed,
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
            if value is not None:
                whole_number(name, value, 1)
        if not isinstance(self.instruction, str | None):
            raise MiniCPTError(f"instruction must be a text, got {self.instruction!r}.")
        check_type("calibrated", self.calibrated, bool)
        if METHODS[self.method].trains is None:
            return {}
        if "batch_size" not in (self.hp or {}):
            hp["batch_size"] = hp["batch_size"] or BATCH
        return hp

    def _base(self) -> BaseModel:
        """The base model that all classifiers share."""
        with ONE_AT_A_TIME:
            return _shared_base(self.model)

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
        truth = read_labels(y, len(X))
        right = [predicted == label for predicted, label in zip(self.predict(X), truth)]
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
        given = self.verbalizers
        params = {
            **self.get_params(deep=False),
            "template": asdict(self.template),
            "random_state": self.seed_,
            "model": str(self.model),
            "verbalizers": given if isinstance(given, list) else given is not None,
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
        if not isinstance(params["verbalizers"], list):
            params["verbalizers"] = dict(zip(classes, words)) if params["verbalizers"] else None
        self = cls(**params)
        base = self._base()
        if base.fingerprint != state["fingerprint"]:
            raise MiniCPTError(
                f"The weights, tokenizer or configuration of {self.model!r} are not those of the fit; fit again, or "
                "restore them."
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


def _texts(X: Sequence[str]) -> list[str]:
    """At least one text; outer spaces belong to the template."""
    texts = [text.strip() for text in read_texts(X)]
    if not texts:
        raise MiniCPTError("There is no text; give a list with at least one entry.")
    return texts

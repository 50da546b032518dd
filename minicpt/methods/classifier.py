"""`FewShotClassifier`: every method as a scikit-learn estimator, for people with twenty labelled sentences."""

import contextlib
import copy
import json
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from numbers import Integral
from pathlib import Path

import numpy as np
import peft
import safetensors.torch
import torch
from joblib.externals.loky.backend.reduction import register as register_for_joblib
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..core.templates import Encoded, Template, encode, tokenize
from ..data import Split, sample_shots
from ..dropin.configs import IAPTConfig
from ..dropin.iapt import IAPTModel
from ..dropin.saving import read_state, replacing
from ..engine.base_models import BaseModel, load_base
from ..engine.scores import LABEL_SCORES, check_candidates
from ..errors import MiniCPTError, unknown
from .context_tuning import cache_from_tensors, cache_to_tensors
from .fit import Predictor, fit, fit_text_length
from .registry import METHODS, hyperparameters

SHOTS, BATCH = (
    8,
    16,
)  # if nobody says how many; a longer context costs time in every step and every prediction
FILE, FORMAT = "classifier.safetensors", "FewShotClassifier 1"
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
    Fitted classifiers do not disturb each other: they share one base model that none of them changes. LoRA would, so
    every LoRA classifier holds a copy of it. Bad input raises `MiniCPTError`, a `ValueError`.
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
        label_score="mean",
        calibrated=False,
        max_length=None,
        random_state=0,
    ):
        self.method, self.model, self.shots, self.template = method, model, shots, template
        self.verbalizers, self.instruction, self.hp, self.label_score = (
            verbalizers,
            instruction,
            hp,
            label_score,
        )
        self.calibrated, self.max_length, self.random_state = calibrated, max_length, random_state

    def fit(self, X: Sequence[str], y: Sequence[Hashable]) -> "FewShotClassifier":
        """Fit on N texts and their N labels. Raises `MiniCPTError` for bad parameters or rows, or a single class."""
        texts, labels = _texts(X), _labels(y, X)
        if "" in texts:
            raise MiniCPTError(f"Text {texts.index('')} is empty; leave the row out.")
        if len(classes := list(dict.fromkeys(labels))) < 2:
            raise MiniCPTError(
                f"All labels are {labels[0]!r}; a classifier needs at least two classes."
            )
        with contextlib.suppress(
            TypeError
        ):  # labels without an order keep that of their first appearance
            classes = sorted(classes)
        hp, word_of = self._hyperparameters(), self._words(classes)
        rows = [
            (text, word_of[label]) for text, label in zip(texts, labels)
        ]  # inside, a class is called by its word
        base, rs, words = self._base(), self.random_state, list(word_of.values())
        seed = int(rs) if isinstance(rs, Integral) else check_random_state(rs).randint(2**31 - 1)
        candidates = tokenize(base.tokenizer, [self.template.label_text(w) for w in words])
        # "first" looks at one token of each label
        check_candidates(
            {
                w: ids[:1] if self.label_score == "first" else ids
                for w, ids in zip(words, candidates)
            }
        )
        chosen = self._choose(base, rows, candidates, hp, seed)
        rest = [row for i, row in enumerate(rows) if i not in chosen]
        split = Split(
            "FewShotClassifier",
            [rows[i] for i in chosen],
            [],
            {w: w for w in words},
            self.template,
            self.instruction,
            seed,
        )
        predictor = fit(self.method, base, split, hp, self.label_score, self.max_length, extra=rest)
        return self._set_fitted(base, predictor, classes, chosen, seed)

    def _hyperparameters(self) -> dict:
        """Those of this fit; raises for parameters that have no meaning."""
        hp, spec = hyperparameters(self.method, self.model, self.hp), METHODS[self.method]
        if spec.instruction and not self.instruction:
            raise MiniCPTError(
                f'{self.method} needs instruction="...", a sentence that says what to do.'
            )
        if self.label_score not in LABEL_SCORES:
            raise unknown("label score", self.label_score, LABEL_SCORES)
        if not isinstance(self.template, Template):
            raise MiniCPTError(
                f'template must be a Template, such as Template("text: {{}}"); got {self.template!r}.'
            )
        for name, value in (("shots", self.shots), ("max_length", self.max_length)):
            if value is not None and not (isinstance(value, Integral) and value >= 1):
                raise MiniCPTError(f"{name} must be None or a whole number from 1, got {value!r}.")
        return (
            {**hp, "batch_size": hp["batch_size"] or BATCH} | (self.hp or {}) if spec.trains else {}
        )

    def _base(self) -> BaseModel:
        """The base model that all classifiers share; a copy of it for LoRA, which changes it."""
        base = _shared_base(self.model)
        return (
            replace(base, model=copy.deepcopy(base.model))
            if METHODS[self.method].trains == "lora"
            else base
        )

    def _words(self, classes: list) -> dict[Hashable, str]:
        """The label word of each class; raises if one has none, or two share one."""
        given = {c: c for c in classes} if self.verbalizers is None else self.verbalizers
        words = {
            c: str(given.get(c, "")).strip() for c in classes
        }  # outer spaces belong to the template
        for label, word in words.items():
            if not word:
                raise MiniCPTError(
                    f"There is no word for the label {label!r}; verbalizers must give every label one."
                )
            if (other := next(c for c in words if words[c] == word)) != label:
                raise MiniCPTError(
                    f"The labels {other!r} and {label!r} share the word {word!r}; give each its own."
                )
        return words

    def _choose(
        self, base: BaseModel, rows: list, candidates: list[list[int]], hp: dict, seed: int
    ) -> list[int]:
        """Which rows stand in the context, in its order."""
        spec, words = METHODS[self.method], [word for _, word in rows]
        if self.shots is not None:
            return sample_shots(words, self.shots, seed)
        instruction = self.instruction + self.template.inter if spec.instruction else ""
        n_prompt = len(tokenize(base.tokenizer, [instruction])[0])
        n_prompt = n_prompt or (hp["tokens"] if spec.trains in ("prompt", "iapt") else 0)
        lengths = [len(e) for e in encode(base.tokenizer, self.template, rows)]
        # the budget of `methods.fit`, which cuts texts where it is exceeded
        room = self._limit(base) - n_prompt - max(map(len, candidates)) - max(lengths)
        for k in range(min(max(SHOTS, len(candidates)), len(rows)), 0, -1):
            chosen = sample_shots(words, k, seed)
            if k <= min(SHOTS, len(candidates)) or sum(lengths[i] for i in chosen) <= room:
                return chosen

    def _limit(self, base: BaseModel) -> int:
        return int(min(base.max_length, self.max_length or base.max_length))

    def _set_fitted(
        self, base: BaseModel, predictor: Predictor, classes: list, chosen: list[int], seed: int
    ):
        """Keep what prediction and `save` need."""
        tokenizer, template, limit = base.tokenizer, self.template, self._limit(base)
        fixed = max(map(len, predictor.candidates)) + predictor.prefix_length

        def encode_queries(texts: Sequence[str]) -> list[Encoded]:
            rows = [(text, None) for text in texts]
            cap = fit_text_length(fixed, [], encode(tokenizer, template, rows), limit)
            if cap is not None:
                warnings.warn(
                    f"Texts were cut to {cap} tokens, so that the prompt fits into {limit}.",
                    stacklevel=4,
                )
            return encode(tokenizer, template, rows, cap)

        predictor.encode_queries = (
            encode_queries  # queries may be longer than all that was trained on
        )
        if len(types := {*map(type, classes)}) == 1 and types <= {str, int, float, bool}:
            self.classes_ = np.array(classes)
        else:  # the None keeps NumPy from making a table of tuples
            self.classes_ = np.array([*classes, None], dtype=object)[:-1]
        self.shots_, self.seed_, self.predictor_, self._fingerprint = (
            chosen,
            seed,
            predictor,
            base.fingerprint,
        )
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
        predictor, lora, iapt = self.predictor_, None, None
        tensors = {} if predictor.prefix is None else {"prefix": predictor.prefix}
        if METHODS[self.method].trains == "cache":
            tensors = cache_to_tensors(predictor.prefix)
        if isinstance(predictor.model, peft.PeftModel):
            config, tensors = (
                predictor.model.peft_config["default"],
                peft.get_peft_model_state_dict(predictor.model),
            )
            lora = {
                "r": config.r,
                "lora_alpha": config.lora_alpha,
                "target_modules": sorted(config.target_modules),
            }
        elif isinstance(predictor.model, IAPTModel):
            config, tensors = predictor.model.peft_config["default"], predictor.model.trained()
            iapt = {
                "num_virtual_tokens": config.num_virtual_tokens,
                "bottleneck": config.bottleneck,
            }
        params = {
            **self.get_params(deep=False),
            "template": asdict(self.template),
            "random_state": self.seed_,
            "verbalizers": self.verbalizers is not None,
        }
        state = {
            "format": FORMAT,
            "params": params,
            "classes": self.classes_.tolist(),
            "words": predictor.classes,
            "lora": lora,
            "iapt": iapt,
            "candidates": predictor.candidates,
            "history": predictor.history,
            "shots": self.shots_,
            "fingerprint": self._fingerprint,
        }
        return state, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def _from_state(cls, state: dict, tensors: dict[str, Tensor]) -> "FewShotClassifier":
        params, classes = dict(state["params"]), [_tuples(label) for label in state["classes"]]
        params["template"] = Template(**params["template"])
        params["verbalizers"] = (
            dict(zip(classes, state["words"])) if params["verbalizers"] else None
        )
        self = cls(**params)
        base = self._base()
        if base.fingerprint != state["fingerprint"]:
            raise MiniCPTError(
                f"The weights of {self.model!r} are not those of the fit; fit again, or restore them."
            )
        if state["lora"]:
            with torch.random.fork_rng():  # PEFT draws weights at first
                base.model = peft.get_peft_model(
                    base.model, peft.LoraConfig(task_type="CAUSAL_LM", **state["lora"])
                )
            peft.set_peft_model_state_dict(base.model.eval(), tensors)
        prefix, model = (
            tensors["prefix"].to(base.device) if "prefix" in tensors else None,
            base.model,
        )
        if METHODS[self.method].trains == "cache":
            prefix = cache_from_tensors(tensors, base.device)
        if state.get("iapt"):
            with torch.random.fork_rng():  # as above
                model = IAPTModel(model, IAPTConfig(**state["iapt"])).load_weights(tensors)
        predictor = Predictor(
            model,
            prefix,
            state["candidates"],
            state["words"],
            None,
            self.label_score,
            state["history"],
        )
        return self._set_fitted(base, predictor, classes, state["shots"], params["random_state"])

    def save(self, folder: str | Path) -> None:
        """Write all but the base model to one file in `folder`: tensors, and JSON in their header.

        An interrupted save leaves an older file whole. A `random_state` that is no number is saved as the seed it gave.
        Raises `NotFittedError`, and `MiniCPTError` for labels other than text, numbers, bools and tuples of them.
        """
        check_is_fitted(self, "predictor_")
        state, tensors = self._state()
        header = {"minicpt": json.dumps(state, default=_plain)}
        with replacing(folder) as new:
            safetensors.torch.save_file(tensors, new / FILE, header)

    @classmethod
    def load(cls, folder: str | Path) -> "FewShotClassifier":
        """Load what `save` wrote. Raises `MiniCPTError` for a damaged or foreign file and for another base model."""
        path = Path(folder, FILE)
        try:
            tensors, metadata = read_state(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise MiniCPTError(
                f"Cannot read {path}: {error}. Save the classifier again."
            ) from error
        state = json.loads(metadata.get("minicpt", "{}"))
        if state.get("format") != FORMAT:
            raise MiniCPTError(
                f"{path} was not written by FewShotClassifier.save, or by another version of it."
            )
        return cls._from_state(state, tensors)


def _between_processes(classifier: FewShotClassifier):
    # scikit-learn sends fitted estimators to joblib's workers (inside scorers) and back; a worker loads its own base
    if hasattr(classifier, "predictor_"):
        return FewShotClassifier._from_state, classifier._state()
    return classifier.__reduce_ex__(4)


register_for_joblib(FewShotClassifier, _between_processes)


def _plain(value) -> int | float | bool | str:
    """What JSON shall hold for a value that it does not know."""
    if isinstance(value, np.generic):
        return value.item()
    raise MiniCPTError(
        f"{value!r} cannot be saved; labels and parameters may be text, numbers, bools, tuples of them."
    )


def _tuples(label) -> Hashable:
    """A label as it was before JSON made lists of its tuples; no label is a list, lists have no hash."""
    return tuple(map(_tuples, label)) if isinstance(label, list) else label


def _texts(X: Sequence[str]) -> list[str]:
    """Check that X is a list (or array, or series) of strings; outer spaces belong to the template."""
    for i, text in enumerate(texts := _column(X, "texts")):
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

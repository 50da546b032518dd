"""Every method by name, and its hyper-parameters."""

import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..data import ASSETS
from ..errors import unknown
from ..schema import conform


@dataclass(frozen=True)
class Method:
    """What a method is made of.

    `trains`: nothing, a soft "prompt", "lora" weights, the "context" (CPT), its "cache" (CT-KV), or "iapt" generators.
    """

    title: str
    trains: str | None
    context: bool
    instruction: bool = False


METHODS = {
    "zero": Method("zero-shot", None, False),
    "icl": Method("ICL", None, True),
    "pt": Method("PT", "prompt", False),
    "ipt": Method("IPT", "prompt", True),
    "lora": Method("LoRA", "lora", False),
    "cpt": Method("CPT", "context", True),
    "pt_instr": Method("PT†", "prompt", False, True),
    "ipt_instr": Method("IPT†", "prompt", True, True),
    "cpt_instr": Method("CPT†", "context", True, True),
    "iapt": Method("IAPT", "iapt", False),
    # Context Tuning (arXiv 2507.04221)
    "ct_prompt": Method("CT-Prompt", "context", True),
    "ct_kv": Method("CT-KV", "cache", True),
    # CPT again, with other values in hyperparameters.json
    "cpt_paper_eps": Method("CPT (paper's ε)", "context", True),
    "cpt_train_label": Method("CPT (training label only)", "context", True),
}


@lru_cache
def hyperparameter_file() -> dict:
    """The chosen values and how they were chosen: "micro" (tuned) and "hub" (the paper's where known)."""
    return json.loads((ASSETS / "hyperparameters.json").read_text(encoding="utf-8"))


def hyperparameters(method: str, model: str = "micro", changes: dict | None = None) -> dict:
    """Values of a method for the micro model, or for any other model; empty for methods that train nothing.

    `changes` replace chosen values; a name that no method knows, or a value that it cannot have, raises `MiniCPTError`.
    """
    if method not in [*METHODS]:
        raise unknown("method", method, METHODS)
    chosen = hyperparameter_file()["micro" if str(model) == "micro" else "hub"]
    if not changes:
        return dict(chosen.get(method, {}))
    if isinstance(changes, dict):
        changes = {k: v.item() if isinstance(v, np.generic) else v for k, v in changes.items()}
    conform(changes, "hyperparameters", "hyper-parameter", f"{method}: ")
    # 2.0 epochs are 2, a radius of 1 is 1.0: one value is written in one way
    groups = [values for values in chosen.values() if isinstance(values, dict)]
    kind = {name: type(value) for values in groups for name, value in values.items()}
    return chosen.get(method, {}) | {k: kind[k](v) for k, v in changes.items()}

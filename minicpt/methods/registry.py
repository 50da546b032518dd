"""Every method by name, and its hyper-parameters."""

import json
from dataclasses import dataclass
from functools import lru_cache

from ..data import ASSETS
from ..errors import unknown


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

    `changes` replace chosen values; a name that no method knows raises `MiniCPTError`.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    chosen = hyperparameter_file()["micro" if model == "micro" else "hub"]
    known = {name for values in chosen.values() if isinstance(values, dict) for name in values}
    for name in changes or {}:
        if name not in known:
            raise unknown("hyper-parameter", name, sorted(known))
    return {**chosen.get(method, {}), **(changes or {})}

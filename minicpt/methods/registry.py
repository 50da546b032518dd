"""Every method by name, and its hyper-parameters."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..data import ASSETS
from ..errors import MiniCPTError, unknown, warn
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

# the hyper-parameters that a kind of training reads, by `Method.trains`
STEPS = "lr epochs batch_size "
READS = {
    None: "",
    "prompt": STEPS + "tokens init epsilon epsilon_unit",
    "lora": STEPS + "rank alpha",
    "context": STEPS
    + "epsilon epsilon_format epsilon_unit decay context_weight roles projection context_labels "
    "leave_one_out token_dropout",
    "cache": STEPS + "leave_one_out token_dropout",
    "iapt": STEPS + "tokens bottleneck activation_lr",
}


class Values(dict):
    """Hyper-parameters; one that is needed and not there is an error in words."""

    def __missing__(self, name):
        raise MiniCPTError(
            f"The hyper-parameter {name!r} is missing: another one that you gave needs it. Give both."
        )


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
        return Values(chosen.get(method, {}))
    if isinstance(changes, dict):
        changes = {k: v.item() if isinstance(v, np.generic) else v for k, v in changes.items()}
    conform(changes, "hyperparameters", "hyper-parameter", f"{method}: ")
    # 2.0 epochs are 2, a radius of 1 is 1.0: one value is written in one way
    groups = [values for values in chosen.values() if isinstance(values, dict)]
    kind = {name: type(value) for values in groups for name, value in values.items()}
    return Values(chosen.get(method, {}) | {k: kind[k](v) for k, v in changes.items()})


def warn_of_unread(method: str, changes: Iterable[str]) -> None:
    """Warn of hyper-parameters that the method knows nothing of: their values change nothing."""
    spec = METHODS[method]
    read = READS[spec.trains].split()
    if spec.instruction and spec.trains == "prompt":
        read = [name for name in read if name not in ("tokens", "init")]  # the instruction decides
    unread = sorted(set(changes) - set(read))
    if spec.trains and unread:
        warn(
            f"{method} does not read {', '.join(unread)}, which changes nothing. It reads {', '.join(read)}."
        )

"""PEFT's configurations with this library's additions, from keyword arguments, dictionaries and adapter folders."""

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Literal

import peft
from peft import PeftType

from ..errors import MiniCPTError


class _FromPeftType:
    """Builds this library's configs from files and dictionaries of CPT and IAPT, where PEFT would build its own."""

    @classmethod
    def from_peft_type(cls, **kwargs):
        kind = kwargs.get("peft_type")
        if kind not in OWN:
            return super().from_peft_type(**kwargs)
        known = {f.name for f in dataclasses.fields(OWN[kind])}
        if unknown := sorted(set(kwargs) - known):
            warnings.warn(
                f"The {kind} configuration holds fields that minicpt does not know and ignores: {unknown}."
            )
        return OWN[kind](**{k: v for k, v in kwargs.items() if k in known})


@dataclass
class CPTConfig(_FromPeftType, peft.CPTConfig):
    """PEFT's `CPTConfig` with three more fields, whose defaults leave its numbers as they are.

    - `opt_loss_reduction`: `"mean"` over label tokens (PEFT) or `"sum"` over labels (paper 3.2.1)
    - `opt_epsilon_unit`: epsilon counts sqrt(D/2048) (`"peft"`) or mean token-embedding norms (`"mean_norm"`)
    - `opt_context_loss_weight`: factor on the context labels' loss; 0 trains on the training label alone

    Raises `ValueError` for a task type other than CAUSAL_LM and for lists of unequal length, as PEFT does.
    """

    opt_loss_reduction: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "mean (PEFT) or sum (paper)"}
    )
    opt_epsilon_unit: Literal["peft", "mean_norm"] = field(
        default="peft", metadata={"help": "unit of epsilon"}
    )
    opt_context_loss_weight: float = field(
        default=1.0, metadata={"help": "factor on the context labels' loss"}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, valid in [
            ("opt_weighted_loss_type", ("none", "decay")),
            ("opt_loss_reduction", ("mean", "sum")),
            ("opt_epsilon_unit", ("peft", "mean_norm")),
        ]:
            if getattr(self, name) not in valid:
                raise MiniCPTError(f"{name} must be one of {valid}, got {getattr(self, name)!r}.")
        for name in ("opt_projection_epsilon", "opt_projection_format_epsilon"):
            if not getattr(self, name) >= 0:
                raise MiniCPTError(
                    f"{name} is a radius and must be >= 0, got {getattr(self, name)!r}."
                )


@dataclass
class IAPTConfig(_FromPeftType, peft.PromptLearningConfig):
    """Generators of instruction-aware soft tokens, `num_virtual_tokens` (S) at every layer; see `iapt.py`.

    - `bottleneck`: width m between the two projections; `share_projections`: one pair of them for all layers
    - `leading`: tokens at the start of the text (a BOS) that stay in front of the soft tokens and are not read
    - `token_dim`, `num_layers`: leave them out, they are read from the model

    PEFT has no such method: a saved folder is in PEFT's format, but only this library knows its `peft_type`.
    """

    num_virtual_tokens: int = field(default=4, metadata={"help": "soft tokens a layer (S)"})
    bottleneck: int = field(default=320, metadata={"help": "width between the projections (m)"})
    share_projections: bool = field(
        default=False, metadata={"help": "one pair of projections for all layers"}
    )
    leading: int = field(default=0, metadata={"help": "tokens in front of the soft tokens (BOS)"})

    def __post_init__(self):
        self.peft_type, self.task_type = "IAPT", self.task_type or peft.TaskType.CAUSAL_LM
        super().__post_init__()
        if self.task_type != peft.TaskType.CAUSAL_LM:
            raise MiniCPTError(f"IAPT works with task_type CAUSAL_LM only, got {self.task_type!r}.")
        for name, least in (("num_virtual_tokens", 1), ("bottleneck", 1), ("leading", 0)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least):
                raise MiniCPTError(f"{name} must be a whole number from {least}, got {value!r}.")


OWN = {PeftType.CPT: CPTConfig, "IAPT": IAPTConfig}


class StandsForPeft(type):
    """`isinstance(x, minicpt.PeftModel)` holds for PEFT's own objects too, as the swapped import line expects."""

    def __instancecheck__(cls, instance):
        return isinstance(instance, vars(cls).get("_stands_for", ())) or super().__instancecheck__(
            instance
        )


class PeftConfig(_FromPeftType, peft.PeftConfig, metaclass=StandsForPeft):
    """PEFT's `PeftConfig`; `from_pretrained` gives CPT and IAPT folders this library's configs."""

    _stands_for = peft.PeftConfig


def get_peft_config(config_dict: dict):
    """Build a config from a dictionary with `peft_type`. Source: PEFT `get_peft_config`."""
    own = OWN.get(config_dict["peft_type"])
    return own(**config_dict) if own else peft.get_peft_config(config_dict)

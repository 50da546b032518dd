"""PEFT's configurations with this library's additions, from keyword arguments, dictionaries and adapter folders."""

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Literal

import peft
from peft import PeftType

from .errors import MiniCPTError


@dataclass
class CPTConfig(peft.CPTConfig):
    """PEFT's `CPTConfig` with three more fields, whose defaults leave its numbers as they are.

    - `opt_loss_reduction`: `"mean"` over label tokens (PEFT) or `"sum"` over labels (paper 3.2.1)
    - `opt_epsilon_unit`: epsilon counts sqrt(D/2048) (`"peft"`) or mean token-embedding norms (`"mean_norm"`)
    - `opt_context_loss_weight`: factor on the context labels' loss; 0 trains on the training label alone

    Raises `ValueError` for a task type other than CAUSAL_LM and for lists of unequal length, as PEFT does.
    """

    opt_loss_reduction: Literal["mean", "sum"] = field(default="mean", metadata={"help": "mean (PEFT) or sum (paper)"})
    opt_epsilon_unit: Literal["peft", "mean_norm"] = field(default="peft", metadata={"help": "unit of epsilon"})
    opt_context_loss_weight: float = field(default=1.0, metadata={"help": "factor on the context labels' loss"})

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
                raise MiniCPTError(f"{name} is a radius and must be >= 0, got {getattr(self, name)!r}.")

    @classmethod
    def from_peft_type(cls, **kwargs):
        """Build the config of a file or dictionary: this class for CPT, where PEFT would build its own."""
        if kwargs.get("peft_type") != PeftType.CPT:
            return super().from_peft_type(**kwargs)
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(kwargs) - known):
            warnings.warn(f"The CPT configuration holds fields that minicpt does not know and ignores: {unknown}.")
        return cls(**{k: v for k, v in kwargs.items() if k in known})


class StandsForPeft(type):
    """`isinstance(x, minicpt.PeftModel)` holds for PEFT's own objects too, as the swapped import line expects."""

    def __instancecheck__(cls, instance):
        return isinstance(instance, vars(cls).get("_stands_for", ())) or super().__instancecheck__(instance)


class PeftConfig(peft.PeftConfig, metaclass=StandsForPeft):
    """PEFT's `PeftConfig`; `from_pretrained` gives CPT folders this library's `CPTConfig`."""

    _stands_for = peft.PeftConfig

    @classmethod
    def from_peft_type(cls, **kwargs):
        is_cpt = kwargs.get("peft_type") == PeftType.CPT
        return CPTConfig.from_peft_type(**kwargs) if is_cpt else super().from_peft_type(**kwargs)


def get_peft_config(config_dict: dict):
    """Build a config from a dictionary with `peft_type`. Source: PEFT `get_peft_config`."""
    is_cpt = config_dict["peft_type"] == PeftType.CPT
    return CPTConfig(**config_dict) if is_cpt else peft.get_peft_config(config_dict)

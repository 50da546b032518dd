"""A fitted method in one file: a `Predictor` as JSON values and tensors, and back; the base model stays outside."""

import json
from pathlib import Path

import numpy as np
import peft
import safetensors.torch
import torch
from torch import Tensor

from ..core.templates import Context, Template
from ..dropin.configs import IAPTConfig
from ..dropin.iapt import IAPTModel
from ..dropin.saving import read_state, replacing
from ..engine.base_models import BaseModel
from ..engine.modules import sharing_weights
from ..engine.prefix import Prefix
from ..errors import MiniCPTError
from .context_tuning import cache_from_tensors, cache_to_tensors
from .fit import ONE_AT_A_TIME, Predictor
from .prepare import Prompt

FILE, FORMAT = "classifier.safetensors", "FewShotClassifier 3"


def take_apart(predictor: Predictor) -> tuple[dict, dict[str, Tensor]]:
    """JSON values and tensors (on the CPU) that make the predictor again, given its base model and template."""
    model, prefix, prompt = predictor.model, predictor.prefix, predictor.prompt
    lora, iapt, tensors = None, None, {}
    if isinstance(model, peft.PeftModel):
        config, tensors = model.peft_config["default"], peft.get_peft_model_state_dict(model)
        lora = {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": sorted(config.target_modules),
        }
    elif isinstance(model, IAPTModel):
        config, tensors = model.peft_config["default"], model.trained()
        iapt = {
            "num_virtual_tokens": config.num_virtual_tokens,
            "bottleneck": config.bottleneck,
            "leading": config.leading,
        }
    elif isinstance(prefix, Prefix):
        tensors = cache_to_tensors(prefix)
    elif prefix is not None:
        tensors = {"prefix": prefix}
    state = {
        "lora": lora,
        "iapt": iapt,
        "prompt": {
            "limit": prompt.limit,
            "candidates": prompt.candidates,
            "first": list(prompt.first),
            "context": {"text": prompt.context.text, "end": prompt.context.end},
            "before": prompt.before,
            "longest_text": prompt.longest_text,
            "text_tokens": prompt.text_tokens,
        },
        "classes": predictor.classes,
        "label_score": predictor.label_score,
        "history": predictor.history,
    }
    return state, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def put_together(
    state: dict, tensors: dict[str, Tensor], base: BaseModel, template: Template
) -> Predictor:
    """Build the predictor that `take_apart` took apart."""
    model, prefix = base.model, None
    with (
        ONE_AT_A_TIME,
        torch.random.fork_rng(),
    ):  # a new adapter draws random weights before it is given its own
        if state["lora"]:
            config = peft.LoraConfig(task_type="CAUSAL_LM", **state["lora"])
            model = peft.get_peft_model(sharing_weights(model), config).eval()
            peft.set_peft_model_state_dict(model, tensors)
        elif state["iapt"]:
            model = IAPTModel(model, IAPTConfig(**state["iapt"])).load_weights(tensors).eval()
        elif "prefix" in tensors:
            prefix = tensors["prefix"].to(base.device)
        elif tensors:
            prefix = cache_from_tensors(tensors, base.device)
    return Predictor(
        model,
        prefix,
        Prompt(
            base.tokenizer,
            template,
            state["classes"],
            **{**state["prompt"], "context": Context(**state["prompt"]["context"])},
        ),
        state["classes"],
        state["label_score"],
        state["history"],
    )


def write(folder: str | Path, state: dict, tensors: dict[str, Tensor]) -> None:
    """Write tensors, and JSON in their header, to one file; an interrupted write leaves an older file whole."""
    header = {"minicpt": json.dumps({"format": FORMAT, **state}, default=_plain)}
    with replacing(folder) as new:
        safetensors.torch.save_file(tensors, new / FILE, header)


def read(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Read what `write` wrote; a damaged or foreign file raises `MiniCPTError`."""
    path = Path(folder, FILE)
    try:
        tensors, metadata = read_state(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise MiniCPTError(f"Cannot read {path}: {error}. Save the classifier again.") from error
    state = json.loads(metadata.get("minicpt", "{}"))
    if state.get("format") != FORMAT:
        raise MiniCPTError(
            f"{path} was not written by FewShotClassifier.save, or by another version of it. Fit and save it again."
        )
    return state, tensors


def _plain(value) -> int | float | bool | str:
    """What JSON shall hold for a value that it does not know."""
    if isinstance(value, np.generic):
        return value.item()
    raise MiniCPTError(
        f"{value!r} cannot be saved; labels and parameters may be text, numbers, bools, tuples of them."
    )

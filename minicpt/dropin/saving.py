"""Files of an adapter: written whole or not at all, read with clear errors, and one more that keeps a run exactly.

PEFT's own files (`adapter_config.json`, `adapter_model.safetensors`) hold embedding + delta, enough for inference.
`minicpt_state.safetensors`, which PEFT does not look at, adds what resuming needs: a context's centre and delta as they
are, and on request the state of optimiser, scheduler and random generators. Tensors and JSON only, no pickle.
"""

import contextlib
import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..core.embeddings import CPTEmbedding
from ..errors import MiniCPTError

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
STATE = "minicpt_state.safetensors"


def readable(where, read: Callable, *args, **kwargs):
    """Call `read`; what a damaged or foreign file makes it raise becomes a `MiniCPTError` that names the file."""
    try:
        return read(*args, **kwargs)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        EOFError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        KeyError,
        TypeError,
    ) as error:
        raise MiniCPTError(
            f"{str(where)!r} cannot be read: {type(error).__name__}: {error}. The file is damaged or no PEFT adapter; "
            "save it again, or copy it again from where it came."
        ) from error


# ---- writing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(directory) -> Iterator[Path]:
    """Give a temporary folder to write an adapter into; afterwards its files replace those of `directory`.

    If anything is raised on the way, the old files stay, or come back: an interrupted save damages nothing.
    """
    target = Path(directory)
    if target.is_file():
        raise MiniCPTError(f"{str(target)!r} is a file; give a folder to save into.")
    target.mkdir(parents=True, exist_ok=True)
    # inside the target: one file system, so that replacing is atomic, and a place we may surely write to
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        if (target / "README.md").is_file():  # PEFT adds to a model card that is there
            shutil.copy2(target / "README.md", new)
        yield new
        files = [f.relative_to(new) for f in new.rglob("*") if f.is_file()]
        # an older save's weights of the other format, or state, would be read in place of the new ones
        gone = [f.with_name(name) for f in files if f.name == CONFIG for name in (*WEIGHTS, STATE)]
        gone = [f for f in gone if f not in files]
        for file in files + gone:
            if (target / file).is_file():
                (old / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(target / file, old / file)
        try:
            for file in files:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(new / file, target / file)
            for file in gone:
                (target / file).unlink(missing_ok=True)
        except BaseException:
            for file in files + gone:
                if (old / file).is_file():
                    os.replace(old / file, target / file)
                else:
                    (target / file).unlink(missing_ok=True)
            raise


def write_state(folder: Path, encoder, training_state: dict | None) -> None:
    """Write the state file: a context's centre and delta, and the state of `training_state`'s objects by name."""
    tensors, metadata = {}, {}
    if isinstance(encoder, CPTEmbedding) and not encoder.config.inference_mode:
        tensors |= {"embedding": encoder.embedding.weight, "delta": encoder.delta_embedding.weight}
    if training_state is not None:
        # generators are the one kind without state_dict
        parts = {
            k: v.state_dict() if hasattr(v, "state_dict") else v.get_state()
            for k, v in training_state.items()
        }
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        state = {"parts": parts, "torch": torch.get_rng_state(), "cuda": cuda}
        metadata["training"] = json.dumps(_pack(state, tensors))
    if tensors:
        tensors = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
        safetensors.torch.save_file(tensors, folder / STATE, metadata)


def _pack(value, tensors: dict[str, Tensor]):
    """Turn nested state into JSON that names its tensors, which are added to `tensors`; tuples become lists."""
    if isinstance(value, Tensor):
        name = f"training.{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs: an optimiser's keys are integers, JSON's are strings
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise MiniCPTError(
        f"training_state holds a {type(value).__name__}; give tensors, numbers, text, lists, dicts."
    )


def _unpack(packed: dict, tensors: dict[str, Tensor]):
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in value}
    return [_unpack(item, tensors) for item in value] if kind == "list" else value


# ---- reading -------------------------------------------------------------------------------------------------------


def require_weights(folder: Path) -> None:
    """Raise `MiniCPTError` if a local folder holds no adapter weights (PEFT would look for it on the hub)."""
    if folder.is_dir() and not any((folder / name).is_file() for name in WEIGHTS):
        raise MiniCPTError(
            f"{str(folder)!r} holds no {' or '.join(WEIGHTS)}; save the adapter there first."
        )


def read_weights(folder) -> dict[str, Tensor]:
    """Read a local folder's safetensors weights by name. Raises `MiniCPTError` if there are none, or damaged ones."""
    path = Path(folder, WEIGHTS[0])
    if not path.is_file():
        raise MiniCPTError(
            f"{str(path)!r} does not exist; give the folder that save_pretrained wrote."
        )
    return readable(path, safetensors.torch.load_file, path)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors by name, and what its header says besides."""
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


@torch.no_grad()
def restore_exactly(folder: Path, encoder) -> None:
    """Replace a context's rebuilt centre and delta by those of the state file, if it belongs to these weights."""
    if not isinstance(encoder, CPTEmbedding) or not (folder / STATE).is_file():
        return
    tensors, _ = readable(folder / STATE, read_state, folder / STATE)
    exact = [tensors.get("embedding"), tensors.get("delta")]
    weights = [encoder.embedding.weight, encoder.delta_embedding.weight]
    if all(t is not None and t.shape == w.shape for t, w in zip(exact, weights)):
        rebuilt, before = [w.clone() for w in weights], weights[0] + encoder.get_projection()
        for weight, value in zip(weights, exact):
            weight.copy_(value)
        rounding = 8 * torch.finfo(exact[1].dtype).eps * before.abs().max()
        if (weights[0] + encoder.get_projection() - before).abs().max() <= rounding:
            return
        for weight, value in zip(weights, rebuilt):
            weight.copy_(value)
    warnings.warn(
        f"{str(folder / STATE)!r} belongs to another save than the weights beside it and is ignored."
    )


def load_training_state(folder, **parts) -> None:
    """Give optimiser, scheduler, generator ... the state that `save_pretrained(training_state=...)` kept for them.

    The names are those given when saving; torch's own random state comes back too. Load the adapter first, trainable.
    A run resumed on the CPU then ends bit-equal to one that was never stopped. Raises `MiniCPTError` for a damaged
    file, one without training state, and other names.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise MiniCPTError(
            f"{str(path)!r} does not exist; save with save_pretrained(folder, training_state=...)."
        )
    tensors, metadata = readable(path, read_state, path)
    if "training" not in metadata:
        raise MiniCPTError(
            f"{str(path)!r} keeps no training state; save with save_pretrained(training_state=...)."
        )
    state = _unpack(json.loads(metadata["training"]), tensors)
    saved = state["parts"]
    if set(parts) != set(saved):
        raise MiniCPTError(
            f"{str(path)!r} keeps the state of {sorted(saved)}; asked for {sorted(parts)}."
        )
    for name, part in parts.items():
        take_over = part.load_state_dict if hasattr(part, "load_state_dict") else part.set_state
        take_over(saved[name])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

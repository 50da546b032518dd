"""Memory: what a step needs, what the device has left, and how many rows may run at once.

The estimates are sums of tensors that nobody can avoid, on the safe side: measured peaks on the CPU were 0.5 to 0.9
of them (tests/test_memory.py). They choose the number of rows at once before the first step; a batch cut into
micro-batches gives the same numbers.
"""

from contextlib import suppress
from pathlib import Path

import torch

from ..errors import MiniCPTError

ROWS = 64  # queries scored at once where memory allows; beyond this it does not get faster


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device; on the CPU the smaller of free RAM and the container's rest."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    import psutil

    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        rest = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        return min(free, rest)
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free


def weight_bytes(model) -> int:
    """Size of the weights, shared ones counted once; those of a model on the meta device count as well."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _per_layer(model, tokens: int, attended: int) -> int:
    """Bytes of one layer's activations for `tokens`, each attending to `attended`, half of them kept in float32."""
    config, size = model.config.get_text_config(), model.dtype.itemsize + 4
    inner = (
        getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * config.hidden_size
    )
    # SDPA never holds the matrix of attention weights, the eager implementation does
    matrix = config.num_attention_heads * attended if config._attn_implementation == "eager" else 0
    return tokens * size * (6 * config.hidden_size + 3 * inner + matrix)


def cache_bytes(model, tokens: int) -> int:
    """Size of the key-value cache of so many tokens."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * tokens * heads * head * model.dtype.itemsize


def training_bytes(
    model, rows: int, prefix: int, query: int, shared: bool = True, logits: int | None = None
) -> int:
    """A step on `rows` sequences of prefix + query tokens: activations of all layers, logits and their gradient.

    A shared prefix counts once, but each row holds its keys and values. `logits`: the tokens of a row at which the loss
    asks for them. LoRA and IAPT ask at every query token, as by default; the other methods at the row's label, and CPT
    at the context's labels too.
    """
    config, length = model.config.get_text_config(), prefix + query
    tokens, copies = rows * length, 0
    if shared and prefix:
        tokens, copies = prefix + rows * query, rows * length
    layers = config.num_hidden_layers * _per_layer(model, tokens, length)
    at_head = rows * (query if logits is None else logits)
    return layers + cache_bytes(model, copies) + 3 * at_head * config.vocab_size * 4


def scoring_bytes(model, rows: int, prefix: int, query: int) -> int:
    """Scoring `rows` queries after a shared prefix: the cache twice (a copy grows), one layer, 8 log-softmaxes."""
    config = model.config.get_text_config()
    layer = max(_per_layer(model, rows * query, prefix + query), _per_layer(model, prefix, prefix))
    logits = rows * 8 * config.vocab_size * (model.dtype.itemsize + 8)
    return 2 * cache_bytes(model, rows * (prefix + query)) + layer + logits


def rows_that_fit(
    model,
    device,
    prefix: int,
    query: int,
    batch: int,
    most: int = ROWS,
    shared: bool = True,
    logits: int | None = None,
) -> int:
    """Largest power of two, at most `most`, of rows that can be trained on (if `batch` > 0) and scored at once.

    The step is that of `training_bytes`. Raises `MiniCPTError` where not even one row fits, with what it needs, for
    how many logits, and what there is.
    """
    free, rows = free_memory(device), most

    def needed(rows: int) -> int:
        score = scoring_bytes(model, rows, prefix, query)
        if not batch:
            return score
        step = training_bytes(model, min(rows, batch), prefix, query, shared, logits)
        return max(step, score)

    while rows > 1 and needed(rows) > free:
        rows //= 2
    if needed(rows) > free:
        step = f", and a step takes the logits of {logits or query} of them" if batch else ""
        raise MiniCPTError(
            f"One row of {prefix} + {query} tokens needs about {gib(needed(1))} beside the weights{step}; {device} has "
            f"{gib(free)} left. Use fewer shots, --max-length, --dtype bfloat16, or a smaller model."
        )
    return rows


def check_weights(model, name: str, device: torch.device) -> None:
    """Refuse a model (on the meta device) whose weights do not fit; say which dtype would."""
    need, free = weight_bytes(model), free_memory(device)
    if need <= free:
        return
    half = need * 2 // model.dtype.itemsize
    remedy = (
        f"--dtype bfloat16 ({gib(half)})" if half <= free else "--device auto (spread over devices)"
    )
    raise MiniCPTError(
        f"{name!r} needs {gib(need)} for its weights in {str(model.dtype).removeprefix('torch.')}, {device} has "
        f"{gib(free)} left. Use {remedy}, or a smaller model: `python -m minicpt models`."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a failed allocation, on any device, from other errors."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in str(error) for sign in ("can't allocate memory", "MPS backend out of memory")
    )


def reset_peak(device: torch.device) -> None:
    """Start to measure the peak anew (on Linux and CUDA; elsewhere the peak is that of the process so far)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (refs := Path("/proc/self/clear_refs")).exists():
        with suppress(OSError):  # a container may forbid it
            refs.write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Largest allocation on the GPU, or resident size of this process, since `reset_peak`; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():
        return next(
            int(s.split()[1]) * 2**10
            for s in status.read_text().splitlines()
            if s.startswith("VmHWM")
        )
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def gib(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB"

"""Worker processes: how they begin, and how they end with the run that started them, however it ends."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

import torch

from ..errors import MiniCPTError

# what ends a run: Ctrl-C, a scheduler or container, a closed terminal (Windows has no SIGHUP)
ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
storing = threading.Lock()  # held while a result is written: a worker does not end in between


def interrupt_at_signals() -> None:
    """Let each signal that ends a run raise `KeyboardInterrupt(number)`, as Ctrl-C does; ignored ones stay so."""
    for number in ENDING:
        # not where it is ignored, as SIGHUP is under nohup
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt(number)


def check_gpus(gpus: tuple[str, ...]) -> None:
    """Raise `MiniCPTError` unless these GPUs are there: a worker that sees none would compute on the CPU unsaid."""
    visible, n = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    known = visible.split(",") if visible else list(map(str, range(n)))
    # a GPU may also be named by its UUID, "GPU-..."
    strange = [gpu for gpu in gpus if gpu.isdigit() and gpu not in known]
    if n and not strange:
        return
    found = f"PyTorch {torch.__version__} sees no CUDA GPU here"
    if n:
        found = f"GPU {', '.join(strange)} is not there; valid: {', '.join(known)}"
    raise MiniCPTError(
        f"--gpus {','.join(gpus)}: {found}. Leave --gpus out to use the device at hand, or give --workers."
    )


def start_worker(leash: Connection, gpus) -> None:
    """The first thing a worker does: take one of the GPUs from the queue, if there are any, and one thread."""
    threading.Thread(target=_end_with, args=(leash,), daemon=True).start()
    if gpus is not None:  # before the first use of CUDA in this process
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    # the workers are the parallelism; on 2 cores this is 4-5 times faster than sharing threads
    torch.set_num_threads(1)


def _end_with(leash: Connection) -> None:
    """Wait until the other end is closed, by the run or by its death; then end this worker, between two writes."""
    with suppress(EOFError, OSError):
        leash.recv()
    with storing:
        os._exit(1)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold the signals that end a run; a process started meanwhile never sees them: its leash ends it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

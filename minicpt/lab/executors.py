"""Executors: who computes the cells that a store lacks: this process, several, one per GPU, or a SLURM array.

None of them keeps results or a queue of its own: the store is the source of truth. Kill whatever you like, at any
moment; it costs the cells that were being computed, and the same command goes on from there. Worker processes end
with the run that started them, however it ends.
"""

import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import mean

from tqdm import tqdm

from ..errors import MiniCPTError
from . import cells
from .cells import Cell
from .store import Store
from .workers import check_gpus, signals_held, start_worker, storing

Outcome = tuple[Cell, str | None]  # a cell that was attempted, and the message of its failure
POLL_SECONDS = 5.0


def missing_cells(cells: list[Cell], store: Store) -> list[Cell]:
    """The cells that the store lacks, grouped by model: who takes them in this order loads no model twice."""
    models = list(dict.fromkeys((cell.model, cell.dtype) for cell in cells))
    missing = [cell for cell in cells if store.get(cell) is None]
    return sorted(missing, key=lambda cell: models.index((cell.model, cell.dtype)))


def attempt(cell: Cell, store: Store) -> str | None:
    """Compute and store a cell; a failure is stored too and its message returned. A full disk raises `OSError`."""
    if store.get(cell) is not None:  # another run on the same store was faster
        return None
    try:
        result = cells.run_cell(cell)
    except Exception as error:  # one cell's failure must not stop the others
        with storing:
            store.put_error(cell, error)
        return f"{cell}: {type(error).__name__}: {error}"
    with storing:
        store.put(cell, result)
    return None


def run_grid(
    cells: list[Cell],
    store: Store,
    workers: int = 1,
    gpus: tuple[str, ...] = (),
    slurm: dict | None = None,
) -> list[str]:
    """Compute the cells that the store lacks, with progress; return the messages of those that failed.

    `workers` 1 runs in this process, more start that many with one thread each; `gpus` ("0", "1", ...) starts one a
    GPU, which sees no other; `slurm` (parameters for submitit) submits an array of `workers` jobs and waits for it.
    Interrupt at will: what is done stays done, running cells are given up at once, and the next run goes on from there.
    Two runs on one store may compute a cell twice, but damage none. Raises `MiniCPTError` if a worker process is killed
    and, before the first cell, for GPUs that are not there; `OSError` there if the store takes no files.
    """
    if gpus:
        check_gpus(gpus)
    missing = missing_cells(cells, store)
    if missing:
        store.check_room()
    if slurm is not None:
        outcomes = in_slurm(missing, store, workers, slurm)
    elif gpus or workers > 1:
        outcomes = in_processes(missing, store, workers, gpus)
    else:
        outcomes = ((cell, attempt(cell, store)) for cell in missing)
    failures = []
    waiting = [*missing, "all cells attempted"]
    # None: hidden where no terminal is; a notebook is none, but somebody reads it
    hidden = {} if missing and "ipykernel" in sys.modules else {"disable": not missing or None}
    bar = tqdm(total=len(missing), unit="cell", dynamic_ncols=True, **hidden)
    with closing(outcomes), bar:  # closed here and now: this ends the workers
        bar.set_description(str(waiting[0]))
        for cell, failure in outcomes:
            waiting.remove(cell)
            # cells start in this order: the first that waits is the one being computed, the longest of several
            bar.set_description(str(waiting[0]))
            bar.update()
            if failure:
                failures.append(failure)
    return failures


# ---- processes ------------------------------------------------------------------------------------------------------


def in_processes(
    missing: list[Cell], store: Store, workers: int, gpus: tuple[str, ...] = ()
) -> Iterator[Outcome]:
    """Attempt the cells in processes of one thread, one a GPU if there are any; yield them as they are done.

    Whatever ends this generator ends its processes, within a moment and without a half-written file.
    """
    context = get_context("spawn")
    leash, hand = context.Pipe(duplex=False)
    with signals_held():
        devices = context.SimpleQueue() if gpus else None
        for gpu in gpus:
            devices.put(gpu)
        begin = start_worker, (leash, devices)
        pool = ProcessPoolExecutor(len(gpus) or workers, context, *begin)
    with pool, hand:  # left in reverse: the hand lets go, the workers end, the pool sees it
        with signals_held():
            running = {pool.submit(attempt, cell, store): cell for cell in missing}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BrokenProcessPool as error:
            raise MiniCPTError(
                "A worker process died: it was killed, or memory ran out. Finished cells are kept; run the same "
                "command again, with one worker if memory is short."
            ) from error


# ---- SLURM ----------------------------------------------------------------------------------------------------------


@dataclass
class Shard:
    """What one job of the array does: its cells, one after the other, without those that the store has by then."""

    cells: list[Cell]
    folder: str

    def __call__(self) -> None:
        for cell in self.cells:
            attempt(cell, Store(self.folder))

    def checkpoint(self):
        """What submitit requeues when the job is preempted or reaches its time limit: the same; done cells are done."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def in_slurm(missing: list[Cell], store: Store, jobs: int, parameters: dict) -> Iterator[Outcome]:
    """Submit the cells as an array of `jobs` jobs through submitit and yield them as they are done.

    `parameters` go to submitit (`timeout_min`, `gpus_per_node`, `slurm_partition`, ...). Logs and submitit's own files
    lie in `<store>/slurm`. Ctrl-C ends the waiting, not the jobs. Raises `MiniCPTError` without submitit or SLURM.
    """
    try:
        from submitit import AutoExecutor, SlurmExecutor
    except ImportError as error:
        raise MiniCPTError(
            "SLURM needs submitit: `pip install 'minicpt[slurm]'`, or leave --executor out."
        ) from error
    if SlurmExecutor.affinity() < 0:
        raise MiniCPTError(
            "There is no SLURM here (no `srun`). Run this on a login node, or leave --executor out."
        )
    if not missing:
        return
    size = -(-len(missing) // jobs)  # neighbours share a model, so a job loads few
    folder = str(store.folder.resolve())
    shards = [Shard(missing[i : i + size], folder) for i in range(0, len(missing), size)]
    executor = AutoExecutor(folder=store.folder / "slurm", cluster="slurm")
    executor.update_parameters(name="minicpt", slurm_array_parallelism=jobs, **parameters)
    with executor.batch():
        submitted = [executor.submit(shard) for shard in shards]
    array = submitted[0].job_id.split("_")[0]
    print(
        f"SLURM array {array}: {len(shards)} jobs. Ctrl-C ends the waiting, not the jobs (that is `scancel {array}`)."
    )
    waiting, queued = list(missing), True
    while waiting and queued:
        time.sleep(POLL_SECONDS)
        queued = _is_queued(array)  # before looking into the store: what is done by then is seen
        for cell in [cell for cell in waiting if store.get(cell)]:
            waiting.remove(cell)
            yield cell, None
    killed = f"not computed: its job was killed or ran out of time, see {store.folder}/slurm"
    for cell in waiting:
        yield cell, f"{cell}: {store.error(cell) or killed}"


def _is_queued(array: str) -> bool:
    command = ["squeue", "--noheader", "--jobs", array]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:  # a finished array is forgotten after a while; a busy controller is silent
        return "Invalid job id" not in asked.stderr
    return bool(asked.stdout.strip())


# ---- before a run ---------------------------------------------------------------------------------------------------


def plan(cells: list[Cell], store: Store, at_once: int = 1) -> str:
    """What a run would do: cells, what is done, and the time of the rest, estimated from finished cells of a model."""
    counts, done, missing, seconds = Counter(), Counter(), [], defaultdict(list)
    for cell in cells:
        row = f"{cell.model:24} {cell.dataset:10} {cell.method:16}"
        counts[row] += 1
        result = store.get(cell)
        if result is None:
            missing.append(cell)
            continue
        done[row] += 1
        for like in _alike(cell):
            seconds[like].append(sum(result["seconds"].values()))
    guesses = []
    for cell in missing:
        known = [like for like in _alike(cell) if like in seconds]
        guesses += [mean(seconds[like]) for like in known[:1]]
    lines = [f"{'model':24} {'dataset':10} {'method':16} {'cells':>5} {'done':>5}"]
    lines += [f"{row} {n:5} {done[row]:5}" for row, n in counts.items()]
    lines += [f"{len(cells)} cells, {done.total()} done, {len(missing)} to compute."]
    if guesses:
        minutes = sum(guesses) / at_once / 60
        lines += [f"About {minutes:.1f} min for {len(guesses)} of them, {at_once} at once."]
    unknown = len(missing) - len(guesses)
    if unknown:
        lines += [f"No estimate for {unknown}: no finished cell of that model yet."]
    return "\n".join(lines)


def _alike(cell: Cell) -> list[tuple]:
    """From the most to the least like it: keys of finished cells whose time says something about this one."""
    model, method, shots = cell.model, cell.method, cell.shots
    return [(model, method, shots, cell.dataset), (model, method, shots), (model, method), (model,)]

"""Execute the master notebooks in place and normalise them, so that a diff shows what changed and nothing else.

    python data_scripts/build_notebooks.py                        all of notebooks/*.ipynb
    python data_scripts/build_notebooks.py notebooks/00*.ipynb    some of them

What stays: cells with their ids and tags, outputs, execution counts. What goes: papermill's and widgets' metadata,
timings, the kernel's version, absolute paths. A notebook whose cell fails, or writes to stderr, is not written.
"""

import argparse
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT_OF_CELL = ("tags",)
PATHS = [(str(ROOT), "."), (sys.prefix, "<venv>"), (tempfile.gettempdir(), "<tmp>"), (str(Path.home()), "~")]


def without_paths(value):
    """Replace absolute paths of this machine in every string of an output."""
    if isinstance(value, dict):
        return type(value)({key: v if key == "image/png" else without_paths(v) for key, v in value.items()})
    if isinstance(value, list):
        return [without_paths(v) for v in value]
    if isinstance(value, str):
        for path, short in PATHS:
            value = re.sub(re.escape(path) + r"(?=[/\s'\"]|$)", short, value)
    return value


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Strip what differs between machines and runs; count the executed cells from 1."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    count = 0
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in KEPT_OF_CELL})
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = joined([nbformat.from_dict(without_paths(output)) for output in cell.outputs])
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    return notebook


def joined(outputs: list) -> list:
    """Join neighbouring pieces of one stream: how often the kernel flushed is chance."""
    result: list = []
    for output in outputs:
        if result and output.output_type == "stream" and result[-1].get("name") == output.name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def build(path: Path) -> str:
    """Execute one notebook, normalise and write it; return a line about it, or raise and leave the file alone."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}  # fmt: skip
    notebook, started = nbformat.read(path, as_version=4), perf_counter()
    quiet = ["--log-level=ERROR"]  # ipykernel warns about TCP on every start
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where, extra_arguments=quiet).execute()
    seconds = perf_counter() - started
    noise = [o.text for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.get("name") == "stderr"]
    if noise:
        raise RuntimeError(f"{path.name} writes to stderr, silence the cause: {noise[0][:300]}")
    nbformat.write(normalise(notebook), path)
    return f"{path.name:32} {seconds:5.1f} s {path.stat().st_size / 1024:5.0f} KB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to execute [all masters]")
    parser.add_argument("--workers", type=int, default=2, help="notebooks executed at once [2]")
    args = parser.parse_args()
    paths = args.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))
    failed = 0
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for path, done in [(path, pool.submit(build, path)) for path in paths]:
            try:
                print(done.result(), flush=True)
            except Exception as error:  # the others still get their turn
                failed += 1
                print(f"{path.name}: {str(error).strip()}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

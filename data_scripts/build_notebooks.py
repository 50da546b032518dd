"""Execute the master notebooks in place; derive exercises and solutions from them.

    python data_scripts/build_notebooks.py                       execute all masters, then derive
    python data_scripts/build_notebooks.py notebooks/00*.ipynb   execute some of them, then derive
    python data_scripts/build_notebooks.py --exercises           derive, execute nothing
    python data_scripts/build_notebooks.py --nbgrader DIR        exercises in nbgrader's layout

An exercise is three cells of a master: a markdown cell tagged `exercise`, a code cell tagged
`solution` (imports and one function with a docstring), a code cell tagged `check`. In exercises/
the function's body becomes a `NotImplementedError`.

A translation in notebooks/zh/ keeps its own text and takes its master's code and outputs.

The table of notebooks and exercises in notebooks/TEACHING.md is written along with them. If
pyproject.toml names the repository's GitHub address ([project.urls] Repository), exercises and
solutions begin with a badge that opens them in Colab.

Of an executed master there stay cells with their ids and tags, outputs, execution counts; so a diff
shows what changed and nothing else. What goes: papermill's and widgets' metadata, timings, the
kernel's version, absolute paths. A notebook whose cell fails, or writes to stderr, is not written,
nor is notebook 14 where its model is missing and it fell back on the micro model.
"""

import argparse
import ast
import os
import re
import sys
import tempfile
import tomllib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import nbformat
from nbclient import NotebookClient

from minicpt.errors import print_any_text

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT_OF_CELL = ("tags",)
MASTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRANSLATIONS = sorted((ROOT / "notebooks" / "zh").glob("*.ipynb"))
TASK = re.compile(r"### Exercise (\d\d\.\d): (.+)\n+Difficulty ([1-5]) of 5 · (\d+) minutes")
TABLE = re.compile(r"(<!-- contents: .*? -->\n).*?(<!-- /contents -->)", re.S)
ROLES = ("exercise", "solution", "check")
FALLBACK = "The real model or its sentences are missing"  # how notebook 14 begins to say so
NOTE = {
    "exercises": "**The exercises of [this notebook]({master}).** Where a cell says `raise "
    "NotImplementedError`, write your code, run it, and then the cell below it: it "
    "says in words what is wrong, or draws a picture. An exercise left out stops "
    "nothing. When you are done, or stuck: [solutions]({other}). (Generated: "
    "change the master, not this file.)",
    "solutions": "**The solutions of [this notebook]({master}).** Try the [exercises]({other}) "
    "first. (Generated: change the master, not this file.)",
}
COLAB = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{kind}/{name}) "
    "First cell there: `%pip install git+https://github.com/{repository}`"
)
PATHS = [
    (str(ROOT), "."),
    (sys.prefix, "<venv>"),
    (tempfile.gettempdir(), "<tmp>"),
    (str(Path.home()), "~"),
]


def without_paths(value):
    """Replace absolute paths of this machine in every string of an output."""
    if isinstance(value, dict):
        return type(value)(
            {key: v if key == "image/png" else without_paths(v) for key, v in value.items()}
        )
    if isinstance(value, list):
        return [without_paths(v) for v in value]
    if isinstance(value, str):
        for path, short in PATHS:
            value = re.sub(re.escape(path) + r"(?=[/\s'\"]|$)", short, value)
    return value


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Strip what differs between machines and runs; count the executed cells from 1."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    count = 0
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {k: v for k, v in cell.metadata.items() if k in KEPT_OF_CELL}
        )
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = joined(
            [nbformat.from_dict(without_paths(output)) for output in cell.outputs]
        )
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
    """Execute, normalise and write one notebook: a line about it, or an error and no change."""
    os.environ |= {
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    notebook, started = nbformat.read(path, as_version=4), perf_counter()
    quiet = ["--log-level=ERROR"]  # ipykernel warns about TCP on every start
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=where, extra_arguments=quiet
    ).execute()
    seconds = perf_counter() - started
    noise = [
        o.text
        for c in notebook.cells
        if c.cell_type == "code"
        for o in c.outputs
        if o.get("name") == "stderr"
    ]
    if noise:
        raise RuntimeError(f"{path.name} writes to stderr, silence the cause: {noise[0][:300]}")
    if FALLBACK in str([c.outputs for c in notebook.cells if c.cell_type == "code"]):
        return f"{path.name:32} kept as it was: it needs `make smollm2` and MINICPT_DATA=folder"
    nbformat.write(normalise(notebook), path)
    return f"{path.name:32} {seconds:5.1f} s {path.stat().st_size / 1024:5.0f} KB"


def exercises(master: nbformat.NotebookNode) -> list[tuple]:
    """A master's exercises as (task, solution, check) cells; ValueError if one is not these."""
    tags = [cell.metadata.get("tags", []) for cell in master.cells]
    roles = [next((role for role in ROLES if role in have), None) for have in tags]
    found = [i for i, role in enumerate(roles) if role == "exercise"]
    expected = [(i + k, role) for i in found for k, role in enumerate(ROLES)]
    if expected != [(i, role) for i, role in enumerate(roles) if role]:
        raise ValueError(
            "an exercise is three cells in a row, tagged "
            f"{', '.join(ROLES)}; found {list(filter(None, roles))}"
        )
    for i in found:
        if not TASK.match(master.cells[i].source):
            raise ValueError(
                f"cell {master.cells[i].id}: begin with '### Exercise NN.k: "
                "title', 'Difficulty n of 5 · m minutes'"
            )
    return [tuple(master.cells[i : i + 3]) for i in found]


def parts(solution: nbformat.NotebookNode) -> tuple[str, str]:
    """Cut a solution cell into what a student is given, up to the docstring's end, and the body."""
    *imports, function = ast.parse(solution.source).body
    if (
        not isinstance(function, ast.FunctionDef)
        or not ast.get_docstring(function)
        or not all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in imports)
    ):
        raise ValueError(
            f"cell {solution.id}: a solution holds imports and then one function with a docstring"
        )
    lines, end = solution.source.splitlines(), function.body[0].end_lineno
    return "\n".join(lines[:end]), "\n".join(lines[end:])


def derive(path: Path, kind: str) -> nbformat.NotebookNode | None:
    """Make a master's "exercises", "solutions" or "nbgrader" notebook; None without exercises."""
    notebook = nbformat.read(path, as_version=4)
    found = exercises(notebook)
    if not found:
        return None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # links lead from a folder further down
            cell.source = re.sub(r"\]\((?!https?:|#)", "](../", cell.source)
        tags = [tag for tag in cell.metadata.get("tags", []) if tag in ("parameters", *ROLES)]
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, []
    for task, solution, check in found:
        given, body = parts(solution)
        title = task.source.split("\n")[0].removeprefix("### ")
        if kind == "exercises":
            solution.source = f'{given}\n    raise NotImplementedError("{title}")'
            solution.metadata.tags = ["stub"]
            # "run all" goes on after an exercise left out
            check.metadata.tags = ["check", "raises-exception"]
        elif kind == "nbgrader":
            solution.source = f"{given}\n    ### BEGIN SOLUTION\n{body}\n    ### END SOLUTION"
            points = int(TASK.match(task.source)[3])
            for cell, more in (
                (solution, {"grade": False, "solution": True, "locked": False}),
                (check, {"grade": True, "solution": False, "locked": True, "points": points}),
            ):
                cell.metadata["nbgrader"] = {
                    "schema_version": 3,
                    "grade_id": cell.id,
                    "task": False,
                    **more,
                }
    if kind != "nbgrader":
        other = {"exercises": "solutions", "solutions": "exercises"}[kind]
        note = NOTE[kind].format(master=f"../{path.name}", other=f"../{other}/{path.name}")
        repository = github()
        if repository:
            note = COLAB.format(repository=repository, kind=kind, name=path.name) + "\n\n" + note
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(note, id=f"{kind}-note"))
    return notebook


def github(pyproject: Path = ROOT / "pyproject.toml") -> str | None:
    """Read the repository, "owner/name", from pyproject.toml; None if it is not set there."""
    urls = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})
    found = re.fullmatch(
        r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", urls.get("Repository", "")
    )
    return found and found[1]


def contents() -> str:
    """All masters as a table: title, minutes to read (150 words or 12 lines each), exercises."""
    rows = ["| notebook | read, min | exercises (difficulty of 5, minutes) |", "|---|---|---|"]
    for path in MASTERS:
        book = nbformat.read(path, as_version=4)
        words = sum(len(cell.source.split()) for cell in book.cells if cell.cell_type == "markdown")
        lines = sum(
            len(cell.source.splitlines()) for cell in book.cells if cell.cell_type == "code"
        )
        found = [TASK.match(task.source).groups() for task, *_ in exercises(book)]
        tasks = "<br>".join(
            f"{number} {title} ({level}, {minutes})" for number, title, level, minutes in found
        )
        title = book.cells[0].source.split("\n")[0].removeprefix("# ")
        rows.append(
            f"| [{title}]({path.name}) | {5 * round((words / 150 + lines / 12) / 5)} | {tasks} |"
        )
    return "\n".join(rows) + "\n"


def write_derived(folder: Path) -> list[Path]:
    """Write exercises/ and solutions/ into `folder`; remove what has no master any more."""
    written = []
    for kind in NOTE:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for path in MASTERS:
            notebook = derive(path, kind)
            if notebook:
                written.append(folder / kind / path.name)
                nbformat.write(notebook, written[-1])
        for left in set((folder / kind).glob("*.ipynb")) - set(written):
            left.unlink()
    return written


def translated(path: Path) -> nbformat.NotebookNode:
    """A notebook in another language as it should be: its own text, with its master's code and outputs."""
    notebook = nbformat.read(path, as_version=4)
    master = nbformat.read(ROOT / "notebooks" / path.name, as_version=4)
    kinds = [cell.cell_type for cell in notebook.cells]
    if kinds != [cell.cell_type for cell in master.cells]:
        raise ValueError(
            f"{path.relative_to(ROOT)} has other cells than its master {path.name}: add, remove or move cells there "
            "until both have the same kinds in the same order."
        )
    for i, cell in enumerate(master.cells):
        if cell.cell_type == "code":
            notebook.cells[i] = cell
    return notebook


def write_nbgrader(folder: Path) -> list[Path]:
    """Write the exercises in nbgrader's course layout, with the solutions between its markers."""
    written = []
    for path in MASTERS:
        notebook = derive(path, "nbgrader")
        if notebook:
            written.append(folder / "source" / path.stem / path.name)
            written[-1].parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, written[-1])
    return written


def main() -> int:
    print_any_text()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "notebooks", nargs="*", type=Path, help="notebooks to execute [all masters]"
    )
    parser.add_argument(
        "--exercises", action="store_true", help="derive exercises and solutions, execute nothing"
    )
    parser.add_argument(
        "--nbgrader",
        type=Path,
        metavar="DIR",
        help="write the exercises for nbgrader, nothing else",
    )
    parser.add_argument("--workers", type=int, default=2, help="notebooks executed at once [2]")
    args = parser.parse_args()
    if args.nbgrader:
        print(*write_nbgrader(args.nbgrader), sep="\n")
        return 0
    paths = [] if args.exercises else args.notebooks or MASTERS
    failed = 0
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for path, done in [(path, pool.submit(build, path)) for path in paths]:
            try:
                print(done.result(), flush=True)
            except Exception as error:  # the others still get their turn
                failed += 1
                print(f"{path.name}: {str(error).strip()}", file=sys.stderr, flush=True)
    print(f"{len(write_derived(ROOT / 'notebooks'))} notebooks in exercises/ and solutions/")
    for path in TRANSLATIONS:
        nbformat.write(translated(path), path)
    teaching = ROOT / "notebooks" / "TEACHING.md"
    text = TABLE.sub(lambda m: m[1] + contents() + m[2], teaching.read_text(encoding="utf-8"))
    teaching.write_text(text, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

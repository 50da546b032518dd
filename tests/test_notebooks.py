"""The notebooks' contract: their form, their committed outputs, and the report that the command line makes of one.

That they run, and that contract cells still print the same, is nbval's part (`make test` runs it).
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from minicpt.lab import store as store_module
from minicpt.lab.statistics import interval

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TAGS = {
    "parameters",
    "nbval-check-output",
    "nbval-skip",
    "skip-execution",
    "exercise",
    "solution",
    "check",
    "hint",
}
ABSOLUTE = re.compile(r"(?<![\w.~])/(home|root|tmp|work|Users|usr|opt|var)/")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def book(request):
    """A master notebook, validated."""
    notebook = nbformat.read(request.param, as_version=4)
    nbformat.validate(notebook)
    notebook.path = request.param
    return notebook


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def outputs(book):
    return [output for cell in code_cells(book) for output in cell.outputs]


def tagged(book, tag):
    return [cell for cell in book.cells if tag in cell.metadata.get("tags", [])]


def assigned(source):
    """Names that a cell's top-level statements assign."""
    return {
        target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }


def test_there_are_notebooks():
    numbers = [f"{n:02}" for n in range(16)]  # sixteen, and run_cell
    assert [path.stem[:2] for path in NOTEBOOKS] == [*numbers, "ru"]


def test_header_says_what_the_reader_gets(book):
    header = book.cells[0]
    assert header.cell_type == "markdown" and header.source.startswith("# ")
    for part in ("**Question.**", "**Goals.**", "**Prerequisites.**", "**Time.**"):
        assert part in header.source, part
    goals = header.source.split("**Goals.**")[1].split("**Prerequisites.**")[0]
    assert goals.count("\n- ") == 3
    assert re.search(r"\d+ s\b", header.source.split("**Time.**")[1]), (
        "give a measured time in seconds"
    )


def test_footer_says_what_to_remember_and_asks(book):
    footer = book.cells[-1].source
    assert book.cells[-1].cell_type == "markdown"
    assert footer.split("## Quiz")[0].split("## What to remember")[1].count("\n- ") == 3
    assert footer.count("<details><summary>Answer</summary>") == footer.count("</details>") == 3
    # without a blank line JupyterLab shows an answer's links, code and formulas as they are typed
    assert not re.search(r"</summary>\S[^<]*(\]\(|[`$*])", footer)
    assert "**Next:**" in footer


def test_cells_are_short_and_named(book):
    assert 20 <= len(book.cells) <= 50
    for cell in code_cells(book):
        acts = [
            line for line in cell.source.splitlines() if not line.startswith(("import ", "from "))
        ]
        assert len(acts) <= 12, cell.id
        assert max(map(len, cell.source.splitlines())) <= 120, (
            f"{cell.id}: the reader would have to scroll"
        )
        assert not re.search(r"^\s*[!%]", cell.source, re.M), (
            f"{cell.id}: no shell or magic commands"
        )
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", cell.id) for cell in book.cells), (
        "give cells readable ids"
    )
    assert len({cell.id for cell in book.cells}) == len(book.cells)


def test_code_asks_no_network(book):
    """The library loads models and tasks, and `make test` keeps it offline; nothing else asks."""
    for cell in code_cells(book):
        assert not re.search(
            r"https?://|(import|from) +(urllib|requests|httpx|socket|huggingface_hub)", cell.source
        ), cell.id


def test_tags_are_known_and_there_are_contract_cells(book):
    assert {tag for cell in book.cells for tag in cell.metadata.get("tags", [])} <= TAGS
    assert len(tagged(book, "parameters")) == 1
    assert 1 <= len(tagged(book, "nbval-check-output")) <= 4
    assert bool(tagged(book, "nbval-skip")) == bool(tagged(book, "skip-execution")), (
        "two tools, two tags"
    )


def test_every_cell_was_executed_in_order(book):
    ran = [
        cell.execution_count
        for cell in code_cells(book)
        if "nbval-skip" not in cell.metadata.get("tags", [])
    ]
    assert ran == list(range(1, len(ran) + 1))
    for cell in tagged(book, "nbval-check-output"):
        assert cell.outputs, f"{cell.id} is compared, but has no output"


def test_outputs_are_clean(book):
    assert {output.output_type for output in outputs(book)} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert not [output.text for output in outputs(book) if output.get("name") == "stderr"]
    kinds = {kind for output in outputs(book) for kind in output.get("data", {})}
    assert kinds <= {"text/plain", "text/html", "text/markdown", "image/png"}
    assert not re.search(r"it/s\]|cell/s\]|\d%\|", json.dumps(outputs(book))), (
        "a progress bar was left in an output"
    )


def test_contract_cells_print_lines_that_hold_anywhere(book):
    for cell in tagged(book, "nbval-check-output"):
        assert [output.output_type for output in cell.outputs] == ["stream"]
        assert "False" not in cell.outputs[0].text, cell.id


def test_figures_have_alt_text(book):
    for output in outputs(book):
        if "image/png" in output.get("data", {}):
            alt = output.metadata.get("image/png", {}).get("alt", "")
            assert len(alt) >= 30, f"describe the figure in words: {alt!r}"


def test_file_is_small_and_from_no_machine(book):
    text = book.path.read_text(encoding="utf-8")
    assert book.path.stat().st_size <= 300 * 1024
    assert (
        set(book.metadata) == {"kernelspec", "language_info"}
        and book.metadata.kernelspec.name == "python3"
    )
    assert all(set(cell.metadata) <= {"tags"} for cell in book.cells)
    assert "papermill" not in book.metadata and "widget" not in json.dumps(
        [list(o.get("data", {})) for o in outputs(book)]
    )
    without_images = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not ABSOLUTE.search(without_images), ABSOLUTE.search(without_images)


@pytest.mark.parametrize("source", ["command line", "Makefile"])
def test_parameters_passed_to_papermill_exist(source):
    """A misspelt parameter is only a warning for papermill: the report would silently be another one."""
    if source == "Makefile":
        text = re.sub(r"\\\n", " ", (ROOT / source).read_text(encoding="utf-8"))
        lines = [line for line in text.splitlines() if "papermill" in line]
        passed = {
            (book, name)
            for line in lines
            for book in re.findall(r"(\w+)\.ipynb", line)[:1]
            for name in re.findall(r"\s-[pry] (\w+)", line)
        }
    else:
        report = (ROOT / "minicpt" / "lab" / "report.py").read_text(encoding="utf-8")
        names = re.findall(r'"-r", "(\w+)"', report) + re.findall(r'name in \("(\w+)"', report)
        main = (ROOT / "minicpt" / "__main__.py").read_text(encoding="utf-8")
        names += re.findall(r'run_notebook\(.*, "(\w+)"\)', main)
        assert names == ["title", "store", "ablations"]
        passed = {("11_reproduce_tables", name) for name in names}
    for stem, name in passed:
        book = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
        assert name in assigned(tagged(book, "parameters")[0].source), (
            f"{source} passes {name} to {stem}"
        )


def test_builder_normalises_what_differs_between_machines():
    sys.path.insert(0, str(ROOT / "data_scripts"))
    try:
        import build_notebooks
    finally:
        sys.path.pop(0)
    cell = nbformat.v4.new_code_cell(
        "1", id="one", execution_count=7, metadata={"tags": ["hint"], "execution": {}}
    )
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text=f"in {ROOT}/x\n"),
        nbformat.v4.new_output("stream", name="stdout", text="more"),
        nbformat.v4.new_output("execute_result", data={"text/plain": "1"}, execution_count=7),
    ]
    book = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {}, "papermill": {}})
    book = build_notebooks.normalise(book)
    assert set(book.metadata) == {"kernelspec", "language_info"} and book.cells[0].metadata == {
        "tags": ["hint"]
    }
    assert [o.get("text") for o in book.cells[0].outputs] == ["in ./x\nmore", None]
    assert (
        book.cells[0].id == "one"
        and book.cells[0].execution_count == book.cells[0].outputs[1].execution_count == 1
    )


def test_outputs_of_the_real_model_are_not_overwritten_where_it_is_missing(tmp_path):
    sys.path.insert(0, str(ROOT / "data_scripts"))
    try:
        import build_notebooks
    finally:
        sys.path.pop(0)
    real = nbformat.read(ROOT / "notebooks" / "14_a_real_model.ipynb", as_version=4)
    load = next(cell for cell in code_cells(real) if cell.id == "load")
    assert build_notebooks.FALLBACK in load.source
    assert build_notebooks.FALLBACK not in str(load.outputs), "commit it executed with the model"
    cells = [nbformat.v4.new_code_cell(f"print({build_notebooks.FALLBACK!r})", id="one")]
    path = tmp_path / "14.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    assert "kept as it was" in build_notebooks.build(path) and path.read_bytes() == before


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory):
    """A store of eight cells, an older setting and a failure."""
    from minicpt.lab.cells import Cell, grid
    from minicpt.lab.executors import run_grid
    from minicpt.lab.store import Store

    store = Store(tmp_path_factory.mktemp("store"))
    assert not run_grid(
        [Cell("trec", "cpt", 2, 0, n_test=8, hp=(("epochs", 1), ("lr", 0.5)))], store
    )
    cells = grid(["trec"], ["zero", "icl", "pt", "cpt"], [2], range(2), n_test=8)
    cells = [replace(c, hp=(("epochs", 2),)) if c.method in ("pt", "cpt") else c for c in cells]
    assert not run_grid(cells, store)
    store.put_error(Cell("trec", "lora", 2, 0, n_test=8), RuntimeError("out of luck"))
    return store


def shown_by_the_report(folder):
    """What notebook 11 chooses from a store: its first cells, run here."""
    book = nbformat.read(ROOT / "notebooks" / "11_reproduce_tables.ipynb", as_version=4)
    source = {cell.id: cell.source for cell in code_cells(book)}
    names = {}
    exec(source["setup"], names)
    exec(source["parameters"], names)
    names["store"] = str(folder)
    exec(source["load"], names)
    exec(source["settings"], names)
    return {store_module.key_of(result["config"]) for result in names["shown"]}


def test_the_report_shows_the_cells_of_its_own_command_whatever_else_is_newer(tiny_store, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(tiny_store.folder, folder)
    newest = shown_by_the_report(folder)
    old = next(result for result in tiny_store.results() if result["config"]["hp"]["lr"] == 0.5)
    zero = [r for r in tiny_store.results() if r["config"]["method"] == "zero"]
    store_module.write_atomically(folder / "cells.csv", store_module.export([old, *zero]))
    asked = {store_module.key_of(result["config"]) for result in (old, *zero)}
    assert shown_by_the_report(folder) == asked and not asked <= newest


@pytest.mark.slow
def test_the_report_of_ablations_keeps_plain_methods_beside_their_variants(tmp_path):
    """A store whose newest files are variants; once with one variant alone."""
    from minicpt.lab import ablations
    from minicpt.lab.executors import run_grid

    for names in (["no_projection"], ["no_projection", "pt", "pt_ball"]):
        groups = ablations.grid(names, ["trec"], [2], range(2), n_test=8)
        store = store_module.Store(tmp_path)
        assert not run_grid([cell for group in groups.values() for cell in group], store)
        ablations.write(ablations.collect(groups, store), tmp_path, "Ablations")
        methods = {"cpt", "pt"} & groups.keys()
        plain = {cell.key() for name in methods for cell in groups[name]}
        assert shown_by_the_report(tmp_path) == plain


@pytest.mark.slow
def test_report_of_a_store(tiny_store, tmp_path):
    """What `table --report` does: papermill of notebook 11 on a store, figures beside it, and the HTML."""
    from minicpt.lab.report import run_notebook

    folder = tmp_path / "a store with spaces"
    shutil.copytree(tiny_store.folder, folder)
    paths = run_notebook(folder, "A few shots")
    text = paths["html"].read_text(encoding="utf-8")
    figures = {"accuracy_by_shots.png", "difference_to_icl.png", "training_curves.png"}
    assert {path.name for path in folder.glob("*.png")} == figures <= paths.keys()
    assert "out of luck" in text and "A few shots" in text
    assert "1 results of other settings left out, 8 shown" in text
    assert "No published cell belongs to a model of this table" in text
    assert "Exercise 11.1" not in text
    ran = nbformat.read(paths["report"], as_version=4)
    assert not [o for o in outputs(ran) if o.get("name") == "stderr" or o.output_type == "error"]


@pytest.mark.slow
def test_report_of_a_refilled_store_of_one_seed(tiny_store, tmp_path):
    """Cells taken from a CSV have neither scores nor losses; one seed has no interval."""
    from minicpt.lab.report import run_notebook

    for result in tiny_store.results():
        if result["config"]["seed"] == 0:
            kept = {key: result[key] for key in (*store_module.MEASURED, "config", "seconds")}
            path = tmp_path / f"{store_module.key_of(result['config'])}.json"
            store_module.write_atomically(path, json.dumps({**kept, "source": "cells.csv"}))
    text = run_notebook(tmp_path, "Refilled")["html"].read_text(encoding="utf-8")
    assert "there is no curve to draw" in text and "No result here has a history" in text
    assert "[nan" not in text


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zero", "pt"])
def test_run_cell_reports_other_methods(method, tmp_path):
    """The default is CPT; zero-shot trains nothing and has no context, PT has no context either."""
    out = tmp_path / "out.ipynb"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            ROOT / "notebooks" / "run_cell.ipynb",
            out,
            "-p",
            "method",
            method,
            "-p",
            "n_test",
            "12",
            "-p",
            "shots",
            "2",
            "-k",
            "python3",
            "--no-progress-bar",
            "--log-level",
            "ERROR",
        ],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    ran = nbformat.read(out, as_version=4)
    assert not [o for o in outputs(ran) if o.get("name") == "stderr" or o.output_type == "error"]


def test_notebook_07_concludes_from_its_twenty_seeds_what_they_say():
    """Two differences are decided on trec, none on sst2; all eight methods saw the same splits."""
    ladder = pd.read_csv(ROOT / "minicpt" / "assets" / "reference_prompt_ladder.csv")

    def decided(task, a, b):
        rows = ladder[ladder.task == task]
        assert rows.seed.tolist() == list(range(20))
        _, _, low, high = interval((rows[a] - rows[b]).tolist())
        return low > 0 or high < 0

    pairs = {
        ("deep prompts", "prompt tuning"): True,
        ("IAPT", "LoRA"): True,
        ("late prompt", "prompt tuning"): False,
        ("IDPG", "deep prompts"): False,
        ("IAPT", "IDPG"): False,
        ("IAPT", "deep prompts"): False,
        ("IAPT", "deep prompts, S = 32"): False,
    }
    for (a, b), expected in pairs.items():
        assert decided("trec", a, b) == expected, (a, b)
        assert not decided("sst2", a, b), (a, b)


def test_notebook_06_concludes_about_the_ball_what_the_ablations_say():
    """Small balls end at ICL; from 0.1 on no interval leaves out zero, and none survives Holm's correction."""
    table = pd.read_csv(ROOT / "minicpt" / "assets" / "reference_ablations.csv").set_index(
        "variant"
    )
    for name in ("epsilon_0.01", "epsilon_paper"):
        assert abs(table.difference[name] - table.difference["icl"]) < 1
    wide = "epsilon_0.1 epsilon_0.3 epsilon_1 epsilon_3 no_projection one_ball labels_too".split()
    assert (table.ci_low[wide] < 0).all() and (table.ci_high[wide] > 0).all()
    small = ["icl", "epsilon_0.01", "epsilon_paper", "epsilon_0.03"]
    assert (table.holm[wide + small] >= 0.05).all()

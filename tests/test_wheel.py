"""The package as somebody gets it who has no repository: a wheel, a command, an exercise notebook."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a network from a copy, so that nothing is left in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "minicpt", source / "minicpt", ignore=shutil.ignore_patterns("__pycache__")
    )
    build = [
        *PIP,
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(build, check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Run a command in an empty folder, where the installed wheel is the only minicpt that Python finds first."""
    target, elsewhere = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run(
        [
            *PIP,
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(target),
            str(wheel),
        ],
        check=True,
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(target),
        "IPYTHONDIR": str(elsewhere / "ipython"),
    }

    def run(*command):
        done = subprocess.run(
            list(map(str, command)), cwd=elsewhere, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.target, run.elsewhere = target, elsewhere
    return run


def test_the_wheel_holds_every_file_of_the_package(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("minicpt/")}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "minicpt").rglob("*")
        if path.is_file()
    }
    assert held == {name for name in files if "__pycache__" not in name}
    assert {
        "minicpt/py.typed",
        "minicpt/assets/micro/model.safetensors",
        "minicpt/check/nb01.py",
    } <= held


def test_the_installed_command_checks_its_installation(run):
    where = run(sys.executable, "-c", "import minicpt; print(minicpt.__file__)")
    assert Path(where.strip()).is_relative_to(run.target)
    assert "one CPT step" in run(sys.executable, run.target / "bin" / "minicpt", "check-install")


def test_an_exercise_notebook_runs_where_no_repository_is(run):
    book = nbformat.read(
        ROOT / "notebooks/exercises/04_context_and_token_roles.ipynb", as_version=4
    )
    book.cells.insert(0, nbformat.v4.new_code_cell("import minicpt; print(minicpt.__file__)"))
    nbformat.write(book, run.elsewhere / "exercise.ipynb")
    run(
        sys.executable,
        "-m",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        "--output",
        "done.ipynb",
        "exercise.ipynb",
    )
    cells = [
        cell
        for cell in nbformat.read(run.elsewhere / "done.ipynb", as_version=4).cells
        if cell.cell_type == "code"
    ]
    assert Path(cells[0].outputs[0].text.strip()).is_relative_to(run.target)
    errors = [
        output.ename for cell in cells for output in cell.outputs if output.output_type == "error"
    ]
    assert set(errors) == {"NotYet"}, "exercises left out say so, and nothing else goes wrong"

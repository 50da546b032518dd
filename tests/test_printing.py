"""What our commands print arrives everywhere: in files, in pipes, on terminals of narrow code pages."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minicpt.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    path
    for path in sorted((ROOT / "data_scripts").glob("*.py"))
    if "print(" in path.read_text(encoding="utf-8")
    and "\ndef main(" in path.read_text(encoding="utf-8")
]
SAY = "from minicpt.errors import print_any_text as p; p(); print('ε † 东 \\ud800')"


def environment(encoding):
    return {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0"}


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii", "utf-8"])
def test_redirected_output_is_utf8_whatever_the_code_page(encoding):
    run = subprocess.run(
        [sys.executable, "-c", SAY], capture_output=True, env=environment(encoding), check=True
    )
    assert run.stdout.decode("utf-8").strip() == "ε † 东 ?"


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_terminal_gets_its_own_encoding_and_a_question_mark_for_what_it_cannot_show():
    ours, theirs = os.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        command = [sys.executable, "-c", SAY]
        subprocess.run(command, stdout=theirs, env=environment("latin-1"), check=True)
        os.close(theirs)
        assert terminal.read(100).strip() == b"? ? ? ?"


def test_the_table_is_printed_into_a_file_of_a_windows_code_page(tmp_path, monkeypatch):
    """CPT with the paper's ε: the letter that ended the command after all the computing."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    table = "table --datasets trec --methods icl cpt_paper_eps --shots 2 --seeds 1 --n-test 4"
    monkeypatch.setattr(sys, "argv", ["minicpt", *table.split(), "--out", str(tmp_path)])
    assert main() == 0
    sys.stdout.flush()
    assert "ε" in written.getvalue().decode("utf-8")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_that_prints_begins_with_it(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if getattr(node, "name", "") == "main"]
    first = function.body[1 if ast.get_docstring(function) else 0]
    assert ast.unparse(first) == "print_any_text()"

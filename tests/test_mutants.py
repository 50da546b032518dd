"""`make mutants`: each change can still be made and its test is a fast one; what the runner says is so."""

import ast
import multiprocessing
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from mutants.run import ROOT, load_changes, stale, verdict

CHANGES = load_changes()


def named(change):
    return "{file}: {old}".format(**change)


@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_a_change_can_be_made_and_names_a_fast_test(change):
    assert not stale(change), "write the change anew in tests/mutants/changes.toml"
    assert change["new"] != change["old"] and re.fullmatch(r"[A-Z].{20,120}\.", change["wrong"])
    file, name = re.fullmatch(r"(test_\w+\.py)::(test_\w+)(?:\[[\w-]+\])?", change["test"]).groups()
    module = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    (test,) = [f for f in module.body if isinstance(f, ast.FunctionDef) and f.name == name]
    assert not any("slow" in ast.unparse(mark) for mark in test.decorator_list)


def test_thirty_changes_reach_every_wing_that_makes_a_number():
    assert len({named(change) for change in CHANGES}) == len(CHANGES) == 30
    wings = Counter(Path(change["file"]).parts[0] for change in CHANGES)
    assert set(wings) == {"core", "data.py", "engine", "dropin", "methods", "lab"}


@pytest.mark.skipif(sys.platform == "win32", reason="its processes are forked")
def test_the_runner_tells_what_a_test_notices_from_what_it_does_not(tmp_path):
    for name, text in {
        "minicpt/__init__.py": "",
        "minicpt/sums.py": "def double(x):\n    return x + x  # twice\n",
        "tests/test_sums.py": "from minicpt import sums\ndef test_one():\n    assert sums.double(1) == 2\n",
        "pyproject.toml": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def said(old, new):
        change = {"file": "sums.py", "old": old, "new": new}
        assert not stale(change, tmp_path)
        return verdict(change, ["test_sums.py::test_one"], tmp_path)

    # as it is after another test of this process that forks from a server which has the library
    multiprocessing.set_forkserver_preload(["minicpt"])
    assert said("x + x", "x + 2")[0] == "caught"
    assert said("x + x", "2 * x")[0] == "survived"
    broken, output = said("def", "deaf")
    assert broken == "broken" and "SyntaxError" in output
    twice = {"file": "sums.py", "old": "double", "new": "triple"}
    assert stale(twice | {"old": "x"}, tmp_path) == "sums.py holds 'x' 3 times, not once"
    assert stale(twice | {"file": "sum.py"}, tmp_path) == "sum.py is no more"

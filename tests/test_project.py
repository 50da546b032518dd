"""Promises of the project: a light import, one list of dependencies, texts that stay true."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from minicpt.data import ASSETS
from minicpt.methods.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minicpt"


def test_import_is_light():
    heavy = ("torch", "transformers", "peft", "datasets", "matplotlib")
    code = f"import minicpt, sys; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
        == "[]"
    )


def test_every_lazy_name_exists_and_a_wrong_one_is_explained():
    import minicpt

    for name in minicpt.__all__:
        assert getattr(minicpt, name) is not None
    with pytest.raises(AttributeError, match="it has"):
        minicpt.no_such_name


def requirements(names):
    """{package: bound} of requirement strings; conda's names for pip's."""
    pairs = (re.match(r"([A-Za-z0-9_-]+)\s*(.*)", name).groups() for name in names)
    return {
        {"pytorch": "torch", "matplotlib-base": "matplotlib"}.get(n, n): bound for n, bound in pairs
    }


def test_environment_yml_says_what_pyproject_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    expected = requirements(project["dependencies"] + project["optional-dependencies"]["test"])
    expected["python"] = project["requires-python"]
    found = requirements(conda)
    found.pop("pip")
    assert found == expected


def test_constraints_pin_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.split("==")
        for line in (ROOT / ".ci/constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pinned = {name.lower(): version for name, version in pinned.items()}
    wanted = requirements(project["dependencies"] + project["optional-dependencies"]["test"])
    for name, bound in wanted.items():
        have, need = ([int(x) for x in re.findall(r"\d+", v)[:2]] for v in (pinned[name], bound))
        assert have >= need, name
    assert pinned["torch"] == "2.13.0"


def test_hyperparameters_are_there_for_every_trained_method():
    values = json.loads((ASSETS / "hyperparameters.json").read_text())
    trained = {m for m, spec in METHODS.items() if spec.trains}
    for place in ("micro", "hub"):
        assert trained == set(values[place]) - {"how"} and values[place]["how"]
    for method in ("cpt", "cpt_instr"):  # the paper's values, as quoted
        hub = values["hub"][method]
        assert (hub["epsilon"], hub["epsilon_format"], hub["epsilon_unit"], hub["decay"]) == (
            0.1,
            0.1,
            "peft",
            0.95,
        )


def test_the_make_targets_of_the_readme_exist():
    readme, makefile = ((ROOT / name).read_text() for name in ("README.md", "Makefile"))
    for target in set(re.findall(r"`make ([a-z0-9-]+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_extras_that_texts_and_messages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    texts = [*ROOT.glob("*.md"), *PACKAGE.glob("*.py"), ROOT / "Makefile"]
    named = {
        name
        for path in texts
        for name in re.findall(r"(?:minicpt|\.)\[([a-z]+)\]'", path.read_text(encoding="utf-8"))
    }
    assert {"slurm", "test"} <= named <= extras.keys()


def test_the_readmes_table_is_the_reference_table():
    sys.path.insert(0, str(ROOT / "data_scripts"))
    from update_readme import ABLATIONS, BLOCK, ablations_block, block, means_block

    readme = (ROOT / "README.md").read_text()
    assert BLOCK.search(readme)[0].count(block()) == 1
    assert ABLATIONS.search(readme)[0].count(ablations_block()) == 1
    assert (
        BLOCK.search((ROOT / "README.zh.md").read_text(encoding="utf-8"))[0].count(means_block())
        == 1
    )

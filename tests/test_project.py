"""Promises of the project: a light import, one list of dependencies, texts that stay true."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import check_jsonschema
import pandas as pd
import pytest
import yaml

from minicpt.data import ASSETS
from minicpt.methods.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minicpt"
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.md")]


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
    pips = {
        "pytorch": "torch",
        "matplotlib-base": "matplotlib",
        "python-fastjsonschema": "fastjsonschema",
    }
    return {pips.get(name, name): bound for name, bound in pairs}


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
    hub = values["hub"]["cpt_paper_eps"]  # the paper's values, as quoted
    assert (hub["epsilon"], hub["epsilon_format"], hub["epsilon_unit"], hub["decay"]) == (
        0.1,
        0.1,
        "peft",
        0.95,
    )


def test_the_make_targets_that_texts_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {
        target
        for path in TEXTS
        for target in re.findall(r"`make ([a-z0-9-]+)", path.read_text(encoding="utf-8"))
    }
    assert {"reproduce", "test", "lint"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_extras_that_texts_and_messages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    texts = [*TEXTS, *PACKAGE.rglob("*.py"), ROOT / "Makefile"]
    named = {
        name
        for path in texts
        for name in re.findall(r"(?:minicpt|\.)\[([a-z]+)\]'", path.read_text(encoding="utf-8"))
    }
    assert {"slurm", "test"} <= named <= extras.keys()


def test_the_blocks_in_the_docs_are_the_reference_tables():
    sys.path.insert(0, str(ROOT / "data_scripts"))
    from update_readme import (
        ablations_block,
        compare_prompt_tuning,
        prompt_tuning_block,
        table_block,
        with_block,
    )

    blocks = [
        ("results", "table", table_block()),
        ("ablations", "ablations", ablations_block()),
    ]
    if compare_prompt_tuning.FILE.exists():
        blocks.append(("real_models", "prompt_tuning", prompt_tuning_block()))
    for page, name, block in blocks:
        text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        assert with_block(text, name, block) == text, (
            f"docs/{page}.md: run data_scripts/update_readme.py"
        )
    with pytest.raises(ValueError, match="found 0"):
        with_block("a page without marks", "table", "")


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_numbers_of_the_readme_are_the_reference_tables(name):
    results = (
        (ROOT / name)
        .read_text(encoding="utf-8")
        .split("make check-install")[1]
        .split("`make why`")[0]
    )
    table = pd.read_csv(ASSETS / "reference_overall.csv")
    signed = re.findall(r"([+−]\d+\.\d) \[([+−]\d+\.\d), ([+−]\d+\.\d)\]", results)[
        :2
    ]  # CPT's, then the small radius's
    for method, numbers in zip(("cpt", "cpt_paper_eps"), signed, strict=True):
        row = table[table.method == method].iloc[0]
        expected = [
            f"{row[column]:+.1f}".replace("-", "−")
            for column in ("difference", "ci_low", "ci_high")
        ]
        assert list(numbers) == expected
    for method in ("cpt", "icl", "ipt", "pt_instr", "ipt_instr", "cpt_instr"):
        assert f"{table[table.method == method]['mean'].iloc[0]:.1f}" in results, method


def test_the_first_screen_is_short_and_says_what_the_model_is_before_any_result():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []
    before = " ".join(lines[: lines.index("## Results")])
    assert (
        "one million parameters" in before.split("![")[0]
        and "generated text" in before.split("![")[0]
    )


def test_every_page_of_the_docs_is_found_from_the_readme_and_wrapped():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    own = {"index.md", "citing.md"}  # the book's
    pages = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in own)
    assert len(pages) >= 9
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert f"(docs/{page.name})" in readme, page.name
        assert re.match(r"# .+\?\n", text), f"{page.name}: a page answers one question, its title"
    for page in [*pages, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        text = page.read_text(encoding="utf-8")
        assert [line for line in text.splitlines() if len(line) > 120 and line[0] != "|"] == [], (
            page.name
        )


def test_the_chinese_glossary_and_front_page_have_what_the_english_ones_have():
    folders = ROOT / "notebooks", ROOT / "notebooks/zh"
    english, chinese = ((at / "GLOSSARY.md").read_text(encoding="utf-8") for at in folders)
    for entry in (r"^- \*\*", r"^\| \*\*"):
        assert len(re.findall(entry, english, re.M)) == len(re.findall(entry, chinese, re.M)) > 5
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")]
    for page in pages:
        assert len({*re.findall(r"\(notebooks/(\d\d)_\w+\.ipynb\)", page)}) == 16
    assert "sixteen notebooks" in pages[0] and "十六个 Jupyter notebook" in pages[1]


def test_the_picture_of_the_methods_is_small_and_its_text_is_large_enough():
    png = (ROOT / "docs/methods.png").read_bytes()
    width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
    assert len(png) < 150_000 and 1600 < width < 2200 and height < width


def test_the_picture_shows_what_the_library_trains():
    sys.path.insert(0, str(ROOT / "data_scripts"))
    from draw_methods import COLUMNS

    for method in COLUMNS:
        spec = METHODS[method.title.lower()]
        assert method.soft == (spec.trains == "prompt"), method.title
        assert bool(method.context) == spec.context, method.title
        assert bool(method.losses[-1]) == bool(spec.trains), method.title


def status_of_workflow(path):
    """The exit status of check-jsonschema on a file: 0 where it follows GitHub's schema."""
    check = ["--builtin-schema", "vendor.github-workflows", str(path)]
    return check_jsonschema.main(check, standalone_mode=False)


def test_the_workflow_follows_the_schema_and_runs_the_readmes_commands():
    workflow = ROOT / ".github/workflows/ci.yml"
    assert status_of_workflow(workflow) == 0
    commands = yaml.safe_load(workflow.read_text())["jobs"]["make"]["strategy"]["matrix"]["command"]
    assert {word for command in commands for word in command.split()} == {
        "make",
        "lint",
        "test",
        "reproduce",
    }


def test_a_broken_workflow_does_not_follow_the_schema(tmp_path, capsys):
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    del workflow["jobs"]["make"]["runs-on"]
    broken = tmp_path / "ci.yml"
    broken.write_text(yaml.safe_dump(workflow))
    assert status_of_workflow(broken) == 1
    assert "runs-on" in capsys.readouterr().out


def test_commit_hooks_run_what_make_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert [re.search(r"ruff (\w+)", hook["entry"])[1] for hook in hooks] == re.findall(
        r"ruff (\w+)", lint
    )

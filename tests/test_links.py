"""Links, named files and named modules in every text of the repository, checked without a network."""

import pkgutil
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.md")]
TEXTS += (ROOT / "notebooks").rglob("[0-9a-z]*.ipynb")
TEXTS = [path for path in TEXTS if ".ipynb_checkpoints" not in path.parts]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
NAMED = re.compile(r"`((?:docs|notebooks|minicpt|tests|data_scripts)/[\w./-]+)`")
MODULE = re.compile(r"`(minicpt(?:\.\w+)+)`")


def prose(path):
    """The Markdown of a file, code blocks left out."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(path):
    """The anchors that headings make on the web: lower case, punctuation gone, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {
        re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for image, text, target in LINK.findall(prose(path)):
        if re.match(r"https?:", target):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/[\w./~#?=&%+-]*)?", target), (
                f"{target}: https, please"
            )
            named, linked = (re.findall(r"\d{4}\.\d{4,5}", part) for part in (text, target))
            assert not named or named == linked, f"{text!r} links to {target}"
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.is_relative_to(ROOT) and there.exists(), f"{path.name}: nothing at {target}"
        assert not image or text, f"{path.name}: the image {target} has no alternative text"
        assert not anchor or anchor in anchors(there), (
            f"{path.name}: no heading for #{anchor} in {there.name}"
        )


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(path):
    for name in NAMED.findall(prose(path)):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_modules_exist(path):
    if path.name == "CHANGELOG.md":  # names what is no more
        return
    for name in MODULE.findall(prose(path)):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            pytest.fail(f"{path.name} names {name}: {error}")

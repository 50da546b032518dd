"""What the book adds to Sphinx: alt texts of notebook figures, downloads, links to the glossary, tables of fields."""

import dataclasses
import hashlib
import json
import re
from base64 import b64decode
from importlib import import_module
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.fileutil import copy_asset

logger = logging.getLogger(__name__)

GLOSSARY = "notebooks/GLOSSARY"
# "- **term, other name**: ..." and "| **term** | ..."
ENTRY = re.compile(r"^(?:- |\| )\*\*(.+?)\*\*", re.MULTILINE)
# pages in other languages, and those that the code writes
NO_TERMS_IN = ("README.zh", "notebooks/zh/", "docs/reference/")
# words that mostly mean something else where they are used
NOT_LINKED = {"type", "cell"}
NO_LINKS_IN = (nodes.title, nodes.reference, nodes.literal, nodes.raw, addnodes.download_reference)


# ---- glossary -------------------------------------------------------------------------------------------------------


def names_of(entry: str) -> list[str]:
    """The names of one entry: "ball, ε (epsilon)" -> ["ball", "ε"]."""
    return re.sub(r" \(.*?\)", "", entry).split(", ")


def plain(text: str) -> str:
    """Sphinx makes apostrophes round; the names are looked up with straight ones."""
    return text.replace("’", "'").lower()


def anchor_of(name: str) -> str:
    return "term-" + nodes.make_id(plain(name))


def glossary(text: str) -> dict[str, str]:
    """The names that the glossary explains, each with its entry's id: `{"soft prompt": "term-soft-prompt", ...}`."""
    terms = {}
    for entry in ENTRY.findall(text):
        names = names_of(entry)
        for name in names:
            terms.setdefault(name, anchor_of(names[0]))
    return terms


def read_glossary(app) -> None:
    path = Path(app.srcdir) / f"{GLOSSARY}.md"
    app.env.minicpt_terms = glossary(path.read_text(encoding="utf-8"))


def mark_entries(doctree, terms: dict[str, str]) -> None:
    """Give each entry of the glossary its id."""
    missing = set(terms.values())
    for bold in doctree.findall(nodes.strong):
        anchor = anchor_of(names_of(bold.astext())[0])
        if anchor in missing:
            bold["ids"].append(anchor)
            missing.remove(anchor)
    for anchor in sorted(missing):
        logger.warning("no bold entry makes the anchor %s", anchor, location=GLOSSARY)


def pattern(names) -> re.Pattern:
    """Finds the names as whole words, the longest first: abbreviations as they are, words in either case."""
    ordered = sorted(names, key=len, reverse=True)
    parts = []
    for name in ordered:
        part = re.escape(name).replace("'", "['’]")
        parts.append(part if name.isupper() else f"(?i:{part})")
    return re.compile(rf"(?<![\w-])(?:{'|'.join(parts)})(?![\w-])")


def in_running_text(text: nodes.Text) -> bool:
    """Whether a link may stand here: in a paragraph, and not in a heading, a link or code."""
    parents = []
    node = text.parent
    while node is not None:
        parents.append(node)
        node = node.parent
    in_paragraph = any(isinstance(node, nodes.paragraph) for node in parents)
    return in_paragraph and not any(isinstance(node, NO_LINKS_IN) for node in parents)


def link_first_uses(doctree, terms: dict[str, str], page: str) -> None:
    """Turn the first use of each glossary term in a page into a link to its entry, `page#term-...`."""
    anchors = {plain(name): anchor for name, anchor in terms.items()}
    names, seen = pattern(terms.keys() - NOT_LINKED), set()
    for text in list(doctree.findall(nodes.Text)):
        if not in_running_text(text):
            continue
        pieces, end = [], 0
        for match in names.finditer(text):
            anchor = anchors[plain(match[0])]
            if anchor in seen:
                continue
            seen.add(anchor)
            link = nodes.reference("", match[0], internal=True, refuri=f"{page}#{anchor}")
            link["classes"].append("glossary")
            pieces += [nodes.Text(text[end : match.start()]), link]
            end = match.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(text[end:])])


# ---- notebooks ------------------------------------------------------------------------------------------------------


def alt_texts(notebook: dict) -> dict[str, str]:
    """The alternative texts of a notebook's figures, by the name of the file that MyST-NB writes (a hash)."""
    texts = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            image = output.get("data", {}).get("image/png")
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if image and alt:
                texts[hashlib.sha256(b64decode(image)).hexdigest()] = alt
    return texts


def finish_notebook(app, doctree, path: Path) -> None:
    """Put the figures' alternative texts in place, and links to the files below the title."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if not any(cell["outputs"] for cell in codes):
        logger.warning(
            "the notebook has no outputs: execute it, `make notebooks`", location=app.env.docname
        )
    texts = alt_texts(notebook)
    for image in doctree.findall(nodes.image):
        alt = texts.get(Path(image["uri"]).stem)
        if alt:
            image["alt"] = alt
    files = {"this notebook": path}
    for folder in ("exercises", "solutions"):
        file = path.parent / folder / path.name
        if file.exists():
            files[f"its {folder}"] = file
    box = nodes.paragraph("", "Download: ", classes=["downloads"])
    for name, file in files.items():
        if len(box) > 1:
            box += nodes.Text(" · ")
        target = "/" + file.relative_to(app.srcdir).as_posix()
        box += addnodes.download_reference("", name, reftarget=target)
    title = next(doctree.findall(nodes.title))
    title.parent.insert(title.parent.index(title) + 1, box)


def finish_page(app, doctree) -> None:
    docname = app.env.docname
    if docname == GLOSSARY:
        mark_entries(doctree, app.env.minicpt_terms)
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".ipynb":
        finish_notebook(app, doctree, path)


def link_terms(app, doctree, docname: str) -> None:
    if docname != GLOSSARY and not docname.startswith(NO_TERMS_IN):
        page = app.builder.get_relative_uri(docname, GLOSSARY)
        link_first_uses(doctree, app.env.minicpt_terms, page)


def point_to_first_page(app, docname: str, source: list[str]) -> None:
    """The README is the repository's first page; the book has its own."""
    source[0] = source[0].replace("](README.md)", "](docs/index.md)")


# ---- reference ------------------------------------------------------------------------------------------------------


class Fields(Directive):
    """`.. fields:: module Class`: the fields of a dataclass as a table, from the class itself."""

    required_arguments = 2

    def run(self):
        module, name = self.arguments
        rows = [("field", "default", "meaning")]
        for field in dataclasses.fields(getattr(import_module(module), name)):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            shown = (
                "" if default is dataclasses.MISSING else repr(getattr(default, "value", default))
            )
            rows.append((field.name, shown, field.metadata.get("help", "")))
        return [_table(rows)]


def _table(rows) -> nodes.table:
    group = nodes.tgroup(cols=3)
    group += [nodes.colspec(colwidth=width) for width in (25, 15, 60)]
    parts = nodes.thead(), nodes.tbody()
    group += parts
    for i, row in enumerate(rows):
        line = nodes.row()
        for j, text in enumerate(row):
            inner = nodes.literal("", text) if i and j < 2 and text else nodes.Text(text)
            line += nodes.entry("", nodes.paragraph("", "", inner))
        parts[i > 0].append(line)
    return nodes.table("", group)


# ---- files ----------------------------------------------------------------------------------------------------------


def copy_mathjax(app, error) -> None:
    """MathJax's own files travel with the book, without the parts that its pages never ask for."""
    if error is None and app.builder.format == "html":
        target = app.outdir / "_static" / "mathjax"
        copy_asset(app.config.mathjax_folder / "tex-chtml.js", target)
        for part in ("output/chtml", "input/tex/extensions"):
            copy_asset(app.config.mathjax_folder / part, target / part)


def setup(app):
    app.add_config_value("mathjax_folder", None, "html")
    app.add_directive("fields", Fields)
    app.connect("builder-inited", read_glossary)
    app.connect("source-read", point_to_first_page)
    app.connect("doctree-read", finish_page, priority=400)  # before the downloads are collected
    app.connect("doctree-resolved", link_terms)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

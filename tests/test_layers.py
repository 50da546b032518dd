"""The house: wings that import only from wings below, files that import in one order, and a promise of compactness."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "minicpt"
# from the ground upwards; inside a wing a file imports only from those listed before it
WINGS = {
    "errors": [],
    "core": ["masks", "templates", "projection", "loss", "embeddings", "train"],
    "pictures": [],
    "schema": [],
    "data": [],
    "engine": [
        "memory",
        "sources",
        "base_models",
        "modules",
        "passes",
        "prefix",
        "trees",
        "scores",
    ],
    "dropin": ["outputs", "configs", "saving", "labels", "padding", "forward", "iapt", "model"],
    "methods": [
        "registry",
        "inputs",
        "prepare",
        "context_tuning",
        "trainers",
        "fit",
        "persistence",
        "classifier",
    ],
    "lab": [
        "store",
        "cells",
        "workers",
        "executors",
        "statistics",
        "published",
        "tables",
        "report",
        "figures",
        "ablations",
    ],
    "__main__": [],
}
BELOW = {
    "errors": [],
    "core": ["errors"],
    "pictures": ["core", "errors"],
    "schema": ["errors"],
    "data": ["schema", "core", "errors"],
    "engine": ["core", "errors"],
    "dropin": ["engine", "core", "errors"],
    "methods": ["dropin", "engine", "data", "schema", "core", "errors"],
    "lab": ["methods", "dropin", "engine", "data", "core", "pictures", "errors"],
    "check": ["methods", "dropin", "engine", "data", "core", "pictures", "errors"],
    "__main__": [
        "lab",
        "methods",
        "dropin",
        "engine",
        "data",
        "schema",
        "core",
        "pictures",
        "errors",
    ],
}
MODULES = [
    f"{wing}/{name}" if name else wing for wing, names in WINGS.items() for name in names or [""]
]
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


def source(module):
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def tokens_of_code(text):
    """Tokens of Python's own tokenizer without comments, layout and docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings.add(node.body[0].lineno)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(
        token.type not in NO_CODE
        and not (token.type == tokenize.STRING and token.start[0] in docstrings)
        for token in tokens
    )


def imports(path):
    """(wing, module) of everything of this package that a file imports, inside functions too."""
    inside = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            base = [*inside[: len(inside) - node.level + 1], *parts]
        elif parts[:1] == ["minicpt"]:
            base = parts[1:]
        else:
            continue
        for alias in node.names:
            full = [*base, alias.name]
            is_module = (PACKAGE / "/".join(full[:2])).with_suffix(".py").is_file()
            yield full[0], full[1] if is_module and len(full) > 1 else ""


def test_every_file_has_its_place():
    files = {str(p.relative_to(PACKAGE).with_suffix("")) for p in PACKAGE.rglob("*.py")}
    files = {f for f in files if not f.startswith("check/") and not f.endswith("__init__")}
    assert files == set(MODULES)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_a_wing_imports_only_from_wings_below_and_a_file_only_from_files_before_it(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if path == PACKAGE / "__init__.py":
        return  # the lazy face knows all of them by name and imports none
    wing, name = parts[0], parts[-1] if len(parts) > 1 else ""
    for other, module in imports(path):
        if other != wing:
            assert other in BELOW[wing], f"{'/'.join(parts)} imports from {other}"
        elif wing != "check":
            order = WINGS[wing]
            assert order.index(module) < order.index(name), f"{wing}/{name} imports {module}"


@pytest.mark.parametrize("name", WINGS["core"])
def test_the_core_needs_torch_alone(name):
    outside = set()
    for node in ast.parse(source(f"core/{name}")).body:  # what importing the module needs
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            outside.add(node.module.split(".")[0])
    assert outside - set(sys.stdlib_module_names) <= {"torch", "jaxtyping"}


def test_compact_is_counted_in_what_a_reader_must_take_in():
    lines = {module: len(source(module).splitlines()) for module in MODULES}
    tokens = {module: tokens_of_code(source(module)) for module in MODULES}
    core = [module for module in MODULES if module.startswith("core/")]
    assert sum(tokens[module] for module in core) <= 4_810
    assert sum(lines[module] for module in core) <= 795
    # of these, some 5,000 check what people hand over, keep threads apart, and know when a kept cache is stale
    assert sum(tokens.values()) <= 53_800
    assert {module: n for module, n in lines.items() if n > 320} == {}


def test_tokens_of_code_counts_no_comment_docstring_or_layout():
    packed = 'def f(a):\n    """Says what it does."""\n    return a + 1  # because\n'
    airy = "def f(\n    a\n):\n\n    return (\n        a + 1\n    )\n"
    assert tokens_of_code(packed) == 10  # def f ( a ) : return a + 1
    assert tokens_of_code(airy) == 12  # two parentheses more

"""Sphinx builds the book from `docs/` and `notebooks/` as they stand: `make book`. Nothing is executed."""

import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for the extension `book`
if not find_spec("sphinx-mathjax-offline"):
    sys.exit(
        "The book needs more packages than the library: pip install -e '.[book]', or `make book`."
    )

project = "minicpt"
author = "The minicpt developers"
copyright = "2026, the minicpt developers"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_argparse_cli",
    "sphinx_copybutton",
    "sphinx_design",
    "book",
]

# the source folder is the repository, so that links between files work here as they do on GitHub
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/*/*.md",
    "notebooks/*.ipynb",
    "notebooks/*.md",
    "notebooks/zh/*",
    "README.zh.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "minicpt/assets/micro/README.md",
]
exclude_patterns = ["**/.ipynb_checkpoints"]

# ---- pages ----------------------------------------------------------------------------------------------------------

nb_execution_mode = "off"
nb_merge_streams = True
# notebook 11 prints tables in Markdown, which CommonMark does not know
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# MathJax travels with the book (see `book`), so that formulas need no network
mathjax_path = "mathjax/tex-chtml.js"
mathjax_folder = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"

# ---- reference ------------------------------------------------------------------------------------------------------

default_role = "code"  # the docstrings' backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
add_module_names = False
python_maximum_signature_line_length = 88

# ---- look -----------------------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "minicpt"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_copy_source = True
html_additional_pages = {"index": "to_first_page.html"}
templates_path = ["_templates"]
html_context = {"default_mode": "auto"}
html_theme_options = {
    "use_download_button": True,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search stands at the side
    "show_navbar_depth": 1,
}
# as soon as pyproject.toml names the repository: a link to it, and a button that opens a notebook in Colab
urls = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"].get(
    "urls", {}
)
if "Repository" in urls:
    html_theme_options |= {
        "repository_url": urls["Repository"],
        "repository_branch": "main",
        "use_repository_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }

"""The book as `make book` leaves it: read as files, and in a real browser where there is one."""

import functools
import html
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "build" / "book"
pytestmark = [
    pytest.mark.skipif(
        not importlib.util.find_spec("sphinx"), reason="needs `make book`: no Sphinx"
    ),
    pytest.mark.xdist_group("book"),
]
built = pytest.mark.skipif(not (BOOK / "index.html").exists(), reason="needs `make book` first")
# what a page loads by itself; a link that one may click is something else
LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*?\bsrc=["']?(?:https?:)?//[^"'>]+"""
    r"""|<link\b(?![^>]*rel=["']?(?:canonical|search|next|prev|author))[^>]*?\bhref=["']?(?:https?:)?//[^"'>]+"""
    r"""|@import\s+["'(]*(?:url\()?["']?(?:https?:)?//[^"')]+|url\(["']?(?:https?:)?//[^"')]+""",
    re.IGNORECASE,
)


@built
def test_no_page_loads_anything_from_elsewhere():
    pages = [*BOOK.rglob("*.html"), *BOOK.rglob("*.css")]
    assert len(pages) > 40
    found = {path.name: LOADS.findall(path.read_text(encoding="utf-8")) for path in pages}
    assert not {name: addresses for name, addresses in found.items() if addresses}


@pytest.mark.parametrize(
    "line",
    [
        '<script src="https://cdn.example.org/a.js"></script>',
        '<link rel="stylesheet" href="//fonts.example.org/css">',
        '<img alt="x" src="http://example.org/a.png">',
        "@import url('https://example.org/a.css');",
    ],
)
def test_what_would_load_from_elsewhere_is_recognised(line):
    assert LOADS.search(line)


@built
def test_every_master_notebook_has_a_page_with_its_downloads():
    for master in (ROOT / "notebooks").glob("[01]*.ipynb"):
        page = (BOOK / "notebooks" / f"{master.stem}.html").read_text(encoding="utf-8")
        files = re.findall(r'class="reference download internal"[^>]*href="([^"]+)"', page)
        # a page may also lead to a script
        present = [
            (BOOK / "notebooks" / file).resolve() for file in files if file.endswith(".ipynb")
        ]
        exercise = ROOT / "notebooks" / "exercises" / master.name
        assert len(present) == (3 if exercise.exists() else 1), master.name
        assert present[0].read_bytes() == master.read_bytes()
        assert all(path.exists() for path in present)


@built
def test_figures_of_notebooks_keep_their_alternative_texts():
    for master in (ROOT / "notebooks").glob("[01]*.ipynb"):
        page = (BOOK / "notebooks" / f"{master.stem}.html").read_text(encoding="utf-8")
        shown = {html.unescape(alt) for alt in re.findall(r'<img alt="([^"]*)"', page)}
        for cell in json.loads(master.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                alt = output.get("metadata", {}).get("image/png", {}).get("alt")
                assert alt is None or " ".join(alt.split()) in {" ".join(a.split()) for a in shown}


@built
def test_tables_that_notebooks_print_in_markdown_are_tables():
    for page in (BOOK / "notebooks").glob("*.html"):
        assert "<p>| " not in page.read_text(encoding="utf-8"), page.name


@built
def test_the_reference_has_every_public_name():
    import minicpt

    pages = [path.read_text(encoding="utf-8") for path in (BOOK / "docs/reference").glob("*.html")]
    ids = set(re.findall(r'id="minicpt\.[\w.]*?(\w+)"', "".join(pages)))
    ours = [name for name in minicpt.__all__ if is_ours(getattr(minicpt, name))]
    assert len(ours) > 15
    assert set(ours) <= ids


def is_ours(thing):
    return getattr(thing, "__module__", "").startswith("minicpt")


# ---- faults stop the build ----


@pytest.mark.slow
def test_the_build_stops_at_each_fault_and_names_file_and_line(tmp_path):
    """A broken link, a broken anchor, a notebook without outputs, a docstring that does not parse."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.md"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)  # it may name the repository
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "docs/index.md").write_text(
        "# First page\n\n```{toctree}\n../notebooks/00_empty\n../notebooks/GLOSSARY\n```\n\n"
        "[gone](gone.md)\n\n[no heading](../notebooks/GLOSSARY.md#nowhere)\n\n"
        "```{eval-rst}\n.. automodule:: broken_docstring\n   :members:\n```\n"
    )
    (tmp_path / "notebooks/GLOSSARY.md").write_text("# Glossary\n\n- **delta**: a vector.\n")
    cells = [{"cell_type": "markdown", "metadata": {}, "source": "# Empty", "id": "a"}]
    code = {"cell_type": "code", "metadata": {}, "source": "1", "id": "b", "outputs": []}
    cells.append({**code, "execution_count": None})
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "notebooks/00_empty.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "broken_docstring.py").write_text(
        'def f():\n    """Say |something| with *no end.\n\n        Deep.\n    Not deep.\n    """\n'
    )
    sphinx = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q"]
    done = subprocess.run(
        [*sphinx, "-c", "docs", ".", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    for place, fault in [
        (r"docs/index\.md:8", "gone"),
        (r"docs/index\.md:10", "nowhere"),
        (r"00_empty\.ipynb", "no outputs"),
        (r"broken_docstring\.py.*:1", "emphasis"),
    ]:
        assert re.search(rf"{place}.*{fault}", done.stderr), (place, fault, done.stderr)


# ---- in a browser ----


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Quiet, directory=BOOK)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs `make book`: no Selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    opened = webdriver.Chrome(options=options, service=service)
    opened.set_page_load_timeout(120)
    yield opened
    opened.quit()


def until(browser, script):
    """Wait until the script returns something true; return it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda b: b.execute_script(f"return {script}"))


def severe(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@built
def test_the_first_page_opens_and_leads_into_the_course(browser, address):
    browser.get(address)
    until(browser, "location.pathname == '/docs/index.html'")
    assert until(browser, "document.querySelector('img[src*=methods]')?.naturalWidth > 0")
    cards = browser.execute_script(
        "return [...document.querySelectorAll('.sd-card a')].map(a => a.getAttribute('href'))"
    )
    assert any("00_start_here" in href for href in cards)
    assert severe(browser) == []


@built
def test_formulas_are_rendered(browser, address):
    browser.get(f"{address}/notebooks/05_cpt_step_by_step.html")
    formulas = "document.querySelectorAll('.math').length"
    until(
        browser,
        f"document.querySelectorAll('.math mjx-container').length >= {formulas} && {formulas} > 0",
    )
    text = browser.execute_script("return document.querySelector('article').innerText")
    assert "\\(" not in text and "\\frac" not in text and "\\sum" not in text
    assert severe(browser) == []


@built
def test_a_search_for_projection_finds_its_page(browser, address):
    browser.get(f"{address}/search.html?q=projection")
    found = until(
        browser,
        "document.querySelectorAll('#search-results li a').length && "
        "[...document.querySelectorAll('#search-results li a')].map(a => a.href)",
    )
    assert any("05_cpt_step_by_step" in href for href in found)
    assert severe(browser) == []


@built
def test_a_word_of_the_glossary_leads_to_its_entry(browser, address):
    browser.get(f"{address}/notebooks/05_cpt_step_by_step.html")
    href = until(browser, "document.querySelector('a.glossary[href*=delta]').href")
    browser.get(href)
    entry = until(browser, "document.querySelector(location.hash).textContent")
    assert entry.startswith("delta")
    top = until(browser, "document.querySelector(location.hash).getBoundingClientRect().top + 0.1")
    assert 0 <= top < browser.execute_script("return innerHeight")


@built
@pytest.mark.parametrize("width", [400, 1400])
def test_no_page_scrolls_sideways(browser, address, width):
    pages = sorted(path.relative_to(BOOK).as_posix() for path in BOOK.rglob("*.html"))
    pages = [page for page in pages if not page.startswith(("_", "genindex", "py-modindex"))]
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    too_wide = {}
    for page in pages:
        browser.get(f"{address}/{page}")
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        if wide > width:
            too_wide[page] = wide
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert too_wide == {}
    assert severe(browser) == []

"""What a run leaves for its readers: tables as CSV, Markdown, LaTeX and text, and the executed report notebook."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..errors import MiniCPTError
from .store import export, write_all
from .tables import (
    OTHER,
    answers,
    beside,
    frame,
    overall,
    overall_rows,
    pipes,
    shared_seeds,
    summary,
    title,
    wide,
)

ROOT = Path(__file__).resolve().parent.parent.parent


def write(
    results: Sequence[dict], folder: str | Path, heading: str, score: str = "raw"
) -> dict[str, Path]:
    """Write the tables of the results into the folder, each file whole or not at all; return the paths by name.

    table.csv and overall.csv hold raw accuracies, calibrated.csv the calibrated ones, cells.csv every cell
    (`Store.refill` reads it), answers.csv how often each class was answered (raw); table.md and table.tex show `score`.
    overall.csv and its part of table.md need a complete set of ICL results, calibrated.csv calibrated accuracies,
    answers.csv scores.
    """
    cells, table, given = frame(results), summary(results, score=score), answers(results, score)
    tables = {"table.csv": summary(results).drop(columns="calibrated")}
    if cells.accuracy_calibrated.notna().all():
        tables["calibrated.csv"] = summary(results, score="calibrated")
    sections = []
    configs = [result["config"] for result in results]
    cut = {(c["dataset"], c["text_tokens"]) for c in configs if c.get("text_tokens")}
    for dataset, most in sorted(cut):
        sections.append(
            f"Every text of {dataset}, shot or query, is cut to its first {most} tokens."
        )
    if all(shared_seeds(rows) for _, rows in cells.groupby("model")):
        tables["overall.csv"] = overall(results)
        sections.append(
            "Means over shots and seeds; the difference is paired within seeds, with its 95 % interval."
        )
        for model, rows in overall(results, score=score).groupby("model"):
            sections.append(f"{model}:\n\n{pipes(*overall_rows(rows))}")
    if len(given):
        tables["answers.csv"] = answers(results)
    texts = {name: rows.to_csv(index=False, float_format="%.4f") for name, rows in tables.items()}
    texts["cells.csv"] = export(results)
    texts["table.md"] = to_markdown(table, heading, sections, given)
    texts["table.tex"] = to_latex(table)
    return write_all(Path(folder), texts)


def to_text(table: pd.DataFrame) -> str:
    """The wide table for a terminal, the best of a block marked with <; the other score stands after the slash."""
    other = table.columns[-1]
    parts = []
    for model, rows in table.groupby("model"):
        cells = wide(rows, "{} <", other).droplevel("model").to_string(line_width=120)
        parts.append(f"{model}, accuracy in percent: {OTHER[other]} / {other}\n{cells}\n")
    return "\n".join(parts)


def to_markdown(
    table: pd.DataFrame,
    heading: str,
    sections: Sequence[str] = (),
    given: pd.DataFrame | None = None,
) -> str:
    """The wide table of each model in Markdown, our numbers beside published ones, constant answers named.

    `table`: a `summary`; `sections`: paragraphs that come first; `given`: what `answers` returns.
    """
    other = table.columns[-1]
    score = OTHER[other]
    seeds = " to ".join(map(str, sorted({table.n_seeds.min(), table.n_seeds.max()})))
    parts = [
        f"# {heading}",
        *sections,
        f"Accuracy in percent, {score}: mean ±std (seeds: {seeds}); after the slash the {other} mean. The best of a "
        "column is bold for each number of shots; `*` after a dataset: arbitrary labels, which set_cls always has; "
        "`mean`: over the datasets without `*`; †: with a written instruction, placed after our reading of the paper.",
    ]
    for model, rows in table.groupby("model"):
        cells = wide(rows, other=other).droplevel("model").reset_index()
        parts += [f"## {model}", pipes(cells.columns, cells.to_numpy())]
    published = beside(table)
    if len(published):
        parts += [
            "## Beside published numbers",
            "The verdict is by the 95 % interval for one new observation of ours: "
            "inside is no contradiction, and where the interval is wide no agreement. Sources and what their "
            "evidence means: `assets/published.json`.",
            pipes(published.columns, published.to_numpy()),
        ]
    if given is not None and len(given):
        parts += ["## Constant answers", constant_answers(given)]
    return "\n\n".join(parts) + "\n"


def constant_answers(given: pd.DataFrame) -> str:
    """Who answers one and the same class to every query of a seed, in sentences; `given` is what `answers` returns."""
    said = []
    for row in given[given.constant > 0].itertuples():
        said.append(
            f"- {row.model}, {row.dataset}, {title(row.method)}, {row.shots} shots: in {row.constant:.0f} % of "
            f"{row.n_seeds} seeds every query is answered {row.answer!r}; it is right for {row.truth:.0f} % of them."
        )
    if not said:
        return "In no seed does a method give all queries one and the same answer."
    return "\n".join(said)


def to_latex(table: pd.DataFrame) -> str:
    r"""The wide table as a LaTeX tabular for \usepackage{booktabs}."""
    special = {
        "_": r"\_",
        "%": r"\%",
        "&": r"\&",
        "±": r"$\pm$",
        "†": r"$^\dagger$",
        "ε": r"$\varepsilon$",
    }
    rules = str.maketrans(special)
    cells = wide(table, best=r"\textbf{{{}}}").reset_index()
    cells = cells.map(lambda cell: str(cell).translate(rules))
    cells = cells.rename(columns=lambda name: name.translate(rules))
    return cells.to_latex(index=False, escape=False)


def run_notebook(out: Path, heading: str, *also: str) -> dict[str, Path]:
    """Execute notebooks/11_reproduce_tables.ipynb on the store: report.ipynb, report.html and the figures.

    `also` names further parameters of the notebook that take the folder.
    """
    notebook = ROOT / "notebooks" / "11_reproduce_tables.ipynb"
    if not notebook.exists():
        raise MiniCPTError(
            f"{notebook} is missing: the report needs the repository, run the command from a checkout."
        )
    paths = {"report": out / "report.ipynb", "html": out / "report.html"}
    parameters = ["-r", "title", heading]
    for name in ("store", *also):
        parameters += ["-r", name, str(out.resolve())]
    executed = str(paths["report"])
    papermill = [
        "papermill",
        str(notebook),
        executed,
        *parameters,
        "-k",
        "python3",
        "--no-progress-bar",
    ]
    # the classic template keeps the figures' descriptions
    nbconvert = ["nbconvert", "--to", "html", "--template", "classic", "--no-input", executed]
    # a report needs no exercise
    nbconvert += ["--TagRemovePreprocessor.enabled=True"]
    nbconvert += [
        f"--TagRemovePreprocessor.remove_cell_tags={tag}" for tag in ("exercise", "check")
    ]
    for command in (papermill, nbconvert):
        done = subprocess.run(
            [sys.executable, "-m", *command, "--log-level", "ERROR"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            raise MiniCPTError(
                f"{command[0]} failed on {notebook.name}; the results are kept. It said:\n{done.stderr}"
            )
    return paths | {figure.name: figure for figure in sorted(out.glob("*.png"))}

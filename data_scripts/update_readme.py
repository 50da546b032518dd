"""Put the finished tables into docs/, by way of the committed reference tables.

    make reproduce ablations bench && python data_scripts/update_readme.py

results/*/*.csv -> minicpt/assets/reference_*.csv -> docs/results.md, docs/ablations.md; results/bench -> docs/speed.md;
results/gpu/report.md, by `make gpu` -> docs/speed.md, to which notebook 09 points;
reference_smollm2_cells.csv, reference_prompt_tuning.csv (by compare_prompt_tuning.py) -> docs/real_models.md.
What has not been computed stays as it is.
"""

import re
import shutil
from pathlib import Path

import compare_prompt_tuning
import pandas as pd

from minicpt.data import ASSETS, TASKS, load_task
from minicpt.lab.ablations import rows_to_read
from minicpt.lab.statistics import interval, signed
from minicpt.lab.tables import overall_rows, pipes, title, wide
from minicpt.methods.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DRY_RUN = "**A dry run:"  # as tests/bench/gpu.py writes it
REFERENCES = {  # asset: its source under results/, made by a command that docs/ name
    "reference_overall.csv": "few_shot/overall.csv",
    "reference_table.csv": "few_shot/table.csv",
    "reference_ablations.csv": "ablations/ablations.csv",
    "reference_copy_probe.csv": "ablations/copy_probe.csv",
    "reference_ablations_8.csv": "ablations_8/ablations.csv",
    "reference_ablations_fresh.csv": "ablations_fresh/ablations.csv",
    "reference_ablations_instr.csv": "ablations_instr/ablations.csv",
}


def table_block() -> str:
    """The reference tables in Markdown: the means, and all cells folded away."""
    means = pipes(*overall_rows(pd.read_csv(ASSETS / "reference_overall.csv")))
    all_cells = wide(pd.read_csv(ASSETS / "reference_table.csv")).droplevel("model").reset_index()
    title = "Every number of shots (accuracy in percent, mean ± std over seeds)"
    return means + "\n\n" + folded(title, pipes(all_cells.columns, all_cells.to_numpy()))


def ablations_block() -> str:
    """The comparison with plain CPT in Markdown, folded away."""
    variants = rows_to_read(pd.read_csv(ASSETS / "reference_ablations.csv"))
    return folded("Every variant against plain CPT", pipes(*variants))


def smollm2_block() -> str:
    """The cells on the real model in Markdown, a table for each data set: means, and differences to ICL."""
    cells = pd.read_csv(ASSETS / "reference_smollm2_cells.csv")
    parts = []
    for dataset in TASKS:
        those = cells[cells.dataset == dataset]
        numbers = sorted(set(those.shots) - {0})
        rows = []
        for method in [method for method in METHODS if method in set(those.method)]:
            of_method = those[those.method == method]
            if method == "zero":
                rows.append(
                    [title(method), mean_of(of_method, those, 0)] + [""] * (len(numbers) - 1)
                )
            else:
                rows.append([title(method)] + [mean_of(of_method, those, k) for k in numbers])
        if rows:
            name = load_task(dataset, "micro").title.removesuffix(" (micro)")
            header = ["method", *(f"{k} shots" for k in numbers)]
            parts.append(f"**{name}**\n\n{pipes(header, rows)}")
    return "\n\n".join(parts) + "\n"


def mean_of(cells: pd.DataFrame, everything: pd.DataFrame, shots: int) -> str:
    """Raw accuracy in percent, mean ± std; then the difference to ICL where both have the same seeds, five or more."""
    own = cells[cells.shots == shots].set_index("seed").accuracy * 100
    icl = everything[(everything.method == "icl") & (everything.shots == shots)]
    icl = icl.set_index("seed").accuracy * 100
    if len(own) < 5:
        return f"{len(own)} of 5 seeds"
    text = f"{own.mean():.1f} ±{own.std():.1f}"
    if set(cells.method) == {"icl"} or not own.index.equals(icl.index):
        return text
    mean, _, low, high = interval(own - icl)
    return f"{text}; {signed(mean, low, high)}"


def prompt_tuning_block() -> str:
    """What prompt tuning is worth on the real model, in Markdown: accuracies, then costs."""
    table = compare_prompt_tuning.read()
    return "\n\n".join(
        [
            "Accuracy in percent, raw, mean ± standard deviation over seeds (how many):",
            compare_prompt_tuning.accuracy_block(table),
            "What it costs with 64 sentences, means over seeds:",
            compare_prompt_tuning.cost_block(table) + "\n",
        ]
    )


def gpu_report(path: Path = Path("results/gpu/report.md")) -> str | None:
    """The report of `make gpu`; None while there is none, or one of a dry run only."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    return None if DRY_RUN in text else text


def folded(title: str, text: str) -> str:
    """Markdown that the web shows as its title until it is clicked."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>\n"


def with_block(text: str, name: str, new: str) -> str:
    """The text with `new` between its marks `<!-- name: … -->` and `<!-- /name -->`, which have to be there."""
    marks = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)", re.S)
    changed, found = marks.subn(lambda m: m[1] + new + m[2], text)
    if found != 1:
        raise ValueError(f"expected one block {name!r}, found {found}")
    return changed


def main() -> None:
    for name, source in REFERENCES.items():
        if (path := Path("results", source)).exists():
            shutil.copyfile(path, ASSETS / name)
    blocks = [
        ("results.md", "table", table_block()),
        ("ablations.md", "ablations", ablations_block()),
        ("real_models.md", "smollm2", smollm2_block()),
    ]
    if (bench := Path("results/bench/cpu.md")).exists():
        blocks.append(("speed.md", "bench", bench.read_text(encoding="utf-8")))
        shutil.copyfile(bench.with_suffix(".png"), ROOT / "tests/bench/cpu.png")
    if (report := gpu_report()) is not None:
        blocks.append(("speed.md", "gpu", report))
    if compare_prompt_tuning.FILE.exists():
        blocks.append(("real_models.md", "prompt_tuning", prompt_tuning_block()))
    for page, name, new in blocks:
        text = (DOCS / page).read_text(encoding="utf-8")
        (DOCS / page).write_text(with_block(text, name, new), encoding="utf-8")


if __name__ == "__main__":
    main()

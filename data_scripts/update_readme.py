"""Put the finished tables into docs/, by way of the committed reference tables.

    make reproduce ablations bench growth && python data_scripts/update_readme.py

results/*/*.csv -> minicpt/assets/reference_*.csv -> docs/results.md, docs/ablations.md; results/bench, results/growth
-> docs/speed.md; results/gpu/report.md, by `make gpu` -> docs/speed.md, to which notebook 09 points;
reference_smollm2_cells.csv, reference_smollm2_radius.csv, reference_prompt_tuning.csv (by compare_prompt_tuning.py) ->
docs/real_models.md.
What has not been computed stays as it is.
"""

import re
import shutil
from pathlib import Path

import compare_prompt_tuning
import pandas as pd

from minicpt.data import ASSETS, load_task
from minicpt.lab.ablations import rows_to_read
from minicpt.lab.statistics import signed
from minicpt.lab.tables import overall, overall_rows, paired, pipes, summary, title, wide
from minicpt.methods.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SEEDS = 5  # of a cell on the real model
SIX = ["zero", "icl", "pt", "ipt", "lora", "cpt"]
DRY_RUN = "**A dry run:"  # as tests/bench/gpu.py writes it
REFERENCES = {  # asset: its source under results/, made by a command that docs/ name
    "reference_overall.csv": "few_shot/overall.csv",
    "reference_table.csv": "few_shot/table.csv",
    "reference_ablations.csv": "ablations/ablations.csv",
    "reference_copy_probe.csv": "ablations/copy_probe.csv",
    "reference_ablations_8.csv": "ablations_8/ablations.csv",
    "reference_ablations_fresh.csv": "ablations_fresh/ablations.csv",
    "reference_ablations_instr.csv": "ablations_instr/ablations.csv",
    "reference_smollm2_radius.csv": "smollm2_radius/ablations.csv",
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
    """The cells on the real model in Markdown: all tasks together, then a table for each of them."""
    results = smollm2_results()
    means = summary(results)
    gaps = paired(results).set_index(["dataset", "shots", "method"])
    parts = []
    for shots in ([4], [2, 4, 6]):
        chosen = complete(results, shots)
        if chosen:
            parts.append(f"**Together, {', '.join(map(str, shots))} shots**")
            parts.append(pipes(*overall_rows(overall(chosen))))
    for dataset in means.dataset[means.shots > 0].unique():
        those = means[means.dataset == dataset]
        numbers = sorted(set(those.shots) - {0})
        rows = []
        for method in [method for method in METHODS if method in set(those.method)]:
            row = dict.fromkeys(numbers, "")
            for cell in those[those.method == method].itertuples():
                place = dataset, cell.shots, method
                text = f"{cell.mean:.1f} ±{cell.std:.1f}"
                if place in gaps.index:
                    gap = gaps.loc[place]
                    text += f"; {signed(gap.difference, gap.ci_low, gap.ci_high)}"
                row[cell.shots or numbers[0]] = text
            rows.append([title(method), *row.values()])
        name = load_task(dataset, "micro").title.removesuffix(" (micro)")
        header = ["method", *(f"{k} shots" for k in numbers)]
        caps = sorted(
            {
                int(r["text_tokens"])
                for r in results
                if r["dataset"] == dataset and r["text_tokens"] > 0
            }
        )
        if caps:
            name += f", texts cut to {' or '.join(map(str, caps))} tokens"
        parts += [f"**{name}**", pipes(header, rows)]
    return "\n\n".join(parts) + "\n"


def smollm2_results() -> list[dict]:
    """The committed cells as results, those of a method left out where it has not all its seeds yet."""
    cells = pd.read_csv(ASSETS / "reference_smollm2_cells.csv")
    whole = cells.groupby(["dataset", "shots", "method"]).seed.transform("size") >= SEEDS
    results = []
    for row in cells[whole].to_dict("records"):
        seconds = {"fit": row["seconds_fit"], "score": row["seconds_score"]}
        config = {**row, "labels": "canonical", "data": "real"}
        results.append({**row, "config": config, "seconds": seconds})
    return results


def complete(results: list[dict], shots: list[int]) -> list[dict]:
    """The results with these numbers of shots, of the data sets that have all methods of `make real` there."""
    places = {(r["dataset"], r["shots"], r["method"]) for r in results}
    chosen = []
    for r in results:
        needed = {(r["dataset"], k, method) for k in shots for method in SIX if method != "zero"}
        if needed <= places and r["shots"] in (0, *shots):
            chosen.append(r)
    return chosen


def radius_block() -> str:
    """CPT with other radii on the real model beside the same variants of the micro model, in Markdown."""
    real = pd.read_csv(ASSETS / "reference_smollm2_radius.csv")
    micro = pd.read_csv(ASSETS / "reference_ablations.csv").set_index("variant")
    rows = []
    for row in real.itertuples():
        gap, gap_on_micro = "", ""
        if row.variant != "cpt":
            gap = signed(row.difference, row.ci_low, row.ci_high)
            same = micro.loc[row.variant]
            gap_on_micro = signed(same.difference, same.ci_low, same.ci_high)
        rows.append(
            [row.variant, row.meaning, f"{row.sst2:.1f}", f"{row.trec:.1f}", gap, gap_on_micro]
        )
    header = "variant,what it is,SST-2,TREC,minus CPT [95 %],the same on micro (five tasks)"
    return pipes(header.split(","), rows) + "\n"


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
    if (ASSETS / "reference_smollm2_radius.csv").exists():
        blocks.append(("real_models.md", "radius", radius_block()))
    if (bench := Path("results/bench/cpu.md")).exists():
        blocks.append(("speed.md", "bench", bench.read_text(encoding="utf-8")))
        shutil.copyfile(bench.with_suffix(".png"), ROOT / "tests/bench/cpu.png")
    if (cells := Path("results/bench/cells.md")).exists():
        blocks.append(("speed.md", "cells", cells.read_text(encoding="utf-8")))
    if (report := gpu_report()) is not None:
        blocks.append(("speed.md", "gpu", report))
    if (growth := Path("results/growth/growth.md")).exists():
        blocks.append(("speed.md", "growth", growth.read_text(encoding="utf-8")))
        for suffix in (".png", ".csv"):
            shutil.copy(growth.with_suffix(suffix), ROOT / "tests/bench")
    if compare_prompt_tuning.FILE.exists():
        blocks.append(("real_models.md", "prompt_tuning", prompt_tuning_block()))
    for page, name, new in blocks:
        text = (DOCS / page).read_text(encoding="utf-8")
        (DOCS / page).write_text(with_block(text, name, new), encoding="utf-8")


if __name__ == "__main__":
    main()

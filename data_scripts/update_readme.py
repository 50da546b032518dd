"""Put the finished tables into the READMEs, by way of the committed reference tables.

    make reproduce ablations bench && python data_scripts/update_readme.py

results/*/*.csv -> minicpt/assets/reference_*.csv -> README.md, README.zh.md. What has not been computed stays as it is.
"""

import re
import shutil
from pathlib import Path

import pandas as pd

from minicpt.data import ASSETS
from minicpt.lab.ablations import rows_to_read
from minicpt.lab.tables import overall_rows, pipes, wide

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: .*? -->\n).*?(<!-- /table -->)", re.S)
ABLATIONS = re.compile(r"(<!-- ablations: .*? -->\n).*?(<!-- /ablations -->)", re.S)
BENCH = re.compile(r"(<!-- bench: .*? -->\n).*?(<!-- /bench -->)", re.S)
REFERENCES = {  # asset: its source under results/, made by a command that the README names
    "reference_overall.csv": "few_shot/overall.csv",
    "reference_table.csv": "few_shot/table.csv",
    "reference_ablations.csv": "ablations/ablations.csv",
    "reference_copy_probe.csv": "ablations/copy_probe.csv",
    "reference_ablations_8.csv": "ablations_8/ablations.csv",
    "reference_ablations_fresh.csv": "ablations_fresh/ablations.csv",
    "reference_ablations_instr.csv": "ablations_instr/ablations.csv",
}


def means_block() -> str:
    """The reference table's means in Markdown."""
    return pipes(*overall_rows(pd.read_csv(ASSETS / "reference_overall.csv")))


def block() -> str:
    """The reference tables in Markdown, as the README shows them: the means, and all cells folded away."""
    all_cells = wide(pd.read_csv(ASSETS / "reference_table.csv")).droplevel("model").reset_index()
    return "\n".join(
        [
            means_block(),
            "\n<details><summary>Every number of shots (accuracy in percent, mean ± std over seeds)</summary>\n",
            pipes(all_cells.columns, all_cells.to_numpy()),
            "\n</details>\n",
        ]
    )


def ablations_block() -> str:
    """The comparison with plain CPT in Markdown, as the README shows it, folded away."""
    return "\n".join(
        [
            "<details><summary>Every variant against plain CPT</summary>\n",
            pipes(*rows_to_read(pd.read_csv(ASSETS / "reference_ablations.csv"))),
            "\n</details>\n",
        ]
    )


def main() -> None:
    for name, source in REFERENCES.items():
        if (path := Path("results", source)).exists():
            shutil.copyfile(path, ASSETS / name)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for pattern, new in ((BLOCK, block()), (ABLATIONS, ablations_block())):
        text = pattern.sub(lambda m: m[1] + new + m[2], text)
    if (bench := Path("results/bench/cpu.md")).exists():
        text = BENCH.sub(lambda m: m[1] + bench.read_text(encoding="utf-8") + m[2], text)
        shutil.copyfile(bench.with_suffix(".png"), ROOT / "tests/bench/cpu.png")
    readme.write_text(text, encoding="utf-8")
    chinese = ROOT / "README.zh.md"
    text = BLOCK.sub(
        lambda m: m[1] + means_block() + "\n" + m[2], chinese.read_text(encoding="utf-8")
    )
    chinese.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

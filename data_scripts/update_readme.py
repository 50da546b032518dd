"""Put a finished table into the README, by way of the committed reference tables.

    make reproduce && python data_scripts/update_readme.py

results/few_shot/{table,overall}.csv -> minicpt/assets/reference_{table,overall}.csv -> README.md.
"""

import re
import shutil
import sys
from pathlib import Path

import pandas as pd

from minicpt.data import ASSETS
from minicpt.tables import overall_rows, pipes, wide

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: .*? -->\n).*?(<!-- /table -->)", re.S)


def block() -> str:
    """The reference tables in Markdown, as the README shows them: the means, and all cells folded away."""
    means, cells = (pd.read_csv(ASSETS / f"reference_{name}.csv") for name in ("overall", "table"))
    all_cells = wide(cells).droplevel("model").reset_index()
    return "\n".join([
        pipes(*overall_rows(means)),
        "\n<details><summary>Every number of shots (accuracy in percent, mean ± std over seeds)</summary>\n",
        pipes(all_cells.columns, all_cells.to_numpy()),
        "\n</details>\n",
    ])  # fmt: skip


def main(folder: str = "results/few_shot") -> None:
    for name in ("overall", "table"):
        shutil.copyfile(Path(folder) / f"{name}.csv", ASSETS / f"reference_{name}.csv")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(BLOCK.sub(lambda m: m[1] + block() + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

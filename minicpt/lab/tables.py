"""Results -> tables: frame (a row a cell) -> summary (mean, uncertainty) -> wide (what people read); paired beside it.

Accuracies are fractions in the results and in `frame`, percent from `summary` on, percentage points in `paired`.
"""

import math
from pathlib import Path

import pandas as pd

from ..data import TASKS as DATASETS
from ..methods import registry
from .published import KEYS, load_published
from .statistics import _around, interval, signed
from .store import write_atomically

METHODS = {slug: method.title for slug, method in registry.METHODS.items()}  # in reading order
CELL = ["model", "dataset", "labels", "method", "shots", "seed"]  # one result


def frame(results):
    """One row a result: model, dataset, labels, method, shots, seed, data, accuracy, accuracy_calibrated, seconds.

    Accuracies are fractions; seconds is fitting plus scoring. ValueError when there is no result, or when two results
    are the same cell (two learning rates, say): averaged as if they were two seeds they would narrow the interval.
    """
    if not results:
        raise ValueError(
            "no results to tabulate: compute some cells first, or check the results folder"
        )
    table = pd.DataFrame(
        [
            {
                **{key: result["config"][key] for key in CELL},
                "data": result["config"].get("data"),
                "accuracy": result["accuracy"],
                "accuracy_calibrated": result.get("accuracy_calibrated"),
                "seconds": result["seconds"]["fit"] + result["seconds"]["score"],
            }
            for result in results
        ]
    )
    for cell in table[table.duplicated(CELL)][CELL].to_dict("records"):
        raise ValueError(
            f"two results for the cell {cell}: their configs differ in another field; "
            "keep the results of one table and one setting"
        )
    numbers = dict.fromkeys(["accuracy", "accuracy_calibrated", "seconds"], float)
    return table.astype(numbers).sort_values(CELL, key=_rank, ignore_index=True)


def summary(results, published=None):
    """One row a (model, dataset, method, shots), in percent, with the published number beside ours where there is one.

    Columns: model, dataset, method, shots, mean, std, ci_low, ci_high, n_seeds, reported, reported_source. `published`
    is what `load_published` returns. A trailing * on a dataset means arbitrary labels: another task than the published
    one, so nothing is reported there.
    """
    table = _starred(frame(results))
    known = {
        tuple(cell[key] for key in KEYS): cell for cell in (published or load_published())["cells"]
    }
    rows = []
    for (*keys, labels), group in table.groupby([*KEYS, "labels"]):
        real = (
            labels == "canonical" and (group["data"] == "real").all()
        )  # a micro task of that name is another task
        cell = known.get(tuple(keys)) if real else None
        reported = (
            (cell["value"], f"{cell['source']} ({cell['evidence']})") if cell else (math.nan, "")
        )
        rows.append([*keys, *interval(100 * group.accuracy), len(group), *reported])
    return _ordered(
        rows, [*KEYS, "mean", "std", "ci_low", "ci_high", "n_seeds", "reported", "reported_source"]
    )


def paired(results, baseline="icl"):
    """Mean accuracy difference to the baseline on the same seeds, in percentage points, with its 95 % interval.

    Columns: model, dataset, method, shots, difference, std, ci_low, ci_high, n (seeds both have). Pairing removes what
    the splits share, so it sees differences that two separate intervals hide. Zero-shot has no split: it is left out.
    ValueError when a method has no seed in common with the baseline, or when a seed's two splits are not the same.
    """
    table = frame(results)
    table = table[table.method != "zero"]
    is_base, same = table.method == baseline, ["model", "dataset", "labels", "shots", "seed"]
    both = table[~is_base].merge(
        table.loc[is_base, [*same, "accuracy"]], on=same, how="left", suffixes=("", "_base")
    )
    pairs = _starred(both).groupby(KEYS).accuracy_base.count()
    if both.empty or not pairs.all():
        where = f"as {' / '.join(map(str, pairs.idxmin()))}" if len(pairs) else "as another method"
        raise ValueError(
            f"no {baseline!r} result on the same seeds {where}: compute it, or leave the method out"
        )
    both = both.dropna(subset="accuracy_base")
    splits = {
        tuple(result["config"][key] for key in CELL): result.get("split_sha256")
        for result in results
    }
    for row in both[CELL].to_dict("records"):
        if splits[tuple(row.values())] != splits[tuple({**row, "method": baseline}.values())]:
            raise ValueError(
                f"{row} and its {baseline!r} saw different splits: recompute the older of the two"
            )
    both["difference"] = 100 * (both.accuracy - both.accuracy_base)
    rows = [
        [*keys, *interval(group.difference), len(group)]
        for keys, group in _starred(both).groupby(KEYS)
    ]
    return _ordered(rows, [*KEYS, "difference", "std", "ci_low", "ci_high", "n"])


def overall(results, baseline="icl"):
    """One row a method: mean accuracy per dataset and over all, and the paired difference to the baseline, in percent.

    Columns: model, method, a column a dataset (mean over shots and seeds), mean, difference, ci_low, ci_high, n. The
    difference is taken within a seed after averaging shots, then datasets; its 95 % interval is over n seeds: those
    that the baseline has for every dataset. `mean` and `difference` are over the datasets without * where there are
    any. Methods that lack a cell the baseline has are left out; zero-shot stands for every number of shots.
    """
    table = _starred(frame(results))
    rows = []
    for model, cells in table.groupby("model"):
        cells = cells.assign(shots=cells.shots.where(cells.method != "zero", -1))
        datasets = list(cells.dataset.sort_values(key=_rank).unique())
        own = cells[cells.method == baseline]
        # what the baseline has: shots of each dataset, and the seeds that all of its cells share
        by_cell = own.groupby(["dataset", "shots"]).seed.agg(set)
        seeds = set.intersection(*by_cell) if {*own.dataset} == {*datasets} else set()
        if not seeds:
            raise ValueError(
                f"no complete set of {baseline!r} results for {model}: compute them first"
            )
        plain = [name for name in datasets if not name.endswith("*")] or datasets
        means = {}  # method -> (seed, dataset), averaged over shots
        for method, group in cells[cells.seed.isin(seeds)].groupby("method"):
            needed = len(seeds) * (len(datasets) if method == "zero" else len(by_cell))
            if len(group) == needed:
                means[method] = (
                    100 * group.groupby(["seed", "dataset"]).accuracy.mean().unstack()[datasets]
                )
        for method, mean in means.items():
            per_seed = mean[plain].mean(axis=1)
            gap, _, low, high = interval(per_seed - means[baseline][plain].mean(axis=1))
            rows.append([model, method, *mean.mean(), per_seed.mean(), gap, low, high, len(seeds)])
    return _ordered(
        rows, ["model", "method", *datasets, "mean", "difference", "ci_low", "ci_high", "n"]
    )


def overall_rows(table, baseline="icl"):
    """The rows of `overall` as people read them: header and cells, the difference with its interval."""
    datasets = list(table.columns[2:-5])
    header = ["method", *datasets, "mean", f"minus {METHODS[baseline]} [95 %]"]
    rows = []
    for row in table.to_dict("records"):
        means = [f"{row[name]:.1f}" for name in [*datasets, "mean"]]
        gap = (
            ""
            if row["method"] == baseline
            else signed(row["difference"], row["ci_low"], row["ci_high"])
        )
        rows.append([METHODS.get(row["method"], row["method"]), *means, gap])
    return header, rows


def wide(summary, best="**{}**"):
    """The table people read: rows (model, shots, method), a column a dataset, cells "61.2 ±4.1" (mean ± std, percent).

    The best mean of a column within one model and number of shots is wrapped in `best`, ties to the shown decimal too.
    `mean` averages the datasets without * and stays empty where a method misses one. Zero-shot stands alone at shots 0.
    """
    table = summary.pivot(
        index=["model", "shots", "method"], columns="dataset", values=["mean", "std"]
    )
    means, stds = table["mean"].sort_index(key=_rank).sort_index(axis=1, key=_rank), table["std"]
    plain = [name for name in means if not name.endswith("*")]
    if len(plain) > 1:
        means.insert(len(plain), "mean", means[plain].mean(axis=1, skipna=False))
    shown = means.map(lambda mean: float(f"{mean:.1f}"))
    rivals = shown.groupby(level=["model", "shots"])
    is_best = shown.eq(rivals.transform("max")) & (rivals.transform("count") > 1)
    spread = stds.reindex_like(means).map(lambda std: "" if math.isnan(std) else f" ±{std:.1f}")
    cells = means.map(lambda mean: "" if math.isnan(mean) else f"{mean:.1f}") + spread
    cells = cells.mask(is_best, cells.map(best.format))
    return cells.rename_axis(columns=None).rename(
        index=lambda method: METHODS.get(method, method), level="method"
    )


def to_text(summary):
    """The wide table for a terminal: 5 datasets in 100 columns, a block a number of shots, the best marked with <."""
    parts = []
    for model, rows in summary.groupby("model"):
        table = (
            wide(rows, best="{} <")
            .droplevel("model")
            .apply(lambda cells: cells.str.ljust(cells.str.len().max()))
        )
        lines = table.to_string(justify="left", line_width=120).splitlines()
        parts.append(
            "\n".join([model, *("\n" + line if line[:1].isdigit() else line for line in lines)])
        )
    return "\n\n".join(parts) + "\n"


def to_markdown(summary, title, notes):
    """The wide table of each model in Markdown, our numbers beside published ones; notes: a list of paragraphs."""
    seeds = " to ".join(map(str, sorted({summary.n_seeds.min(), summary.n_seeds.max()})))
    parts = [
        f"# {title}",
        *notes,
        f"Accuracy in percent, mean ±std (seeds: {seeds}); the best of a column is bold for "
        "each number of shots; `*` after a dataset: arbitrary labels, which set_cls always has; `mean`: over the "
        "datasets without `*`; †: with a written instruction, placed after our reading of the paper.",
    ]
    for model, rows in summary.groupby("model"):
        table = wide(rows).droplevel("model").reset_index()
        parts += [f"## {model}", pipes(table.columns, table.to_numpy())]
    if not (table := beside(summary)).empty:
        parts += [
            "## Beside published numbers",
            "The verdict is by the 95 % interval for one new observation of ours: "
            "inside is no contradiction, and where the interval is wide no agreement. Sources and what their "
            "evidence means: `assets/published.json`.",
            pipes(table.columns, table.to_numpy()),
        ]
    return "\n\n".join(parts) + "\n"


def beside(summary, published=None):
    """Ours beside the published number, all cells of the models that have one: what people read, as strings.

    Columns: model, dataset, method, shots, ours (mean ±std [95 % interval of the mean]), published, source (evidence),
    difference, 95 % prediction, verdict. An anchor, which is a baseline's number from a study other than the
    reproduced one, is only a check of our own baseline: outside the interval it is flagged as such.
    """
    sources, rows = (published or load_published())["sources"], []
    for row in summary[summary.model.isin(summary[summary.reported.notna()].model)].itertuples():
        spread = (
            "" if math.isnan(row.std) else f" ±{row.std:.1f} [{row.ci_low:.1f}, {row.ci_high:.1f}]"
        )
        cells = ["", "", "", "", "no published number"]
        if not math.isnan(row.reported):
            low, high = _around(row.mean, row.std * math.sqrt(1 + 1 / row.n_seeds), row.n_seeds)
            verdict = (
                "ours is higher"
                if row.reported < low
                else "ours is lower"
                if row.reported > high
                else "inside"
            )
            if verdict != "inside" and sources[row.reported_source.split(" (")[0]].get("anchor"):
                verdict += ": check the baseline (anchor)"
            judged = [f"{max(low, 0):.1f} to {min(high, 100):.1f}", verdict]
            judged = ["-", "one seed: no verdict"] if math.isnan(low) else judged
            cells = [
                f"{row.reported:.2f}",
                row.reported_source,
                f"{row.mean - row.reported:+.1f}",
                *judged,
            ]
        name = METHODS.get(row.method, row.method)
        rows.append([row.model, row.dataset, name, row.shots, f"{row.mean:.1f}{spread}", *cells])
    columns = [
        *KEYS,
        "ours",
        "published",
        "source (evidence)",
        "difference",
        "95 % prediction",
        "verdict",
    ]
    return pd.DataFrame(rows, columns=columns)


def pipes(header, rows):
    """A Markdown table."""
    return "\n".join(
        "| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]
    )


def to_latex(summary):
    r"""The wide table as a LaTeX tabular for \usepackage{booktabs}."""
    special = str.maketrans(
        {
            "_": r"\_",
            "%": r"\%",
            "&": r"\&",
            "±": r"$\pm$",
            "†": r"$^\dagger$",
            "ε": r"$\varepsilon$",
        }
    )
    table = (
        wide(summary, best=r"\textbf{{{}}}")
        .reset_index()
        .map(lambda cell: str(cell).translate(special))
    )
    return table.rename(columns=lambda name: name.translate(special)).to_latex(
        index=False, escape=False
    )


def write(results, folder, title, notes):
    """Write table.csv (the summary), overall.csv, table.md and table.tex into folder, each whole or not at all.

    Returns the paths by name.

    overall.csv and its part of table.md need a complete set of ICL results and are left out without one.
    """
    folder, table = Path(folder), summary(results)
    texts = {"table.csv": table.to_csv(index=False, float_format="%.4f")}
    try:
        means = overall(results)
        texts["overall.csv"] = means.to_csv(index=False, float_format="%.4f")
        notes = [
            *notes,
            "Means over shots and seeds; the difference is paired within seeds, with its 95 % interval.",
            *(
                f"{model}:\n\n{pipes(*overall_rows(rows))}"
                for model, rows in means.groupby("model")
            ),
        ]
    except ValueError:
        pass
    texts |= {"table.md": to_markdown(table, title, notes), "table.tex": to_latex(table)}
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return {name: folder / name for name in texts}


def _starred(table):
    """The table with arbitrary-label variants named dataset*; set_cls has no other labels and keeps its name."""
    star = (table.labels == "arbitrary") & (table.dataset != "set_cls")
    return table.assign(dataset=table.dataset.where(~star, table.dataset + "*"))


def _ordered(rows, columns):
    """A table with the methods next to each other: they are what one compares."""
    order = [name for name in ("model", "dataset", "shots", "method") if name in columns]
    return pd.DataFrame(rows, columns=columns).sort_values(order, key=_rank, ignore_index=True)


def _rank(column):
    """Sort key: datasets (those with * last) and methods in reading order, unknown ones after, all else by value."""
    order = {"dataset": DATASETS, "method": list(METHODS)}.get(column.name)
    place = {name: f"{i:02d}" for i, name in enumerate(order or [])}
    return (
        column.map(lambda x: f"{x.endswith('*'):d}{place.get(x.rstrip('*'), x)}")
        if order
        else column
    )

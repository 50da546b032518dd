"""Results -> tables: frame (cells) -> summary (mean, uncertainty) -> wide (what people read); paired beside it.

Accuracies are fractions in the results and in `frame`, percent from `summary` on, percentage points in `paired`.
`score` says which accuracy a table is about, the "raw" or the "calibrated" one. Errors are `MiniCPTError`.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from ..data import TASKS as DATASETS
from ..errors import MiniCPTError, warn
from ..methods.registry import METHODS
from .published import KEYS, load_published
from .statistics import interval, one_more, signed

TITLES = {slug: method.title for slug, method in METHODS.items()}  # in reading order
CELL = ["model", "dataset", "labels", "method", "shots", "seed"]  # one result
PLACE = ["model", "dataset", "labels", "shots", "seed"]  # where methods meet on one split
ACCURACY = {"raw": "accuracy", "calibrated": "accuracy_calibrated"}
OTHER = {"raw": "calibrated", "calibrated": "raw"}
KINDS = ["results_version", "task_sha256"]  # what one dataset's results must share
LOG_SCORES = {"raw": "log_scores", "calibrated": "log_scores_calibrated"}


def frame(results: Sequence[dict]) -> pd.DataFrame:
    """One row a result: CELL, data, accuracy, accuracy_calibrated, split_sha256, seconds.

    Accuracies are fractions; seconds is fitting plus scoring. Refuses no result at all, and two results of the same
    cell (two learning rates, say): averaged as if they were two seeds they would narrow the interval. Warns where a
    dataset's results come from different versions of our arithmetic, or of the task.
    """
    if not results:
        raise MiniCPTError(
            "There are no results to tabulate: compute some cells first, or check the results folder."
        )
    table, measured = _places(results), ["accuracy", "accuracy_calibrated", "split_sha256"]
    table[measured] = pd.DataFrame(results, columns=measured)
    table["seconds"] = [result["seconds"]["fit"] + result["seconds"]["score"] for result in results]
    twice = table[table.duplicated(CELL)]
    if len(twice):
        cell = twice[CELL].iloc[0]
        there = (table[CELL] == cell).all(axis=1)
        one, other, *_ = [results[i]["config"] for i in table.index[there]]
        differ = [name for name in one | other if one.get(name) != other.get(name)]
        raise MiniCPTError(
            f"There are two results for the cell {cell.to_dict()}; their configurations differ in "
            f"{', '.join(differ) or 'nothing'}. Keep the results of one table and one setting."
        )
    kinds = pd.DataFrame([result["config"] for result in results], columns=["dataset", *KINDS])
    mixed = kinds.groupby("dataset").nunique(dropna=False).gt(1).any(axis=1)
    if mixed.any():
        warn(
            f"Results of different kinds stand side by side for {', '.join(mixed.index[mixed])}: they differ in "
            f"{' or '.join(KINDS)}, so they do not compare. Run the same command again; it computes the older ones."
        )
    table = table.astype({"accuracy_calibrated": float})
    return table.sort_values(CELL, key=_rank, ignore_index=True)


def _places(results: Sequence[dict]) -> pd.DataFrame:
    """CELL and data of every result. Models of one name and different weights are told apart by their fingerprints."""
    names = [*CELL, "data", "model_fingerprint"]
    table = pd.DataFrame([result["config"] for result in results], columns=names)
    weights = table.pop("model_fingerprint").astype(object).fillna("").astype(str)
    several = weights.groupby(table.model).transform("nunique") > 1
    table["model"] = table.model.mask(several, table.model + " (" + weights.str[:8] + ")")
    return table


def check_splits(table: pd.DataFrame, by: str = "method") -> None:
    """Refuse results that stand at one PLACE and saw different splits: their difference would be one of luck, too."""
    apart = table[table.groupby(PLACE).split_sha256.transform("nunique") > 1]
    if len(apart):
        place = apart[PLACE].iloc[0]
        there = apart[(apart[PLACE] == place).all(axis=1)]
        odd = there[there.split_sha256 != there.split_sha256.mode()[0]]
        raise MiniCPTError(
            f"{', '.join(odd[by])} saw another split than the others at {place.to_dict()}: recompute the older results."
        )


def summary(
    results: Sequence[dict], published: dict | None = None, score: str = "raw"
) -> pd.DataFrame:
    """One row a (model, dataset, method, shots), in percent, with the published number beside ours where there is one.

    Columns: model, dataset, method, shots, mean, std, ci_low, ci_high, n_seeds, reported, reported_source, and last the
    mean of the other score under its name, "calibrated" or "raw". `published` is what `load_published` returns. A
    trailing * on a dataset means arbitrary labels: another task than the published one, so nothing is reported there.
    """
    known = {}
    for cell in (published or load_published())["cells"]:
        known[tuple(cell[key] for key in KEYS)] = cell
    rows = []
    for (*keys, labels), group in _starred(frame(results)).groupby([*KEYS, "labels"]):
        reported = math.nan, ""
        # a micro task of that name is another task
        real = labels == "canonical" and (group["data"] == "real").all()
        if real and tuple(keys) in known:
            cell = known[tuple(keys)]
            reported = cell["value"], f"{cell['source']} ({cell['evidence']})"
        other = 100 * group[ACCURACY[OTHER[score]]].mean()
        rows.append([*keys, *interval(100 * group[ACCURACY[score]]), len(group), *reported, other])
    columns = "mean std ci_low ci_high n_seeds reported reported_source".split()
    return _ordered(rows, [*KEYS, *columns, OTHER[score]])


def paired(results: Sequence[dict], baseline: str = "icl", score: str = "raw") -> pd.DataFrame:
    """Mean accuracy difference to the baseline on the same seeds, in percentage points, with its 95 % interval.

    Columns: model, dataset, method, shots, difference, std, ci_low, ci_high, n (seeds both have). Pairing removes what
    the splits share, so it sees differences that two separate intervals hide. Zero-shot has no split: it is left out.
    Refuses a method that has no seed in common with the baseline, and two splits for one seed.
    """
    table = frame(results)
    table = table[table.method != "zero"].rename(columns={ACCURACY[score]: "own"})
    check_splits(table)
    is_base = table.method == baseline
    base = table.loc[is_base, [*PLACE, "own"]].rename(columns={"own": "base"})
    both = _starred(table[~is_base].merge(base, on=PLACE, how="left"))
    pairs = both.groupby(KEYS).base.count()
    if both.empty or not pairs.all():
        where = f"as {' / '.join(map(str, pairs.idxmin()))}" if len(pairs) else "as another method"
        raise MiniCPTError(
            f"There is no {baseline!r} result on the same seeds {where}: compute it, or leave the method out."
        )
    both["difference"] = 100 * (both.own - both.base)
    rows = []
    for keys, group in both.dropna(subset="base").groupby(KEYS):
        rows.append([*keys, *interval(group.difference), len(group)])
    return _ordered(rows, [*KEYS, "difference", "std", "ci_low", "ci_high", "n"])


def shared_seeds(cells: pd.DataFrame, baseline: str = "icl") -> set[int]:
    """The seeds that all cells of the baseline have, of one model's rows of `frame`; none where it lacks a dataset."""
    own, tasks = cells[cells.method == baseline], ["dataset", "labels"]
    if own.groupby(tasks).ngroups < cells.groupby(tasks).ngroups:
        return set()
    return set.intersection(*own.groupby([*tasks, "shots"]).seed.agg(set))


def overall(results: Sequence[dict], baseline: str = "icl", score: str = "raw") -> pd.DataFrame:
    """One row a method: mean accuracy per dataset and over all, and the paired difference to the baseline, in percent.

    Columns: model, method, a column a dataset (mean over shots and seeds), mean, difference, ci_low, ci_high, n. The
    difference is taken within a seed after averaging shots, then datasets; its 95 % interval is over n seeds: those
    that the baseline has for every dataset. `mean` and `difference` are over the datasets without * where there are
    any. Methods that lack a cell the baseline has are left out; zero-shot stands for every number of shots. Refuses two
    splits for one seed, and results without a complete set of the baseline's.
    """
    table, rows = frame(results), []
    check_splits(table)
    for model, cells in _starred(table).groupby("model"):
        seeds = shared_seeds(cells, baseline)
        if not seeds:
            raise MiniCPTError(
                f"There is no complete set of {baseline!r} results for {model}: compute them first."
            )
        datasets = list(cells.dataset.sort_values(key=_rank).unique())
        places = cells[cells.method == baseline].groupby(["dataset", "shots"]).ngroups
        means = {}  # method -> (seed, dataset), averaged over shots
        for method, group in cells[cells.seed.isin(seeds)].groupby("method"):
            if len(group) == len(seeds) * (len(datasets) if method == "zero" else places):
                by_seed = group.groupby(["seed", "dataset"])[ACCURACY[score]].mean().unstack()
                means[method] = 100 * by_seed[datasets]
        plain = _plain(datasets) or datasets
        for method, mean in means.items():
            per_seed = mean[plain].mean(axis=1)
            gap, _, low, high = interval(per_seed - means[baseline][plain].mean(axis=1))
            rows.append([model, method, *mean.mean(), per_seed.mean(), gap, low, high, len(seeds)])
    columns = ["mean", "difference", "ci_low", "ci_high", "n"]
    return _ordered(rows, ["model", "method", *datasets, *columns])


def answers(results: Sequence[dict], score: str = "raw") -> pd.DataFrame:
    """How often each class is answered, in percent: a row an answer of each (model, dataset, method, shots).

    Columns: model, dataset, method, shots, answer (a class), answered (share of the queries), truth (share of the
    queries whose class it is), constant (share of the seeds in which every query gets this answer), n_seeds. Results
    without scores (`Store.refill`) are left out.
    """
    rows = []
    for place, result in zip(_places(results).to_dict("records"), results):
        if LOG_SCORES[score] not in result:
            continue
        answered, truth = np.argmax(result[LOG_SCORES[score]], axis=1), np.array(result["truth"])
        for i, name in enumerate(result["verbalizers"]):
            always = (answered == i).all()
            shares = (answered == i).mean(), (truth == i).mean(), always
            rows.append([*place.values(), name, *shares])
    shares = ["answered", "truth", "constant"]
    table = _starred(pd.DataFrame(rows, columns=[*CELL, "data", "answer", *shares]))
    groups = table.astype(dict.fromkeys(shares, float)).groupby([*KEYS, "answer"], sort=False)
    means = (100 * groups[shares].mean()).assign(n_seeds=groups.size()).reset_index()
    return _ordered(means, means.columns)


def overall_rows(table: pd.DataFrame, baseline: str = "icl") -> tuple[list[str], list[list[str]]]:
    """The rows of `overall` as people read them: header and cells, the difference with its interval."""
    means = list(table.columns[2:-4])
    rows = []
    for row in table.to_dict("records"):
        gap = signed(row["difference"], row["ci_low"], row["ci_high"])
        if row["method"] == baseline:
            gap = ""
        rows.append([title(row["method"]), *(f"{row[name]:.1f}" for name in means), gap])
    return ["method", *means, f"minus {TITLES[baseline]} [95 %]"], rows


def wide(summary: pd.DataFrame, best: str = "**{}**", other: str = "") -> pd.DataFrame:
    """The table people read: rows (model, shots, method), a column a dataset, cells "61.2 ±4.1" (mean ± std, percent).

    The best mean of a column within one model and number of shots is wrapped in `best`, ties to the shown decimal too.
    `mean` averages the datasets without * and stays empty where a method misses one. Zero-shot stands alone at shots 0.
    `other` names a column of `summary` whose value follows after a slash.
    """
    table = summary.pivot(index=["model", "shots", "method"], columns="dataset")
    table = table.sort_index(key=_rank)
    means = _averaged(table["mean"])
    shown = means.map(lambda mean: float(f"{mean:.1f}"))
    rivals = shown.groupby(level=["model", "shots"])
    is_best = shown.eq(rivals.transform("max")) & (rivals.transform("count") > 1)
    cells = _cells(means, "{:.1f}") + _cells(table["std"].reindex_like(means), " ±{:.1f}")
    cells = cells.mask(is_best, cells.map(best.format))
    if other:
        cells += _cells(_averaged(table[other]), " / {:.1f}")
    return cells.rename_axis(columns=None).rename(index=title, level="method")


def _averaged(means: pd.DataFrame) -> pd.DataFrame:
    """The datasets in reading order, and the mean of those without *."""
    means = means.sort_index(axis=1, key=_rank)
    plain = _plain(means)
    if len(plain) > 1:
        means.insert(len(plain), "mean", means[plain].mean(axis=1, skipna=False))
    return means


def _cells(numbers: pd.DataFrame, form: str) -> pd.DataFrame:
    return numbers.map(lambda number: "" if math.isnan(number) else form.format(number))


def beside(summary: pd.DataFrame, published: dict | None = None) -> pd.DataFrame:
    """Ours beside the published number, all cells of the models that have one: what people read, as strings.

    Columns: model, dataset, method, shots, ours (mean ±std [95 % interval of the mean]), published, source (evidence),
    difference, 95 % prediction, verdict. An anchor, which is a baseline's number from a study other than the
    reproduced one, is only a check of our own baseline: outside the interval it is flagged as such.
    """
    sources = (published or load_published())["sources"]
    models = summary[summary.reported.notna()].model
    rows = []
    for row in summary[summary.model.isin(models)].itertuples():
        ours = f"{row.mean:.1f}"
        if not math.isnan(row.std):
            ours += f" ±{row.std:.1f} [{row.ci_low:.1f}, {row.ci_high:.1f}]"
        cells = ["", "", "", "", "no published number"]
        if not math.isnan(row.reported):
            anchor = sources[row.reported_source.split(" (")[0]].get("anchor")
            difference = f"{row.mean - row.reported:+.1f}"
            cells = [f"{row.reported:.2f}", row.reported_source, difference, *_verdict(row, anchor)]
        rows.append([row.model, row.dataset, title(row.method), row.shots, ours, *cells])
    columns = ["ours", "published", "source (evidence)", "difference", "95 % prediction", "verdict"]
    return pd.DataFrame(rows, columns=[*KEYS, *columns])


def _verdict(row, anchor: bool | None) -> tuple[str, str]:
    low, high = one_more(row.mean, row.std, row.n_seeds)
    if math.isnan(low):
        return "-", "one seed: no verdict"
    verdict = "inside"
    if not low <= row.reported <= high:
        verdict = "ours is higher" if row.reported < low else "ours is lower"
        if anchor:
            verdict += ": check the baseline (anchor)"
    return f"{max(low, 0):.1f} to {min(high, 100):.1f}", verdict


def pipes(header: Iterable, rows: Iterable[Iterable]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def title(method: str) -> str:
    """What a method is called in tables; a reader's own keeps its name."""
    return TITLES.get(method, method)


def _plain(datasets: Iterable[str]) -> list[str]:
    return [name for name in datasets if not name.endswith("*")]


def _starred(table: pd.DataFrame) -> pd.DataFrame:
    """The table with arbitrary-label variants named dataset*; set_cls has no other labels and keeps its name."""
    star = (table.labels == "arbitrary") & (table.dataset != "set_cls")
    return table.assign(dataset=table.dataset.where(~star, table.dataset + "*"))


def _ordered(rows: Sequence | pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A table with the methods next to each other: they are what one compares."""
    order = [name for name in ("model", "dataset", "shots", "method") if name in columns]
    return pd.DataFrame(rows, columns=columns).sort_values(order, key=_rank, ignore_index=True)


def _rank(column):
    """Sort key: datasets (those with * last) and methods in reading order, unknown ones after, all else by value."""
    order = {"dataset": DATASETS, "method": list(METHODS)}.get(column.name)
    if not order:
        return column
    place = {name: f"{i:02d}" for i, name in enumerate(order)}
    return column.map(lambda x: f"{x.endswith('*'):d}{place.get(x.rstrip('*'), x)}")

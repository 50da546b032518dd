"""The experiments nobody has reported: CPT with one decision changed at a time, on the same splits.

    python -m minicpt ablations --seeds 10 --workers 2

A variant is a method with other hyper-parameters, so its cells live in a store like all others and are computed once;
`assets/ablations.json` lists them. `compare` pairs every variant with plain CPT seed by seed; `copy_probe` asks how
much of Set Classification is copying.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ..data import ASSETS, load_task, make_split
from ..errors import MiniCPTError, unknown
from ..methods.registry import hyperparameters
from ..pictures import save
from . import cells
from .cells import Cell
from .figures import difference_to_cpt
from .statistics import holm, interval, signed
from .store import Store, export, write_all
from .tables import PLACE, check_splits, pipes

PROBE_TASK = "set_cls"  # its texts are content words alone, so that a shared word means something
Results = dict[str, list[dict]]  # by variant


@dataclass(frozen=True)
class Variant:
    """A method with other hyper-parameters, the question it answers, and the variant it differs from in one thing."""

    name: str
    question: str
    method: str
    against: str
    meaning: str
    hp: dict = field(default_factory=dict)


def variants(model: str = "micro") -> dict[str, Variant]:
    """All variants by name, in reading order; radii are in the unit of CPT's own on that model."""
    cpt = hyperparameters("cpt", model)
    known = {}
    for row in json.loads((ASSETS / "ablations.json").read_text(encoding="utf-8"))["variants"]:
        taken = {name: cpt[name] for name in row.pop("cpts", [])}
        row |= {"meaning": row["meaning"].format(**cpt), "hp": row["hp"] | taken}
        known[row["name"]] = Variant(**row)
    return known


def grid(
    names: Iterable[str] = (),
    datasets: Iterable[str] = (),
    shots: Iterable[int] = (4,),
    seeds: Iterable[int] = range(10),
    **kwargs,
) -> dict[str, list[Cell]]:
    """The cells of the named variants (none named: all) and of those they are compared with, by variant."""
    known = variants(kwargs.get("model", "micro"))
    wanted = {"cpt"}
    for name in names or known:
        if name not in known:
            raise unknown("variant", name, known)
        wanted |= {name, known[name].against}
    shots, seeds = list(shots), list(seeds)
    groups = {}
    for name, v in known.items():
        if name in wanted:
            hp = tuple(v.hp.items())
            groups[name] = cells.grid(datasets, [v.method], shots, seeds, hp=hp, **kwargs)
    return groups


def collect(cells: dict[str, list[Cell]], store: Store) -> Results:
    """The results of every variant that is complete. Raises `MiniCPTError` without those of plain CPT."""
    results = {name: [store.get(cell) for cell in group] for name, group in cells.items()}
    complete = {name: group for name, group in results.items() if all(group)}
    if "cpt" not in complete:
        raise MiniCPTError(
            "Plain CPT is incomplete in this store, and every variant is compared with it: see the "
            "*.error.json files, or run the same command again."
        )
    return complete


def with_scores(results: Results) -> Results:
    """The variants whose every result has scores and a history, which those taken from a CSV lack."""
    return {name: group for name, group in results.items() if all("log_scores" in r for r in group)}


def compare(results: Results) -> pd.DataFrame:
    """One row a variant, in percent and percentage points, paired over the seeds.

    Columns: question, variant, meaning, a column a dataset, mean, difference (to plain CPT), ci_low, ci_high, p
    (paired t test), holm (p adjusted for all variants of the table), against, gap, gap_low, gap_high (the same
    difference to the variant named in `against`, where that is not CPT), n. Tasks and shots are averaged within a
    seed first. Raises `MiniCPTError` if two variants saw different splits.
    """
    found = []
    for name, group in results.items():
        found += [{**result, **result["config"], "variant": name} for result in group]
    table = pd.DataFrame(found, columns=["variant", *PLACE, "accuracy", "split_sha256"])
    table["accuracy"] *= 100
    check_splits(table, by="variant")
    by_task = table.groupby(["variant", "seed", "dataset"], sort=False).accuracy.mean().unstack()
    by_task = by_task[list(dict.fromkeys(table.dataset))]
    by_seed = by_task.mean(axis=1).unstack()  # variant, seed
    rows = []
    for name, v in variants(table.model[0]).items():
        if name not in results:
            continue
        difference = by_seed.loc[name] - by_seed.loc["cpt"]
        mean, _, low, high = interval(difference)
        against = v.against if v.against != "cpt" and v.against in results else ""
        gap = gap_low = gap_high = np.nan
        if against:
            gap, _, gap_low, gap_high = interval(by_seed.loc[name] - by_seed.loc[against])
        p = np.nan if name == "cpt" else _p_value(difference.to_numpy())
        means = [*by_task.loc[name].mean(), by_seed.loc[name].mean()]
        tests = [mean, low, high, p, np.nan, against, gap, gap_low, gap_high, len(difference)]
        rows.append([v.question, name, v.meaning, *means, *tests])
    tests = "difference ci_low ci_high p holm against gap gap_low gap_high n".split()
    columns = ["question", "variant", "meaning", *by_task.columns, "mean", *tests]
    compared = pd.DataFrame(rows, columns=columns)
    return compared.assign(holm=holm(compared.p))


def _p_value(difference: np.ndarray) -> float:
    """Of a paired t test."""
    if len(difference) == 1:
        return np.nan
    if np.ptp(difference) == 0:
        return float(difference[0] == 0)  # 1: the same thing
    return stats.ttest_1samp(difference, 0).pvalue


def reading(table: pd.DataFrame) -> list[str]:
    """What the table says, in sentences made from its numbers."""
    others = table[table.variant != "cpt"].sort_values("difference")
    sure = others.holm < 0.05
    lone = ~sure & ((others.ci_low > 0) | (others.ci_high < 0))

    def listed(chosen: pd.Series) -> str:
        rows = others[chosen].itertuples()
        return ", ".join(f"{row.variant} ({row.difference:+.1f})" for row in rows) or "none"

    n = len(others)
    return [
        f"Lower than plain CPT, also after Holm's correction for {n} comparisons: "
        f"{listed(sure & (others.difference < 0))}.",
        f"Higher than plain CPT after that correction: {listed(sure & (others.difference > 0))}.",
        f"Interval without 0, but not after the correction (of {n} intervals about {0.05 * n:.0f} "
        f"would miss 0 by chance): {listed(lone)}.",
        f"Not separable from plain CPT: {listed(~sure & ~lone)}.",
    ]


# ---- the copy probe -------------------------------------------------------------------------------------------------


def copy_probe(results: Results) -> pd.DataFrame:
    """Accuracy (percent) on queries with and without a word of the context, a row a variant; "copy" copies only.

    Columns: variant, all, shared, new (means over seeds), shared_minus_icl and new_minus_icl with their intervals as
    text, queries_shared (share of the queries with a word of the context). "copy" answers with the label of the
    example that shares most words with the query, and guesses among the context's labels where none or several do.
    Empty without results of the embedded PROBE_TASK; variants with results from a CSV are left out.
    """
    rows = []
    task = load_task(PROBE_TASK)
    for variant, group in with_scores(results).items():
        for result in group:
            config = result["config"]
            if config["task_sha256"] != task.sha256:
                continue
            drawn = (config[key] for key in ("shots", "seed", "n_test", "labels", "per_class"))
            split = make_split(task, *drawn)
            if split.sha256 != result["split_sha256"]:
                raise MiniCPTError(
                    f"The split of {variant}, seed {config['seed']}, cannot be drawn again: recompute it."
                )
            words = [set(text.split()) for text, _ in split.shots]
            overlap = np.array([[len(w & set(q.split())) for w in words] for q, _ in split.queries])
            truth, shared = np.array(result["truth"]), overlap.any(axis=1)
            right = {variant: np.argmax(result["log_scores"], axis=1) == truth}
            if variant == "icl":
                labels = np.array([split.classes.index(label) for _, label in split.shots])
                best = overlap == overlap.max(axis=1, keepdims=True)  # all where nothing is shared
                right["copy"] = (best * (labels == truth[:, None])).sum(axis=1) / best.sum(axis=1)
            for name, hits in right.items():
                parts = hits.mean(), hits[shared].mean(), hits[~shared].mean(), shared.mean()
                rows.append([name, config["seed"], *parts])
    parts = ["all", "shared", "new", "queries_shared"]
    table = pd.DataFrame(rows, columns=["variant", "seed", *parts])
    by_seed = 100 * table.groupby(["variant", "seed"], sort=False).mean()
    means = by_seed.groupby("variant", sort=False).mean()
    for part in ("shared", "new") if "icl" in means.index else ():
        gaps = by_seed[part].unstack() - by_seed.loc["icl", part]
        intervals = [interval(gaps.loc[name]) for name in means.index]
        means[f"{part}_minus_icl"] = [signed(mean, low, high) for mean, _, low, high in intervals]
    return means.reset_index()


def twin_losses(results: Results) -> dict[str, float]:
    """Cross-entropy of a label before any training: its example in the context, hidden there, and a real query's."""
    found, results = {}, with_scores(results)
    for what, name in (("twin visible", "train_label"), ("twin hidden", "loo_train_label")):
        found[what] = [result["history"]["loss"][0] for result in results.get(name, [])]
    found["a query"] = []
    for result in results.get("icl", []):
        right = [row[label] for row, label in zip(result["log_scores"], result["truth"])]
        found["a query"].append(-np.mean(right))
    return {what: float(np.mean(values)) for what, values in found.items() if values}


# ---- files ----------------------------------------------------------------------------------------------------------


def rows_to_read(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the comparison as people read them; bold: separable after Holm's correction."""
    rows = []
    for row in table.itertuples():
        gap = signed(row.difference, row.ci_low, row.ci_high) if row.variant != "cpt" else ""
        if row.holm < 0.05:
            gap = f"**{gap}**"
        own = signed(row.gap, row.gap_low, row.gap_high)
        if own:
            own = f"{row.against}: {own}"
        rows.append([row.question, row.variant, row.meaning, f"{row.mean:.1f}", gap, own])
    header = "question,variant,what it is,mean,minus CPT [95 %],minus its own baseline"
    return header.split(","), rows


def to_markdown(
    table: pd.DataFrame, probe: pd.DataFrame, losses: dict[str, float], title: str
) -> str:
    """The comparison, its reading and the copy probe in Markdown."""
    parts = [
        f"# {title}",
        f"Mean accuracy in percent over tasks and shots; differences in points, paired over "
        f"{table.n.max()} seeds; bold: separable from plain CPT after Holm's correction.",
        pipes(*rows_to_read(table)),
        *reading(table),
    ]
    if len(probe):
        parts += [
            f"## Copy probe ({PROBE_TASK})",
            "Queries with a word of the context (`shared`) and without (`new`).",
            pipes(probe.columns, probe.round(1).to_numpy()),
        ]
    if losses:
        said = ", ".join(f"{what} {value:.2f}" for what, value in losses.items())
        parts += [f"Mean cross-entropy of a label before training: {said}."]
    return "\n\n".join(parts) + "\n"


def write(results: Results, folder: str | Path, title: str) -> dict[str, Path]:
    """Write ablations.csv, copy_probe.csv, ablations.md, ablations.png and cells.csv; return their paths.

    cells.csv lists the methods as chosen, without the variants of their hyper-parameters.
    """
    folder, table, probe = Path(folder), compare(results), copy_probe(results)
    as_chosen = [group for name, group in results.items() if not variants()[name].hp]
    files = {
        "cells.csv": export(chain.from_iterable(as_chosen)),
        "ablations.csv": table.to_csv(index=False, float_format="%.4f"),
        "ablations.md": to_markdown(table, probe, twin_losses(results), title),
    }
    if len(probe):
        files["copy_probe.csv"] = probe.to_csv(index=False, float_format="%.4f")
    paths = write_all(folder, files)
    return paths | {"figure": save(difference_to_cpt(table), folder / "ablations.png")}

"""Results -> figures: one function a figure, each returns a matplotlib Figure; `save` writes it as a small PNG.

Colours are Okabe and Ito's, which colour-blind readers tell apart; a method keeps its colour in every figure, and the
variant with an instruction (†) is the same colour, dashed, with an open marker. Errors are `MiniCPTError`.
"""

from __future__ import (
    annotations,
)  # `Figure` stands in annotations alone: matplotlib is loaded where something is drawn

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..errors import MiniCPTError
from ..pictures import COLOURS, GREY, panels_of
from .tables import TITLES, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, BAND = "#0072B2", "#F4F4F4"


def accuracy_by_shots(summary: pd.DataFrame) -> Figure:
    """Accuracy (%) for each number of shots, methods side by side, one panel per dataset, bars the 95 % interval of the
    mean; zero-shot is the dotted line.

    `summary`: the rows of one model (tables.summary); several are refused.
    """
    _one(summary[["model"]])
    datasets, methods = list(summary.dataset.unique()), _in_order(summary.method)
    columns = min(len(datasets), 3 if len(datasets) < 6 else 5)
    figure, panels = panels_of(
        len(datasets), columns, max(3.4, 7 / columns), 3, sharex=True, sharey=True
    )
    numbers = sorted(set(summary.shots) - {0})
    dodged, found = [method for method in methods if method != "zero"], {}
    for panel, dataset in zip(panels, datasets):
        rows = summary[summary.dataset == dataset]
        for method, group in rows.groupby("method"):
            if method == "zero":
                found[method] = panel.axhline(group["mean"].iloc[0], color=GREY, linestyle=":")
                continue
            aside = dodged.index(method) - (len(dodged) - 1) / 2
            x = group.shots.map(numbers.index) + aside * min(0.12, 0.7 / len(dodged))
            bars = np.nan_to_num([group["mean"] - group.ci_low, group.ci_high - group["mean"]])
            lines = {"elinewidth": 0.9, "linewidth": 1.4}
            found[method] = panel.errorbar(x, group["mean"], bars, **lines, **_look(method))
        panel.set(title=dataset, xlabel="shots", ylim=(0, 108))  # intervals may end above 100
        panel.set_xticks(range(len(numbers)), numbers)
        panel.tick_params(labelbottom=True, labelleft=True)
        panel.grid(axis="y", alpha=0.3)
    handles = [found[method] for method in methods]
    names = [title(method) for method in methods]
    figure.legend(handles, names, loc="outside upper center", ncols=6, frameon=False)
    figure.supylabel("accuracy (%)")
    return figure


def difference_to_icl(paired: pd.DataFrame) -> Figure:
    """Forest plot of each method minus ICL on the same seeds: percentage points with 95 % interval, a line at zero.

    `paired`: the rows of one model (tables.paired); several are refused. A panel a dataset, a block a shot count.
    """
    _one(paired[["model"]])
    datasets, methods = list(paired.dataset.unique()), _in_order(paired.method)
    shots = sorted(set(paired.shots))
    block = len(methods) + 1
    rows = {}
    for i, k in enumerate(shots):
        for j, method in enumerate(methods):
            rows[k, method] = -(i * block + j)
    height = 0.21 * (len(rows) + len(shots)) + 1.2
    figure, panels = panels_of(len(datasets), 5, 2.6, height, sharex=True, sharey=True)
    # every interval is seen whole, but for the endless ones of two or three seeds
    widest = paired[["difference", "ci_low", "ci_high"]].abs().max().max()
    reach = min(1.05 * widest, 1.15 * paired.difference.abs().max() + 25)
    for panel, dataset in zip(panels, datasets):
        _forest(panel)
        for row in paired[paired.dataset == dataset].itertuples():
            _bar(panel, row, rows[row.shots, row.method], **_look(row.method))
        panel.set_title(dataset)
        panel.set_xlim(-reach, reach)
        panel.set_yticks(list(rows.values()), [title(method) for _, method in rows])
        panel.tick_params(axis="x", labelbottom=True)
        for i, k in enumerate(shots):
            top = -i * block
            panel.axhspan(top + 0.5, top - block + 1.5, color=BAND, zorder=0)
            _beside(panel, 0.02, top + 0.55, f"{k} shots", "bottom")
    panels[0].set_ylim(-len(shots) * block + 1, 1.6)
    figure.supxlabel("accuracy difference to ICL (percentage points)")
    return figure


def difference_to_cpt(table: pd.DataFrame) -> Figure:
    """Forest plot of every variant minus plain CPT (ablations.compare): points with 95 % interval, a block a question.

    Filled: separable from zero after the correction for many comparisons; open: not.
    """
    rows = table[table.variant != "cpt"]
    new_block = (rows.question != rows.question.shift()).cumsum()
    y = -(np.arange(len(rows)) + 1.0 * new_block.to_numpy())
    figure, (panel,) = panels_of(1, 1, 7.6, 0.21 * (len(rows) + new_block.max()) + 1)
    _forest(panel)
    for at, row in zip(y, rows.itertuples()):
        face = BLUE if row.holm < 0.05 else "white"
        _bar(panel, row, at, color=BLUE, marker="o", markersize=5, markerfacecolor=face)
    for question, block in rows.assign(y=y).groupby("question"):
        _beside(panel, 0.01, block.y.max() + 0.6, question, "center")
        panel.axhspan(block.y.min() - 0.5, block.y.max() + 0.3, color=BAND, zorder=0)
    panel.set_yticks(y, rows.variant, fontsize=8)
    panel.set_ylim(y.min() - 0.8, y.max() + 1.2)
    panel.set_xlabel("accuracy difference to plain CPT (percentage points)")
    return figure


def training_curves(results: Iterable[dict]) -> Figure:
    """Loss against step (log scale), a panel a trained method: a thin line a seed, the mean over seeds thick.

    `results`: of one model, dataset and number of shots, with history.loss; a mixture or none trained is refused.
    """
    trained = [result for result in results if result.get("history", {}).get("loss")]
    if not trained:
        raise MiniCPTError(
            "No result has a history of losses: zero-shot and ICL do not train. Pass a trained method."
        )
    task = _one(_settings(trained, "model", "dataset", "labels", "shots"))
    by_method = _by_method(trained)
    figure, panels = panels_of(len(by_method), 4, 3.0, 2.6, sharex=True, sharey=True)
    for panel, (method, group) in zip(panels, by_method.items()):
        losses = [result["history"]["loss"] for result in group]
        shortest = min(map(len, losses))
        mean = np.mean([loss[:shortest] for loss in losses], axis=0)
        colour = _look(method)["color"]
        for loss in losses:
            panel.plot(range(1, len(loss) + 1), loss, color=colour, alpha=0.3, linewidth=0.8)
        panel.plot(range(1, shortest + 1), mean, color=colour, linewidth=2)
        panel.set_title(f"{title(method)} (seeds: {len(losses)})")
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.tick_params(labelbottom=True, labelleft=True)
    figure.suptitle("{model}, {dataset}, {labels} labels, {shots} shots".format(**task))
    figure.supxlabel("step")
    figure.supylabel("training loss")
    return figure


def loss_by_shots(results: Iterable[dict]) -> Figure:
    """Cross-entropy at the label (log scale) against shots: queries solid, the shots themselves dashed; seeds averaged.

    The paper's Figure 1. `results`: of one model, dataset and kind of labels, with `loss`; a mixture is refused.
    """
    results = [result for result in results if result["config"]["shots"] and "loss" in result]
    task = _one(_settings(results, "model", "dataset", "labels"))
    figure, (panel,) = panels_of(1, 1, 6.4, 4)
    for method, group in _by_method(results).items():
        look = {**_look(method), "markersize": 4}
        for kind, line, label in (("test", "-", title(method)), ("train", "--", None)):
            losses = pd.Series([result["loss"][kind] for result in group])
            means = losses.groupby([result["config"]["shots"] for result in group]).mean()
            panel.plot(means.index, means, **{**look, "linestyle": line}, label=label)
    panel.set(yscale="log", xlabel="examples", ylabel="cross-entropy at the label")
    panel.set_xticks(means.index)
    panel.set_title("{model}, {dataset}, {labels} labels".format(**task), fontsize=10)
    panel.grid(alpha=0.3)
    panel.plot([], [], color=GREY, linestyle="-", label="queries (test)")
    panel.plot([], [], color=GREY, linestyle="--", label="the examples (train)")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _forest(panel) -> None:
    """What panels of differences have in common."""
    panel.axvline(0, color="black", linewidth=1)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", alpha=0.3)


def _bar(panel, row, y: float, **look) -> None:
    """A difference with its interval."""
    reach = np.nan_to_num([[row.difference - row.ci_low], [row.ci_high - row.difference]])
    panel.errorbar(row.difference, y, xerr=reach, **look)


def _beside(panel, x: float, y: float, text: str, va: str) -> None:
    """The name of a block, x from the panel's left edge."""
    panel.text(x, y, text, transform=panel.get_yaxis_transform(), fontsize=8, va=va)


def _look(method: str) -> dict:
    """Colour, line and marker of a method, as keywords for errorbar."""
    plain = method.removesuffix("_instr")
    colour = COLOURS.get(plain, BLUE)
    return {
        "color": colour,
        "marker": "o",
        "markersize": 5,
        "linestyle": "-" if plain == method else "--",
        "markerfacecolor": colour if plain == method else "white",
    }


def _in_order(methods: Iterable[str]) -> list[str]:
    methods = set(methods)
    return [method for method in TITLES if method in methods] + sorted(methods - TITLES.keys())


def _by_method(results: Sequence[dict]) -> dict[str, list[dict]]:
    groups = {method: [] for method in _in_order(r["config"]["method"] for r in results)}
    for result in results:
        groups[result["config"]["method"]].append(result)
    return groups


def _settings(results: Sequence[dict], *keys: str) -> pd.DataFrame:
    return pd.DataFrame([result["config"] for result in results], columns=list(keys))


def _one(rows: pd.DataFrame) -> dict:
    """The only setting among the rows; several, or none, are refused."""
    settings = rows.drop_duplicates().to_dict("records")
    if len(settings) != 1:
        raise MiniCPTError(f"A figure shows one setting, got {settings}: filter first.")
    return settings[0]

"""Results -> figures: one function a figure, each returns a matplotlib Figure; `save` writes it as a small PNG.

Colours are Okabe and Ito's, which colour-blind readers tell apart; a method keeps its colour in every figure, and the
variant with an instruction (†) is the same colour, dashed, with an open marker.
"""

import numpy as np

from ..pictures import COLOURS, GREY, _panels
from .tables import METHODS


def accuracy_by_shots(summary):
    """Accuracy (%) against shots, a panel a dataset, bars the 95 % interval of the mean; zero-shot is the dotted line.

    `summary`: the rows of one model (tables.summary); ValueError for several.
    """
    _one(summary[["model"]].to_dict("records"))
    datasets, methods = list(summary.dataset.unique()), _in_order(summary.method)
    columns = 3 if len(datasets) < 6 else 5  # the last place of the grid is the legend's
    figure, panels = _panels(
        len(datasets) + 1, columns, 4 if columns == 3 else 3.4, 3.2, sharex=True, sharey=True
    )
    dodged, found = [method for method in methods if method != "zero"], {}
    for panel, dataset in zip(panels, datasets):
        rows = summary[summary.dataset == dataset]
        for method, group in rows.groupby("method"):
            if method == "zero":
                found[method] = panel.axhline(group["mean"].iloc[0], color=GREY, linestyle=":")
                continue
            x = group.shots + (dodged.index(method) - (len(dodged) - 1) / 2) / len(
                dodged
            )  # shots are two apart
            bars = np.nan_to_num([group["mean"] - group.ci_low, group.ci_high - group["mean"]])
            found[method] = panel.errorbar(
                x, group["mean"], bars, elinewidth=0.9, linewidth=1.4, **_look(method)
            )
        panel.set(title=dataset, xlabel="shots", xticks=sorted(set(summary.shots) - {0}))
        panel.set_ylim(max(0, summary["mean"].min() - 12), min(100, summary["mean"].max() + 12))
        panel.tick_params(labelbottom=True, labelleft=True)
        panel.grid(axis="y", alpha=0.3)
    panels[-1].axis("off")
    panels[-1].legend(
        [found[method] for method in methods],
        map(_name, methods),
        loc="center",
        ncols=2,
        frameon=False,
    )
    figure.supylabel("accuracy (%)")
    return figure


def difference_to_icl(paired):
    """Forest plot of each method minus ICL on the same seeds: percentage points with 95 % interval, a line at zero.

    `paired`: the rows of one model (tables.paired); ValueError for several. A panel a dataset, a block a shot count.
    """
    _one(paired[["model"]].to_dict("records"))
    datasets, methods, shots = (
        list(paired.dataset.unique()),
        _in_order(paired.method),
        sorted(set(paired.shots)),
    )
    rows = {
        (k, method): -(i * (len(methods) + 1) + j)
        for i, k in enumerate(shots)
        for j, method in enumerate(methods)
    }
    figure, panels = _panels(
        len(datasets), 5, 2.6, 0.21 * (len(rows) + len(shots)) + 1.2, sharex=True, sharey=True
    )
    # every interval is seen whole, but for the endless ones of two or three seeds
    widest = paired[["difference", "ci_low", "ci_high"]].abs().max().max()
    reach = min(1.05 * widest, 1.15 * paired.difference.abs().max() + 25)
    for panel, dataset in zip(panels, datasets):
        panel.axvline(0, color="black", linewidth=1)
        for row in paired[paired.dataset == dataset].itertuples():
            bar = np.nan_to_num([[row.difference - row.ci_low], [row.ci_high - row.difference]])
            panel.errorbar(
                row.difference, rows[row.shots, row.method], xerr=bar, **_look(row.method)
            )
        panel.set_title(dataset)
        panel.set_xlim(-reach, reach)
        panel.set_yticks(list(rows.values()), [_name(method) for _, method in rows])
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelbottom=True)
        panel.grid(axis="x", alpha=0.3)
        for i, k in enumerate(shots):
            top = -i * (len(methods) + 1)
            panel.axhspan(top + 0.5, top - len(methods) + 0.5, color="#F4F4F4", zorder=0)
            panel.text(
                0.02,
                top + 0.55,
                f"{k} shots",
                transform=panel.get_yaxis_transform(),
                fontsize=8,
                va="bottom",
            )
    panels[0].set_ylim(-len(shots) * (len(methods) + 1) + 1, 1.6)
    figure.supxlabel("accuracy difference to ICL (percentage points)")
    return figure


def difference_to_cpt(table):
    """Forest plot of every variant minus plain CPT (ablations.compare): points with 95 % interval, a block a question.

    Filled: separable from zero after the correction for many comparisons; open: not.
    """
    rows = table[table.variant != "cpt"]
    new_block = (rows.question != rows.question.shift()).cumsum()
    y = -(np.arange(len(rows)) + 1.0 * new_block.to_numpy())
    figure, (panel,) = _panels(1, 1, 7.6, 0.21 * (len(rows) + new_block.max()) + 1)
    panel.axvline(0, color="black", linewidth=1)
    for at, row in zip(y, rows.itertuples()):
        bar = np.nan_to_num([[row.difference - row.ci_low], [row.ci_high - row.difference]])
        panel.errorbar(
            row.difference,
            at,
            xerr=bar,
            color="#0072B2",
            marker="o",
            markersize=5,
            markerfacecolor="#0072B2" if row.holm < 0.05 else "white",
        )
    for question, block in rows.assign(y=y).groupby("question"):
        panel.text(
            0.01,
            block.y.max() + 0.6,
            question,
            transform=panel.get_yaxis_transform(),
            fontsize=8,
            va="center",
        )
        panel.axhspan(block.y.min() - 0.5, block.y.max() + 0.3, color="#F4F4F4", zorder=0)
    panel.set_yticks(y, rows.variant, fontsize=8)
    panel.set_ylim(y.min() - 0.8, y.max() + 1.2)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", alpha=0.3)
    panel.set_xlabel("accuracy difference to plain CPT (percentage points)")
    return figure


def training_curves(results):
    """Loss against step (log scale), a panel a trained method: a thin line a seed, the mean over seeds thick.

    `results`: of one model, dataset and number of shots, with history.loss; ValueError for a mixture or none trained.
    """
    trained = [result for result in results if result.get("history", {}).get("loss")]
    if not trained:
        raise ValueError(
            "no result has a history of losses: zero-shot and ICL do not train, pass a trained method"
        )
    task = _one(
        [
            {key: result["config"][key] for key in ("model", "dataset", "labels", "shots")}
            for result in trained
        ]
    )
    methods = _in_order(result["config"]["method"] for result in trained)
    figure, panels = _panels(len(methods), 4, 3.0, 2.6, sharex=True, sharey=True)
    for panel, method in zip(panels, methods):
        losses = [
            result["history"]["loss"] for result in trained if result["config"]["method"] == method
        ]
        for loss in losses:
            panel.plot(
                range(1, len(loss) + 1),
                loss,
                color=_look(method)["color"],
                alpha=0.3,
                linewidth=0.8,
            )
        mean = np.mean([loss[: min(map(len, losses))] for loss in losses], axis=0)
        panel.plot(range(1, len(mean) + 1), mean, color=_look(method)["color"], linewidth=2)
        panel.set_title(f"{_name(method)} (seeds: {len(losses)})")
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.tick_params(labelbottom=True, labelleft=True)
    figure.suptitle(
        f"{task['model']}, {task['dataset']}, {task['labels']} labels, {task['shots']} shots"
    )
    figure.supxlabel("step")
    figure.supylabel("training loss")
    return figure


def loss_by_shots(results):
    """Cross-entropy at the label (log scale) against shots: queries solid, the shots themselves dashed; seeds averaged.

    The paper's Figure 1. `results`: of one model, dataset and kind of labels, with `loss`; ValueError for a mixture.
    """
    results = [result for result in results if result["config"]["shots"]]
    task = _one(
        [
            {key: result["config"][key] for key in ("model", "dataset", "labels")}
            for result in results
        ]
    )
    figure, (panel,) = _panels(1, 1, 6.4, 4)
    for method in _in_order(result["config"]["method"] for result in results):
        of_method = [result for result in results if result["config"]["method"] == method]
        shots = sorted({result["config"]["shots"] for result in of_method})
        for kind, line in (("test", "-"), ("train", "--")):
            means = [
                np.mean([r["loss"][kind] for r in of_method if r["config"]["shots"] == k])
                for k in shots
            ]
            label = _name(method) if kind == "test" else None
            panel.plot(
                shots, means, **_look(method) | {"linestyle": line, "markersize": 4}, label=label
            )
    panel.set(yscale="log", xlabel="examples", ylabel="cross-entropy at the label", xticks=shots)
    panel.set_title(f"{task['model']}, {task['dataset']}, {task['labels']} labels", fontsize=10)
    panel.grid(alpha=0.3)
    panel.plot([], [], color=GREY, linestyle="-", label="queries (test)")
    panel.plot([], [], color=GREY, linestyle="--", label="the examples (train)")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _look(method):
    """Colour, line and marker of a method, as keywords for errorbar."""
    plain = method.removesuffix("_instr")
    colour = COLOURS.get(plain, "#0072B2")
    return {
        "color": colour,
        "marker": "o",
        "markersize": 5,
        "linestyle": "-" if plain == method else "--",
        "markerfacecolor": colour if plain == method else "white",
    }


def _name(method):
    return METHODS.get(method, method)


def _in_order(methods):
    methods = set(methods)
    return [method for method in METHODS if method in methods] + sorted(methods - METHODS.keys())


def _one(rows):
    """The only setting among the rows (dicts); ValueError if there are several or none."""
    settings = {tuple(row.items()) for row in rows}
    if len(settings) != 1:
        raise ValueError(
            f"a figure shows one setting, got {[dict(pairs) for pairs in sorted(settings)]}: filter first"
        )
    return dict(settings.pop())

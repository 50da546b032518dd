"""Figures: what is drawn is what was given (read back from the artists), and clear errors for what cannot be drawn."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minicpt import MiniCPTError, pictures
from minicpt.lab import figures, tables

matplotlib.use("Agg")
METHODS = ["zero", "icl", "pt", "lora", "cpt", "cpt_instr"]


def results(seeds=3, model="micro"):
    random = np.random.default_rng(0)
    return [
        {
            "config": {
                "model": model,
                "dataset": dataset,
                "labels": "canonical",
                "method": method,
                "shots": shots,
                "seed": seed,
            },
            "accuracy": random.uniform(0.2, 0.8),
            "seconds": {"fit": 1.0, "score": 1.0},
            "history": {
                "loss": [] if method in ("zero", "icl") else list(random.uniform(0.1, 2, 5 + seed))
            },
        }
        for dataset in ("sst2", "trec")
        for method in METHODS
        for shots in ([0] if method == "zero" else [2, 4])
        for seed in range(seeds)
    ]


def ends(container):
    """The two ends of each error bar of an errorbar container."""
    return np.array([segment for segment in container[2][0].get_segments()])


def test_accuracy_by_shots_draws_every_mean_and_interval():
    summary = tables.summary(results())
    figure = figures.accuracy_by_shots(summary)
    panels, (legend,) = figure.axes, figure.legends
    assert [panel.get_title() for panel in panels] == ["sst2", "trec"]
    assert [text.get_text() for text in legend.get_texts()] == [tables.TITLES[m] for m in METHODS]
    for panel in panels:
        rows = summary[(summary.dataset == panel.get_title()) & (summary.method != "zero")]
        drawn = sorted(y for bars in panel.containers for y in bars[0].get_ydata())
        assert drawn == pytest.approx(sorted(rows["mean"]))
        lows = sorted(end[:, 1].min() for bars in panel.containers for end in ends(bars))
        assert lows == pytest.approx(sorted(rows.ci_low))
        x = np.concatenate([bars[0].get_xdata() for bars in panel.containers]).astype(float)
        assert len(set(x.round(6))) == len(x)  # side by side, and still at their number of shots
        assert [int(tick.get_text()) for tick in panel.get_xticklabels()] == [2, 4]
        assert set(np.round(x)) <= {0, 1} and panel.get_ylim() == (0, 108)
        zero = summary[(summary.dataset == panel.get_title()) & (summary.method == "zero")][
            "mean"
        ].item()
        assert [line.get_ydata()[0] for line in panel.lines if line.get_linestyle() == ":"] == [
            zero
        ]


def test_instruction_variant_keeps_the_colour_and_opens_the_marker():
    plain, variant = figures._look("cpt"), figures._look("cpt_instr")
    assert plain["color"] == variant["color"] and plain["linestyle"] != variant["linestyle"]
    assert variant["markerfacecolor"] == "white" != plain["markerfacecolor"]
    assert len(set(pictures.COLOURS.values())) == len(pictures.COLOURS)


def test_one_seed_is_drawn_without_bars():
    summary = tables.summary(results(seeds=1))
    for bars in figures.accuracy_by_shots(summary).axes[0].containers:
        assert np.ptp(ends(bars)[:, :, 1], axis=1) == pytest.approx(0)


def test_difference_to_icl_draws_every_difference_on_its_own_row():
    paired = tables.paired(results())
    panels = figures.difference_to_icl(paired).axes
    names = dict(
        zip(panels[0].get_yticks(), [label.get_text() for label in panels[0].get_yticklabels()])
    )
    assert [panel.get_title() for panel in panels] == ["sst2", "trec"]
    for panel in panels:
        rows = paired[paired.dataset == panel.get_title()]
        drawn = {tuple(bars[0].get_xydata()[0]) for bars in panel.containers}
        assert sorted(x for x, _ in drawn) == pytest.approx(sorted(rows.difference))
        highs = sorted(end[:, 0].max() for bars in panel.containers for end in ends(bars))
        assert highs == pytest.approx(sorted(rows.ci_high))
        assert len({y for _, y in drawn}) == len(rows) == len(panel.get_yticks())
        assert 0 in [line.get_xdata()[0] for line in panel.lines if len(line.get_xdata()) == 2]
        assert {"2 shots", "4 shots"} <= {text.get_text() for text in panel.texts}
        for x, y in drawn:  # the row is labelled with the method whose value it shows
            assert (
                names[y] == tables.TITLES[rows.loc[(rows.difference - x).abs().idxmin(), "method"]]
            )


def test_training_curves_show_each_seed_and_the_mean_over_common_steps():
    one = [
        r for r in results() if r["config"]["dataset"] == "trec" and r["config"]["shots"] in (0, 4)
    ]
    panels = figures.training_curves(one).axes
    assert [panel.get_title().split(" (")[0] for panel in panels] == ["PT", "LoRA", "CPT", "CPT†"]
    losses = [r["history"]["loss"] for r in one if r["config"]["method"] == "cpt"]
    *seeds, mean = panels[2].lines
    assert [list(line.get_ydata()) for line in seeds] == losses
    assert mean.get_ydata() == pytest.approx(np.mean([loss[:5] for loss in losses], axis=0))
    assert mean.get_linewidth() > seeds[0].get_linewidth() and panels[2].get_yscale() == "log"


def test_context_roles_boxes_have_the_colour_of_their_role():
    tokens = [
        "in",
        ":",
        "Ġfilm",
        "\n",
        "out",
        "Ġgood",
        "</s>",
        "in",
        "Ġbad",
        "out",
        "Ġno",
        "x" * 70,
        "y" * 20,
    ]
    types = [1, 1, 2, 0, 3, 4, 0, 5, 6, 7, 8, 6, 6]
    (panel,) = pictures.context_roles(tokens, types).axes
    boxes = [patch for patch in panel.patches if isinstance(patch, Rectangle)]
    roles = ["input template"] * 2 + [
        "input",
        "separator",
        "output template",
        "label",
        "separator",
        "input template",
        "input",
        "output template",
        "label",
        "input",
        "input",
    ]
    assert [to_hex(box.get_facecolor()).upper() for box in boxes] == [
        dict(pictures.ROLE_COLOURS)[role] for role in roles
    ]
    assert [text.get_text() for text in panel.texts][2:4] == ["·film", "↵"]
    lines = [round(-box.get_y(), 3) for box in boxes]
    assert (
        lines[:7] == [0] * 7 and len(set(lines[7:])) == 3 and min(lines[7:]) > 0
    )  # an example a line, long ones wrap
    for a in boxes:  # no two boxes touch
        for b in boxes:
            same_line = a is not b and a.get_y() == b.get_y()
            assert not (same_line and a.get_x() <= b.get_x() < a.get_x() + a.get_width())


def test_delta_norms_tells_held_free_and_frozen_tokens_apart():
    (panel,) = pictures.delta_norms(
        [0.1, 0.05, 1e-10, 0.1], [0.1, 0.1, 1e-10, 0.2], ["a", "b", "</s>", "c"]
    ).axes
    held, free = panel.containers
    assert [bar.get_height() for bar in held] == [0.1] and [bar.get_height() for bar in free] == [
        0.05,
        0.1,
    ]
    assert [segment[0, 1] for segment in panel.collections[0].get_segments()] == [0.1, 0.1, 0.2]
    assert list(panel.lines[0].get_xdata()) == [2]
    (whole,) = pictures.delta_norms([0.3, 0.2], 0.3, ["a", "b"]).axes  # one radius for all
    assert len(whole.containers[0]) == 1 and [t.get_text() for t in whole.get_xticklabels()] == [
        "a",
        "b",
    ]


def test_loss_by_shots_draws_queries_solid_and_examples_dashed():
    found = [r for r in results() if r["config"]["dataset"] == "sst2"]
    for r in found:
        k = r["config"]["shots"]
        r["loss"] = {
            "test": 2.0 + r["config"]["seed"],
            "train": 1 / k if k else None,
        }  # zero-shot has no examples
    figure = figures.loss_by_shots(found)
    (panel,) = figure.axes
    lines = [line for line in panel.lines if len(line.get_xdata())]
    methods = {r["config"]["method"] for r in found} - {"zero"}
    assert len(lines) == 2 * len(methods) and panel.get_yscale() == "log"
    solid, dashed = lines[0], lines[1]
    seeds = {r["config"]["seed"] for r in found if r["config"]["shots"]}
    assert solid.get_linestyle() == "-" and list(solid.get_ydata()) == pytest.approx(
        [2 + sum(seeds) / len(seeds)] * len(solid.get_xdata())
    )
    assert dashed.get_linestyle() == "--" and list(dashed.get_ydata()) == pytest.approx(
        [1 / k for k in dashed.get_xdata()]
    )
    with pytest.raises(ValueError, match="one setting.*filter first"):
        figures.loss_by_shots(
            found + [{**r, "config": {**r["config"], "model": "other"}} for r in found]
        )


def test_what_cannot_be_drawn_is_refused_with_the_reason():
    both = results() + results(model="other")
    for draw, rows in (
        (figures.accuracy_by_shots, tables.summary(both)),
        (figures.difference_to_icl, tables.paired(both)),
        (figures.training_curves, results()),
    ):
        with pytest.raises(ValueError, match="one setting.*filter first"):
            draw(rows)
    with pytest.raises(ValueError, match="No result has a history"):
        figures.training_curves([r for r in results() if r["config"]["method"] == "icl"])
    with pytest.raises(ValueError, match="2 tokens but 1 types"):
        pictures.context_roles(["a", "b"], [1])


def test_save_writes_a_small_png_and_keeps_no_figure_open(tmp_path):
    import matplotlib.pyplot as plt

    path = pictures.save(
        figures.accuracy_by_shots(tables.summary(results())), tmp_path / "figure.png"
    )
    assert path.read_bytes().startswith(b"\x89PNG") and 2_000 < path.stat().st_size < 60_000
    assert plt.get_fignums() == []


@pytest.mark.slow
def test_importing_plots_does_not_import_matplotlib():
    code = (
        "import sys, minicpt.lab.figures, minicpt.pictures; sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def drawing():
    """A function that draws nothing and notes what it was asked for."""

    def draw(epsilon, text):
        draw.seen.append((epsilon, text))
        return Figure(figsize=(1, 1))

    draw.seen = []
    return draw


def test_explore_shows_the_start_without_widgets(drawing, capsys):
    pictures.explore(drawing, "an empty figure", epsilon=([0.1, 0.5, 1.0], 0.5), text="good film")
    assert drawing.seen == [(0.5, "good film")]


def test_explore_redraws_when_a_control_moves(drawing, monkeypatch):
    import ipywidgets

    made = []
    monkeypatch.setattr(
        ipywidgets, "interact", lambda redraw, **fields: made.append((redraw, fields))
    )
    pictures.explore(
        drawing,
        "an empty figure",
        interactive=True,
        epsilon=([0.1, 0.5, 1.0], 0.5),
        text="good film",
    )
    ((redraw, fields),) = made
    assert (fields["epsilon"].options, fields["epsilon"].value, fields["text"].value) == (
        (0.1, 0.5, 1.0),
        0.5,
        "good film",
    )
    redraw(epsilon=1.0, text="bad film")
    assert drawing.seen == [(1.0, "bad film")]


def test_explore_shows_the_message_of_what_cannot_be_drawn(monkeypatch, capsys):
    import ipywidgets

    def refuse(text):
        raise MiniCPTError(f"no figure of {text!r}")

    monkeypatch.setattr(ipywidgets, "interact", lambda redraw, **fields: redraw(text="half"))
    pictures.explore(refuse, "an empty figure", interactive=True, text="whole")
    assert capsys.readouterr().out == "no figure of 'half'\n"
    with pytest.raises(MiniCPTError, match="no figure of 'whole'"):
        pictures.explore(refuse, "an empty figure", text="whole")


def test_explore_says_what_to_install(drawing, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(MiniCPTError, match="pip install ipywidgets"):
        pictures.explore(
            drawing, "an empty figure", interactive=True, epsilon=([0.1], 0.1), text=""
        )
    pictures.explore(drawing, "an empty figure", epsilon=([0.1], 0.1), text="")
    assert drawing.seen == [(0.1, "")]

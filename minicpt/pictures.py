"""Teaching pictures: what a context is made of, how far its tokens moved; shown in notebooks with a description."""

# `Figure` stands in annotations alone: matplotlib is loaded where something is drawn
from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .core.masks import SEPARATOR, example_of, role_of
from .errors import MiniCPTError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, EDGE = "#777777", "#555555"
COLOURS = {
    "zero": GREY,
    "icl": "#000000",
    "pt": "#E69F00",
    "ipt": "#56B4E9",
    "lora": "#009E73",
    "cpt": "#D55E00",
    "cpt_paper_eps": "#CC79A7",
}  # any other method: blue
ROLE_COLOURS = [  # by role: the label, role 4, is the fifth
    ("separator", "#E4E4E4"),
    ("input template", "#BFE0F5"),
    ("input", "#56B4E9"),
    ("output template", "#F6D58F"),
    ("label", "#F0925B"),
]
# spaces and line ends in tokens
VISIBLE = str.maketrans({" ": "·", "Ġ": "·", "▁": "·", "\n": "↵", "Ċ": "↵"})


def context_roles(tokens: Sequence[str], types: Sequence[int]) -> Figure:
    """The context's tokens as boxes coloured by role, each example on a line of its own.

    `types`: one integer per token, which holds its role and its example (see `minicpt.core.masks`).
    """
    from matplotlib.patches import Patch, Rectangle

    if len(tokens) != len(types):
        raise MiniCPTError(f"{len(tokens)} tokens but {len(types)} types: give one type per token.")
    given = torch.as_tensor(types, dtype=torch.long)
    boxes, width, x, line, example = [], 78, 0, 0, 0  # width in characters of the fixed-width font
    for token, role, now in zip(tokens, role_of(given).tolist(), example_of(given).tolist()):
        text = token.translate(VISIBLE)
        if role == SEPARATOR:
            now = example  # it stays with the example before it
        if x and (now != example or x + len(text) + 0.8 > width):
            x = 0
            line += 1.35 if now != example else 1
        boxes.append((x, line, text, role))
        x += len(text) + 1.1
        example = now
    figure, (panel,) = panels_of(1, 1, width * 0.092, 0.3 * (line + 1) + 0.5)
    centred = {"ha": "center", "va": "center", "family": "monospace", "size": 9}
    for x, line, text, role in boxes:
        look = {"facecolor": ROLE_COLOURS[role][1], "edgecolor": EDGE}
        look["linewidth"] = 1.6 if role == 4 else 0.5  # a label also without colour
        panel.add_patch(Rectangle((x, -line), len(text) + 0.8, 0.8, **look))
        panel.text(x + len(text) / 2 + 0.4, 0.38 - line, text, **centred)
    panel.set(xlim=(-0.3, width + 0.3), ylim=(-line - 0.2, 1))
    panel.axis("off")
    legend = [Patch(facecolor=colour, edgecolor=EDGE, label=role) for role, colour in ROLE_COLOURS]
    figure.legend(handles=legend, loc="outside upper center", ncols=5, frameon=False)
    return figure


def delta_norms(
    norms: Sequence[float], epsilon: float | Sequence[float], tokens: Sequence[str]
) -> Figure:
    """Norm of each token's delta (bars) against the radius of its ball (line; a number, or one a token).

    Orange bars have reached their ball: the projection holds them; × is a radius of 0: the token is frozen.
    """
    norms = np.asarray(norms, dtype=float)
    radius = np.broadcast_to(np.asarray(epsilon, dtype=float), norms.shape)
    held = norms >= 0.999 * radius
    free = radius > 1e-6  # PEFT freezes with 1e-10
    x = np.arange(len(norms))
    figure, (panel,) = panels_of(1, 1, max(5.0, 0.19 * len(norms) + 1.5), 3.4)
    for chosen, colour, label in [
        (held & free, COLOURS["cpt"], "at its radius"),
        (~held & free, COLOURS["ipt"], "inside its ball"),
    ]:
        panel.bar(x[chosen], norms[chosen], color=colour, label=label)
    panel.hlines(radius[free], x[free] - 0.5, x[free] + 0.5, color="black", label="radius ε")
    frozen = x[~free]
    cross = {"color": GREY, "markersize": 5, "label": "frozen", "clip_on": False}
    panel.plot(frozen, 0 * frozen, "x", **cross)
    panel.set_xticks(x, [token.translate(VISIBLE) for token in tokens], rotation=90, fontsize=8)
    panel.set(xlim=(-0.8, len(norms) - 0.2), ylim=(0, 1.1 * max(*radius, *norms, 1e-6)))
    panel.set_ylabel("norm of delta")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def save(figure: Figure, path: str | Path | io.BytesIO) -> str | Path | io.BytesIO:
    """Write the figure as a small PNG (120 dpi, tight, 64 colours) and return the path."""
    from PIL import Image

    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=120, bbox_inches="tight")
    Image.open(full).convert("RGB").quantize(64).save(path, format="png", optimize=True)
    return path


def show(figure: Figure, alt: str) -> None:
    """Show the figure in a notebook as a small PNG; `alt` describes it for those who cannot see it."""
    from IPython.display import Image, display

    display(Image(save(figure, io.BytesIO()).getvalue(), alt=alt))


def explore(
    draw: Callable[..., Figure], alt: str, interactive: bool = False, **controls: str | tuple
) -> None:
    """Show the figure `draw(**values)` as `show` does; with `interactive`, redraw it with sliders and text fields.

    A control is `name=(values, start)`, a slider over a list, or `name="text"`, a text field. Without `interactive` the
    figure at the start values is shown, which is what people read on the web and what tests run.
    Errors: MiniCPTError if `interactive` and ipywidgets is missing.
    """
    if not interactive:
        start = {k: v if isinstance(v, str) else v[1] for k, v in controls.items()}
        return show(draw(**start), alt)
    try:
        from ipywidgets import SelectionSlider, Text, interact
    except ImportError:
        raise MiniCPTError(
            "sliders need the package ipywidgets: `pip install ipywidgets` and restart the kernel, or set "
            "interactive = False for the static figure."
        ) from None
    fields = {}
    for name, control in controls.items():
        if isinstance(control, str):
            fields[name] = Text(control, continuous_update=False)
        else:
            fields[name] = SelectionSlider(options=control[0], value=control[1])

    def redraw(**values):
        try:
            show(draw(**values), alt)
        except MiniCPTError as error:  # half-typed text: the message is enough
            print(error)

    interact(redraw, **fields)


def panels_of(
    count: int, columns: int, width: float, height: float, **kwargs
) -> tuple[Figure, list[Axes]]:
    """A figure with count panels of width x height inches, at most `columns` a row, and the list of them."""
    import matplotlib.pyplot as plt

    columns = min(count, columns)
    rows = -(-count // columns)
    size = columns * width, rows * height
    layout = {"figsize": size, "squeeze": False, "layout": "constrained"}
    figure, grid = plt.subplots(rows, columns, **layout, **kwargs)
    # a notebook shows it once, as the value of its cell, and a long run keeps none open
    plt.close(figure)
    for panel in grid.flat:
        panel.spines[["top", "right"]].set_visible(False)
    for panel in grid.flat[count:]:
        panel.remove()
    return figure, list(grid.flat[:count])

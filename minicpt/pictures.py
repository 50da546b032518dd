"""Teaching pictures: what a context is made of, how far its tokens moved; shown in notebooks with a description."""

import io

import numpy as np
import torch

from .core.masks import SEPARATOR, example_of, role_of
from .errors import MiniCPTError

GREY = "#777777"
COLOURS = {
    "zero": GREY,
    "icl": "#000000",
    "pt": "#E69F00",
    "ipt": "#56B4E9",
    "lora": "#009E73",
    "cpt": "#D55E00",
    "cpt_paper_eps": "#CC79A7",
}  # any other method: blue
ROLES = [
    ("separator", "#E4E4E4"),
    ("input template", "#BFE0F5"),
    ("input", "#56B4E9"),
    ("output template", "#F6D58F"),
    ("label", "#F0925B"),
]  # by role, as `role_of` numbers them
VISIBLE = str.maketrans(
    {" ": "·", "Ġ": "·", "▁": "·", "\n": "↵", "Ċ": "↵"}
)  # spaces and line ends in tokens


def context_roles(tokens, types):
    """The context's tokens (list of str) as boxes coloured by role, each example on a line of its own.

    `types`: one integer per token, which holds its role and its example (see `minicpt.core.masks`).
    """
    from matplotlib.patches import Patch, Rectangle

    if len(tokens) != len(types):
        raise ValueError(f"{len(tokens)} tokens but {len(types)} types: give one type per token")
    given = torch.as_tensor(types, dtype=torch.long)
    boxes, width, x, line, example = [], 78, 0, 0, 0  # width in characters of the fixed-width font
    for token, role, now in zip(tokens, role_of(given).tolist(), example_of(given).tolist()):
        text = token.translate(VISIBLE)
        if role == SEPARATOR:
            now = example  # it stays with the example before it
        if x and (now != example or x + len(text) + 0.8 > width):
            x, line = 0, line + (1.35 if now != example else 1)
        boxes.append((x, line, text, role))
        x, example = x + len(text) + 1.1, now
    figure, (panel,) = _panels(1, 1, width * 0.092, 0.3 * (line + 1) + 0.5)
    for x, line, text, role in boxes:
        panel.add_patch(
            Rectangle(
                (x, -line),
                len(text) + 0.8,
                0.8,
                facecolor=ROLES[role][1],
                edgecolor="#555555",
                linewidth=1.6 if role == 4 else 0.5,
            )
        )  # a label also without colour
        panel.text(
            x + len(text) / 2 + 0.4,
            0.38 - line,
            text,
            ha="center",
            va="center",
            family="monospace",
            size=9,
        )
    panel.set(xlim=(-0.3, width + 0.3), ylim=(-line - 0.2, 1))
    panel.axis("off")
    figure.legend(
        handles=[
            Patch(facecolor=colour, edgecolor="#555555", label=name) for name, colour in ROLES
        ],
        loc="outside upper center",
        ncols=5,
        frameon=False,
    )
    return figure


def delta_norms(norms, epsilon, tokens):
    """Norm of each token's delta (bars) against the radius of its ball (line; a number, or one a token).

    Orange bars have reached their ball: the projection holds them; × is a radius of 0: the token is frozen.
    """
    norms = np.asarray(norms, dtype=float)
    radius = np.broadcast_to(np.asarray(epsilon, dtype=float), norms.shape)
    held, frozen, x = (
        norms >= 0.999 * radius,
        radius <= 1e-6,
        np.arange(len(norms)),
    )  # PEFT freezes with 1e-10
    figure, (panel,) = _panels(1, 1, max(5.0, 0.19 * len(norms) + 1.5), 3.4)
    for chosen, colour, label in [
        (held & ~frozen, COLOURS["cpt"], "at its radius"),
        (~held & ~frozen, COLOURS["ipt"], "inside its ball"),
    ]:
        panel.bar(x[chosen], norms[chosen], color=colour, label=label)
    panel.hlines(
        radius[~frozen], x[~frozen] - 0.5, x[~frozen] + 0.5, color="black", label="radius ε"
    )
    panel.plot(
        x[frozen], 0 * x[frozen], "x", color=GREY, markersize=5, label="frozen", clip_on=False
    )
    panel.set_xticks(x, [token.translate(VISIBLE) for token in tokens], rotation=90, fontsize=8)
    panel.set(
        xlim=(-0.8, len(norms) - 0.2),
        ylim=(0, 1.1 * max(*radius, *norms, 1e-6)),
        ylabel="norm of delta",
    )
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def save(figure, path):
    """Write the figure as a small PNG (120 dpi, tight, 64 colours) and return the path."""
    from PIL import Image

    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=120, bbox_inches="tight")
    Image.open(full).convert("RGB").quantize(64).save(path, format="png", optimize=True)
    return path


def show(figure, alt):
    """Show the figure in a notebook as a small PNG; `alt` describes it for those who cannot see it."""
    from IPython.display import Image, display

    display(Image(save(figure, io.BytesIO()).getvalue(), alt=alt))


def explore(draw, alt, interactive=False, **controls):
    """Show the figure `draw(**values)` as `show` does; with `interactive`, redraw it with sliders and text fields.

    A control is `name=(values, start)`, a slider over a list, or `name="text"`, a text field. Without `interactive` the
    figure at the start values is shown, which is what people read on the web and what tests run.
    Errors: MiniCPTError if `interactive` and ipywidgets is missing.
    """
    start = {
        name: value if isinstance(value, str) else value[1] for name, value in controls.items()
    }
    if not interactive:
        return show(draw(**start), alt)
    try:
        import ipywidgets
    except ImportError:
        raise MiniCPTError(
            "sliders need the package ipywidgets: `pip install ipywidgets` and restart the kernel, or set "
            "interactive = False for the static figure."
        ) from None
    fields = {
        name: ipywidgets.Text(value, continuous_update=False)
        if isinstance(value, str)
        else ipywidgets.SelectionSlider(options=value[0], value=value[1])
        for name, value in controls.items()
    }

    def redraw(**values):
        try:
            show(draw(**values), alt)
        except MiniCPTError as error:  # half-typed text: the message is enough
            print(error)

    ipywidgets.interact(redraw, **fields)


def _panels(count, columns, width, height, **kwargs):
    """A figure with count panels of width x height inches, at most `columns` a row, and the list of them."""
    import matplotlib.pyplot as plt

    columns = min(count, columns)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(columns * width, rows * height),
        squeeze=False,
        layout="constrained",
        **kwargs,
    )
    plt.close(
        figure
    )  # so that a notebook shows it once, as the value of its cell, and a long run keeps none open
    for panel in grid.flat:
        panel.spines[["top", "right"]].set_visible(False)
    for panel in grid.flat[count:]:
        panel.remove()
    return figure, list(grid.flat[:count])

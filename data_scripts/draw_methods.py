"""Draw docs/methods.svg and docs/methods.png: ICL, PT, IPT, CPT and LoRA side by side on one example.

    python data_scripts/draw_methods.py

Grey is frozen, orange is trained, blue is the loss; the two colours are Okabe and Ito's, and differ in grey print, too.
"""

import io
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

DOCS = Path(__file__).resolve().parent.parent / "docs"
FROZEN, TRAINED, LOSS, INK, BAND = "#DDDDDD", "#E69F00", "#0072B2", "#222222", "#F6F6F6"
BARS = (0.35, 0.8, 0.5, 0.95, 0.25, 0.65, 0.45, 0.85)  # a vector, drawn as its numbers
WORD, TALL, THIN = 0.95, 0.38, 0.19  # a word's width and height, a delta's height
LEFT, APART = 1.75, 2.62  # where the first column begins, and the distance of the columns
EXAMPLES = (("dull plot", "bad"), ("fine cast", "good"))
AGAIN, QUERY = (
    ("fine cast", "good"),
    ("sad song", "?"),
)  # a training example is one of the labelled ones


class Column(NamedTuple):
    """One method: its names, what the model reads, the loss at each label, and what is trained."""

    title: str
    name: str
    trained: str
    soft: bool = False
    context: tuple = ()
    last: tuple = AGAIN
    losses: tuple = ("", "", "loss")


VECTORS = "a few vectors\nthat are no words"
DELTAS = "a δ for each word of the\ncontext except labels"
MATRICES = "pairs of thin matrices\nin each layer"
COLUMNS = (
    Column("ICL", "in-context learning", "nothing", context=EXAMPLES, last=QUERY, losses=("",) * 3),
    Column("PT", "prompt tuning", VECTORS, soft=True),
    Column("IPT", "instruction prompt tuning", VECTORS, soft=True, context=EXAMPLES),
    Column(
        "CPT",
        "context-aware prompt tuning",
        DELTAS,
        context=EXAMPLES,
        losses=("γ² loss", "γ loss", "loss"),
    ),
    Column("LoRA", "low-rank adaptation", MATRICES),
)
ROWS = (6.6, 5.3, 3.86)  # upper edge of each example: the context's two, then what follows them
BANDS = (  # lower edge, upper edge and name of a row
    (6.82, 7.48, "before the text"),
    (4.02, 6.74, "the context:\nlabelled\nexamples"),
    (2.84, 3.94, "then: a query\n(ICL), or one\nexample again"),
    (1.66, 2.42, "the model,\nfrozen"),
    (0.86, 1.58, "what is trained"),
)


def box(axes, x, y, width, height, colour, line=0.8):
    """A rectangle whose upper left corner is (x, y)."""
    axes.add_patch(
        Rectangle((x, y - height), width, height, facecolor=colour, edgecolor=INK, linewidth=line)
    )


def say(axes, x, y, text, **options):
    """Text whose middle line is at y."""
    axes.text(
        x, y, text, linespacing=1.25, **{"va": "center", "fontsize": 12, "color": INK, **options}
    )


def vector(axes, x, y, width, height):
    """A trained vector: an orange box with its numbers as bars."""
    box(axes, x, y, width, height, TRAINED, 1.6)
    step = width / (len(BARS) + 1)
    for k, bar in enumerate(BARS):
        at = x + (k + 1) * step
        axes.plot(
            [at, at], [y - 0.85 * height, y - height * (0.85 - 0.7 * bar)], color=INK, linewidth=1.3
        )


def word(axes, x, y, text, moved=False, **options):
    """A word of the prompt, frozen; `moved`: with a trained delta below it."""
    box(axes, x, y, WORD, TALL, FROZEN)
    say(axes, x + WORD / 2, y - TALL / 2, text, ha="center", va="center_baseline", **options)
    if moved:
        vector(axes, x, y - TALL, WORD, THIN)


def tag(axes, x, y, text):
    """The blue mark of a loss, pointing at the label on its left."""
    shape = {"boxstyle": "larrow,pad=0.22", "facecolor": LOSS, "edgecolor": LOSS}
    say(axes, x + 0.15, y, text, color="white", fontsize=11, weight="bold", bbox=shape)


def example(axes, x, y, text, label, loss, moved=False):
    """An example as it is written: its text, then its label; `moved`: with a delta for each word but the label."""
    below = y - TALL - 0.06 - (THIN if moved else 0)
    right = x + WORD + 0.05
    word(axes, x, y, "review:", moved)
    word(axes, right, y, text, moved)
    word(axes, x, below, "verdict:", moved)
    word(axes, right, below, label, weight="bold")
    if loss:
        tag(axes, right + WORD + 0.05, below - TALL / 2, loss)


def model(axes, x, y, adapted):
    """The language model; `adapted`: with LoRA's two matrices in it."""
    box(axes, x, y, 2 * WORD + 0.05, 0.6, FROZEN)
    say(axes, x + (0.5 if adapted else WORD + 0.03), y - 0.3, "model", ha="center", fontsize=13)
    if adapted:
        box(axes, x + 1.1, y - 0.06, 0.16, 0.48, TRAINED, 1.6)
        box(axes, x + 1.34, y - 0.22, 0.48, 0.16, TRAINED, 1.6)


def column(axes, x, method):
    """One method, from its name down to what it trains."""
    say(axes, x, 8.22, method.title, fontsize=21, weight="bold")
    say(axes, x, 7.78, method.name, fontsize=11)
    if method.soft:
        for k in range(4):
            vector(axes, x + k * 0.5, 7.34, 0.45, TALL)
    for y, loss, (text, label) in zip(ROWS, method.losses, method.context):
        example(axes, x, y, text, label, loss, moved=method.title == "CPT")
    example(axes, x, ROWS[-1], *method.last, method.losses[-1])
    arrow = {"arrowstyle": "-|>", "color": INK}
    axes.annotate("", (x + WORD, 2.36), (x + WORD, 2.96), arrowprops=arrow)
    model(axes, x, 2.34, adapted=method.title == "LoRA")
    say(axes, x, 1.22, method.trained)


def legend(axes):
    """The four signs, and what the picture cannot show."""
    word(axes, 0, 0.45, "word")
    say(axes, 1.08, 0.26, "text: its vector comes\nfrom the frozen model")
    vector(axes, 3.9, 0.45, 0.45, TALL)
    say(axes, 4.48, 0.26, "a trained vector\nthat is no word")
    word(axes, 6.75, 0.53, "word", moved=True)
    say(axes, 7.83, 0.26, "text plus δ: a trained vector,\nzero at first, held in a ball")
    tag(axes, 11.25, 0.26, "loss")
    say(axes, 12.05, 0.26, "the loss reads here what the\nmodel answers (γ = 0.95)")
    note = "PT, IPT, CPT and LoRA are drawn while they train. Later a query takes the place of the repeated example."
    say(axes, 0, -0.36, note)


def draw():
    """The whole picture."""
    figure, axes = plt.subplots(figsize=(14.4, 8.8))
    axes.set(xlim=(-0.1, 14.9), ylim=(-0.62, 8.6))
    axes.axis("off")
    for low, high, name in BANDS:
        box(axes, -0.1, high, 15, high - low, BAND, 0)
        say(axes, 0, (low + high) / 2, name, style="italic")
    for k, method in enumerate(COLUMNS):
        column(axes, LEFT + k * APART, method)
    legend(axes)
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


def main() -> None:
    plt.rcParams |= {"svg.hashsalt": "minicpt", "font.family": "DejaVu Sans"}
    figure = draw()
    figure.savefig(DOCS / "methods.svg", metadata={"Date": None})
    figure.savefig(picture := io.BytesIO(), format="png", dpi=130)
    Image.open(picture).convert("RGB").quantize(48).save(
        DOCS / "methods.png", optimize=True
    )  # a third of the bytes


if __name__ == "__main__":
    main()

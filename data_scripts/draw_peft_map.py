"""Draw docs/peft_map.svg and docs/peft_map.png: where each method of notebook 13 enters a block of a language model.

    python data_scripts/draw_peft_map.py

Grey is frozen and orange is trained, as in docs/methods.png. The block is that of Llama, which the micro model has.
"""

import io

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from draw_methods import BAND, DOCS, FROZEN, INK, TALL, TRAINED, box, say, vector
from matplotlib.patches import Circle, Polygon
from PIL import Image

WIDE, HIGH = 1.0, 0.62  # a linear layer
RESIDUAL, MIDDLE = 2.0, 4.5  # height of the residual stream, and of the layers' middle row
ATTENTION, FORWARD = 4.05, 11.1  # where the layers of the two halves begin
LINEAR = (  # left edge, middle, name, what is in it besides the frozen weights
    (ATTENTION, MIDDLE + 1.1, "q", "lora"),
    (ATTENTION, MIDDLE, "k", ""),
    (ATTENTION, MIDDLE - 1.1, "v", "lora"),
    (ATTENTION + 3.55, MIDDLE, "o", ""),
    (FORWARD, MIDDLE + 0.55, "gate", ""),
    (FORWARD, MIDDLE - 0.55, "up", ""),
    (FORWARD + 2.5, MIDDLE, "down", ""),
)
SCALED = (  # where IA³ multiplies
    (ATTENTION + WIDE + 0.42, MIDDLE),
    (ATTENTION + WIDE + 0.42, MIDDLE - 1.1),
    (FORWARD + 2.16, MIDDLE),
)
ARROWS = (
    *(((ATTENTION - 0.45, MIDDLE), (ATTENTION, MIDDLE + dy)) for dy in (1.1, 0, -1.1)),
    ((ATTENTION + WIDE, MIDDLE + 1.1), (ATTENTION + 2.1, MIDDLE + 0.5)),
    ((ATTENTION + WIDE, MIDDLE), (ATTENTION + 2.1, MIDDLE)),
    ((ATTENTION + WIDE, MIDDLE - 1.1), (ATTENTION + 1.22, MIDDLE - 1.1)),
    ((ATTENTION + 1.57, MIDDLE - 0.98), (ATTENTION + 2.1, MIDDLE - 0.5)),
    ((ATTENTION + 3.25, MIDDLE), (ATTENTION + 3.55, MIDDLE)),
    ((ATTENTION + 4.55, MIDDLE), (ATTENTION + 4.8, MIDDLE)),
    *(((FORWARD - 0.45, MIDDLE), (FORWARD, MIDDLE + dy)) for dy in (0.55, -0.55)),
    *(((FORWARD + WIDE, MIDDLE + dy), (FORWARD + 1.42, MIDDLE)) for dy in (0.55, -0.55)),
    ((FORWARD + 1.78, MIDDLE), (FORWARD + 2.5, MIDDLE)),
    ((FORWARD + 3.5, MIDDLE), (FORWARD + 3.75, MIDDLE)),
)
LEGEND = (
    ("LoRA", r"$Wx + \frac{\alpha}{r}\,BAx$", "two thin matrices, on q and v"),
    ("IA³", r"$\ell \odot Wx$  or  $W(\ell \odot x)$", "a factor for each number"),
    ("BitFit", r"$Wx + b$", "a bias b, on every linear layer"),
    ("adapter", r"$h + U\,\mathrm{relu}(Nh)$", "a narrow network after each half"),
    ("prefix tuning", r"$[K_P; K],\ [V_P; V]$", "P keys and values in each block"),
    ("prompt tuning", r"$[p;\ x]$", "P vectors before the words, once"),
    ("full fine-tuning", r"$W + \Delta W$", "everything that is grey"),
)


def arrow(axes, start, end):
    """An arrow along which vectors flow."""
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
    )


def linear(axes, x, y, name, inside):
    """A frozen linear layer with BitFit's bias at its corner; "lora": with LoRA's two matrices in it."""
    box(axes, x, y + HIGH / 2, WIDE, HIGH, FROZEN)
    say(axes, x + (0.2 if inside else WIDE / 2), y, name, ha="center", fontsize=14)
    if inside:
        box(axes, x + 0.4, y + 0.24, 0.13, 0.48, TRAINED, 1.4)
        box(axes, x + 0.57, y + 0.24, 0.36, 0.13, TRAINED, 1.4)
    box(axes, x + WIDE - 0.3, y - HIGH / 2 + 0.1, 0.36, 0.24, TRAINED, 1.2)
    say(axes, x + WIDE - 0.12, y - HIGH / 2 - 0.03, "+b", ha="center", fontsize=9)


def adapter(axes, x):
    """A bottleneck: wide, narrow, wide."""
    half, waist = 0.55, 0.16
    edge = [(0, half), (0.3, waist), (0.6, half), (0.6, -half), (0.3, -waist), (0, -half)]
    corners = [(x + dx, MIDDLE + dy) for dx, dy in edge]
    axes.add_patch(Polygon(corners, facecolor=TRAINED, edgecolor=INK, linewidth=1.6))
    say(axes, x + 0.3, MIDDLE + 0.78, "adapter", ha="center", fontsize=11, style="italic")


def sign(axes, x, y, text, colour, radius=0.2):
    """A round sign: + where two streams are added, × where numbers are multiplied."""
    axes.add_patch(Circle((x, y), radius, facecolor=colour, edgecolor=INK, linewidth=1.4, zorder=3))
    say(axes, x, y, text, ha="center", va="center_baseline", fontsize=13, zorder=4)


def half(axes, begin, end, name):
    """The way from the residual stream through a norm to the layers, and from the last one back to it."""
    norm = begin - 0.7
    arrow(axes, (norm, RESIDUAL), (norm, MIDDLE - 0.55))
    box(axes, norm - 0.25, MIDDLE + 0.55, 0.5, 1.1, FROZEN)
    say(axes, norm, MIDDLE, "norm", ha="center", rotation=90)
    axes.plot([end - 0.35, end, end], [MIDDLE, MIDDLE, RESIDUAL + 0.2], color=INK, linewidth=1)
    sign(axes, end, RESIDUAL, "+", "white")
    say(axes, begin - 0.95, 6.65, name, fontsize=12, style="italic")


def draw():
    """The whole picture."""
    figure, axes = plt.subplots(figsize=(14.8, 7.9))
    axes.set(xlim=(-0.1, 16.1), ylim=(-1.55, 7.05))
    axes.axis("off")
    box(axes, 2.75, 7.0, 13.3, 5.55, BAND, 0)
    say(axes, 3.05, 1.72, "one of L blocks", style="italic")
    say(axes, 0, 3.75, "prompt tuning", style="italic", fontsize=11)
    for k in range(2):
        vector(axes, k * 0.5, 3.45, 0.45, TALL)
        box(axes, 1.1 + k * 0.5, 3.45, 0.45, TALL, FROZEN)
    say(axes, 1.1, 2.75, "the text's words,\nas vectors", fontsize=11)
    axes.plot([0.8, 0.8], [3.0, RESIDUAL], color=INK, linewidth=1)
    arrow(axes, (0.8, RESIDUAL), (16.05, RESIDUAL))
    half(axes, ATTENTION, ATTENTION + 5.75, "attention")
    half(axes, FORWARD, FORWARD + 4.7, "feed-forward")
    for start, end in ARROWS:
        arrow(axes, start, end)
    for layer in LINEAR:
        linear(axes, *layer)
    box(axes, ATTENTION + 2.1, MIDDLE + 0.8, 1.15, 1.6, FROZEN)
    say(axes, ATTENTION + 2.675, MIDDLE, "softmax\n(q kᵀ) v", ha="center")
    for k, name in enumerate(("keys", "values")):
        box(axes, ATTENTION + 1.82 + 0.88 * k, MIDDLE + 1.86, 0.8, TALL, TRAINED, 1.6)
        say(axes, ATTENTION + 2.22 + 0.88 * k, MIDDLE + 1.67, name, ha="center", fontsize=11)
    arrow(axes, (ATTENTION + 2.675, MIDDLE + 1.48), (ATTENTION + 2.675, MIDDLE + 0.8))
    say(
        axes,
        ATTENTION + 2.675,
        MIDDLE + 2.1,
        "prefix tuning",
        ha="center",
        fontsize=11,
        style="italic",
    )
    for x, y in SCALED:
        sign(axes, x, y, "×", TRAINED)
        say(axes, x, y + 0.36, "IA³", ha="center", fontsize=11, style="italic")
    sign(axes, FORWARD + 1.6, MIDDLE, "⊙", "white", 0.18)
    say(axes, ATTENTION + 0.72, MIDDLE + 1.58, "LoRA", ha="center", fontsize=11, style="italic")
    say(axes, ATTENTION + 0.72, MIDDLE - 0.62, "LoRA", ha="center", fontsize=11, style="italic")
    say(axes, FORWARD + WIDE + 0.15, MIDDLE - 0.98, "BitFit", fontsize=11, style="italic")
    adapter(axes, ATTENTION + 4.8)
    adapter(axes, FORWARD + 3.75)
    for k, (name, formula, words) in enumerate(LEGEND):
        x, y = (0, 8.3)[k // 4], 0.95 - 0.65 * (k % 4)
        say(axes, x, y, name, weight="bold")
        say(axes, x + 1.75, y, formula, fontsize=14)
        say(axes, x + 4.25, y, words)
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


def main() -> None:
    plt.rcParams |= {"svg.hashsalt": "minicpt", "font.family": "DejaVu Sans"}
    figure = draw()
    figure.savefig(DOCS / "peft_map.svg", metadata={"Date": None})
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    Image.open(picture).convert("RGB").quantize(48).save(DOCS / "peft_map.png", optimize=True)


if __name__ == "__main__":
    main()

"""How time and memory grow, beside PEFT's: with shots, classes, the text's length, and the model's size.

    make growth
    python tests/bench/growth.py --out results/growth      the same

Each point is a process of its own and leaves one small JSON file: a stopped run goes on where it stopped. Weights are
random, for speed does not depend on them. All runs on one core, and its seconds are counted, so that neighbours disturb
little. A step has four rows. Where PEFT's would take more than LARGEST, it runs with two rows or one, and its time and
memory are multiplied: all that PEFT computes, it computes for each row anew. Scoring a query compares all labels.
minicpt's time is that of a query among many, which find the context's cache there, its memory that of the first. Loss,
gradient and scores of both libraries have to agree, on a short context, before anything is timed.
"""

import argparse
import ctypes
import json
import math
import resource
import statistics
import textwrap
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from bench import COLOURS, both, peak_mb, status_mb, train_step
from tqdm import tqdm

from minicpt.core.templates import Encoded
from minicpt.engine.memory import training_bytes
from minicpt.engine.prefix import KeptPrefix
from minicpt.engine.scores import label_scores
from minicpt.errors import print_any_text
from minicpt.lab.store import write_atomically

ROWS = 4
LARGEST = 6.5e9  # bytes by `training_bytes`, which is on the safe side
BOUND = 9e9  # bytes that a point's process may map beyond those it starts with
MEMORY = 16.0  # gigabytes that a laptop or a small card has
SECONDS = 5.0  # of repeating what takes less
LIBRARIES = ("PEFT", "minicpt")
# millions of weights: vocabulary, width, inner width, layers, heads, key-value heads; the last is SmolLM2's shape
SIZES = {
    1: (4096, 96, 256, 6, 3, 3),
    8: (8192, 256, 688, 8, 4, 4),
    42: (32000, 512, 1376, 8, 8, 8),
    135: (49152, 576, 1536, 30, 9, 3),
}


@dataclass(frozen=True)
class Point:
    """What is measured: K examples with texts of so many tokens, C labels of so many tokens, millions of weights."""

    axis: str
    value: int
    K: int = 6
    text: int = 25
    C: int = 2
    label: int = 1
    size: int = 42

    def example(self) -> list[int]:
        """The roles of an example in the context."""
        return [1] * 5 + [2] * self.text + [0] + [3] * 6 + [4] * self.label + [0] * 2


POINTS = [
    *(Point("shots", K, K=K) for K in (2, 6, 12, 25, 50)),
    # an example of each class; short texts, and label words of several tokens, as in BANKING77
    *(Point("classes", C, K=C, text=14, C=C, label=4) for C in (2, 8, 25, 77)),
    *(Point("length", text, text=text) for text in (16, 64, 256, 1024)),
    *(Point("size", size, size=size) for size in SIZES),
]
AXES = {  # title, what is the same everywhere, what varies, and its name in a sentence
    "shots": ("Shots", "texts of 25 tokens, 42 M weights", "examples in the context", "examples"),
    "classes": (
        "Classes",
        "texts of 14, labels of 4 tokens",
        "classes, an example of each",
        "classes",
    ),
    "length": (
        "Length of the texts",
        "6 examples, 42 M weights",
        "tokens in each text",
        "tokens a text",
    ),
    "size": (
        "Size of the model",
        "6 examples, texts of 25 tokens",
        "weights (millions)",
        "weights",
    ),
}


def base_model(size: int):
    """A frozen Llama of so many million random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads")
    options = dict(zip(names, SIZES[size]))
    config = LlamaConfig(**options, max_position_embeddings=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


class Work:
    """The calls of one point: a step and scoring, by PEFT (`rows` at once) and by minicpt."""

    def __init__(self, base, point: Point):
        example = point.example()
        self.models, self.kept = both(base, point.K, example), KeptPrefix()
        P, T = point.K * len(example), len(example) - 2  # a row ends with its label
        halves = [ROWS, ROWS // 2, 1]
        fits = [training_bytes(base, n, P, T, False, P + T) <= LARGEST for n in halves]
        self.rows = halves[fits.index(True)]
        draw = partial(torch.randint, 5, base.config.vocab_size)
        self.ids = draw((ROWS, T), generator=torch.Generator().manual_seed(2))
        self.types = torch.tensor([example[:T]] * ROWS)
        labels = draw((point.C, point.label), generator=torch.Generator().manual_seed(3))
        self.candidates = labels.tolist()
        self.beginnings = sorted({tuple(ids[:-1]) for ids in self.candidates})
        n_queries = math.ceil(ROWS / len(self.beginnings))  # four rows are enough to time
        self.queries = self.ids[:n_queries, : T - point.label]
        # PEFT takes [query, beginning] rows; all of one length
        self.scored = [*product(range(n_queries), self.beginnings)][: self.rows]

    def step(self, library: str, rows: int):
        """Loss and gradient of the first rows."""
        ids = self.ids[:rows]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        return train_step(self.models[library], batch | {"input_type_mask": self.types[:rows]})

    @torch.no_grad()
    def score_by_peft(self) -> dict[tuple[int, int], float]:
        """Scores (query, label) of the first rows, with the head where it is needed, as a careful user asks."""
        rows = [torch.cat((self.queries[n], torch.tensor(ids))) for n, ids in self.scored]
        ids, n_label = torch.stack(rows).long(), len(self.candidates[0])
        call = self.models["PEFT"]
        output = call(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=n_label)
        log_p, scores = output.logits.log_softmax(-1), {}  # (rows, n_label, V)
        for (n, beginning), of_row in zip(self.scored, log_p):
            for c, label in enumerate(self.candidates):
                if tuple(label[:-1]) == beginning:
                    scores[n, c] = of_row[range(n_label), label].sum().item()
        return scores

    @torch.no_grad()
    def score(self):
        """Scores of all labels after the queries, (n, C), with four rows at a time as well."""
        model = self.models["minicpt"]
        prompt = model.get_prompt(batch_size=1)
        queries = [Encoded(ids, [0] * len(ids)) for ids in self.queries.tolist()]
        options = {"batch_size": ROWS, "kept": self.kept}
        return label_scores(model.base_model, prompt, queries, self.candidates, **options)

    def calls(self) -> dict[tuple[str, str], tuple]:
        """(what, library) -> the call, and by what its time and its memory are to be multiplied."""
        more = ROWS / self.rows
        a_query = len(self.beginnings) / len(self.scored)
        return {
            ("step", "PEFT"): (partial(self.step, "PEFT", self.rows), more, more),
            ("step", "minicpt"): (partial(self.step, "minicpt", ROWS), 1, 1),
            ("score", "PEFT"): (self.score_by_peft, a_query, more),
            ("score", "minicpt"): (self.score, 1 / len(self.queries), 1),
        }

    def check_equal(self) -> None:
        """Raise `AssertionError` unless both libraries have the same loss, gradient and scores."""
        (loss, grad), (loss_, grad_) = (self.step(library, self.rows) for library in LIBRARIES)
        torch.testing.assert_close(loss_, loss, rtol=1e-4, atol=0)
        assert (grad - grad_).norm() < 1e-4 * grad.norm(), "the gradients differ"
        scores = self.score()
        for (n, c), expected in self.score_by_peft().items():
            assert math.isclose(scores[n, c], expected, abs_tol=1e-3), "the scores differ"


def return_freed(size: int) -> None:
    """Let the allocator give freed blocks of so many bytes back at once: a peak is then what is in use."""
    libc, (trim, mmap) = ctypes.CDLL("libc.so.6"), (-1, -3)
    libc.mallopt(trim, size)
    libc.mallopt(mmap, size)


def timed(call) -> float:
    """Seconds of one core that a call takes: with one thread and nobody else there, those of the clock."""
    start = time.process_time()
    call()
    return time.process_time() - start


def first_call(call) -> tuple[float, float]:
    """Seconds and megabytes of a call."""
    seconds: list[float] = []
    megabytes = peak_mb(lambda: seconds.append(timed(call)), "cpu")
    return seconds[0], megabytes


def measure(point: Point) -> list[dict]:
    """The point's rows of the table."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    most = int(status_mb("VmSize") * 2**20 + BOUND)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    base = base_model(point.size)
    Work(base, replace(point, K=2, C=2, text=16)).check_equal()
    work = Work(base, point)
    calls = work.calls()
    return_freed(2**16)
    first = {key: first_call(call) for key, (call, _, _) in calls.items()}
    return_freed(2**25)
    # a long call has been timed with that; minicpt's first query was the one that runs the context
    known = {key: [seconds] for key, (seconds, _) in first.items() if seconds > SECONDS}
    known.pop(("score", "minicpt"), None)
    again, started = {key: [] for key in calls if key not in known}, time.process_time()
    while not all(again.values()) or time.process_time() - started < SECONDS:
        for key, times in again.items():
            times.append(timed(calls[key][0]))
    rows = []
    for key, times in (known | again).items():
        _, more_time, more_memory = calls[key]
        row = {"axis": point.axis, "value": point.value, "what": key[0], "library": key[1]}
        row["seconds"] = more_time * statistics.median(times)
        row["gigabytes"] = more_memory * first[key][1] * 2**20 / 1e9
        row["rows"] = work.rows if key[1] == "PEFT" else ROWS
        rows.append(row)
    return rows


def measured(point: Point, folder: Path, machine: dict) -> list[dict]:
    """The point's rows, from its file if that is there; else from a process of its own."""
    path, asked = folder / f"{point.axis}_{point.value}.json", asdict(point) | machine
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["asked"] == asked:
            return kept["rows"]
    context = get_context("forkserver")  # loads the libraries once for all points
    context.set_forkserver_preload(["bench", "minicpt.dropin.model", "transformers.models.llama"])
    with ProcessPoolExecutor(1, context) as pool:
        rows = pool.submit(measure, point).result()
    write_atomically(path, json.dumps({"asked": asked, "rows": rows}, indent=1) + "\n")
    return rows


def slope(points: pd.DataFrame, quantity: str) -> float:
    """Exponent of growth: a quantity that grows as value ** slope, fitted on logarithms."""
    return np.polyfit(np.log(points.value), np.log(points[quantity]), 1)[0]


def words(table: pd.DataFrame) -> str:
    """The slopes, and how far apart the libraries are at both ends, in Markdown."""
    text = ""
    for axis, (_, _, _, name) in AXES.items():
        lines = dict(list(table[table.axis == axis].groupby(["what", "library"])))
        times, ends = {}, {}
        for key in product(("step", "score"), ("seconds", "gigabytes")):
            what, quantity = key
            peft, ours = (lines[what, library] for library in LIBRARIES)
            times[key] = [2 ** slope(line, quantity) for line in (peft, ours)]
            ratios = peft[quantity].to_numpy() / ours[quantity].to_numpy()
            ends[key] = f"{ratios[0]:.1f} to {ratios[-1]:.1f}"
        step, memory = times["step", "seconds"], times["step", "gigabytes"]
        query, values = times["score", "seconds"], lines["step", "PEFT"].value.to_numpy()
        text += (
            f"- **Twice as many {name}:** a step takes {step[0]:.1f} times as long with PEFT and {step[1]:.1f} times "
            f"with minicpt, and needs {memory[0]:.1f} and {memory[1]:.1f} times the memory; scoring a query takes "
            f"{query[0]:.1f} and {query[1]:.1f} times as long. From {values[0]:,} to {values[-1]:,}, PEFT ÷ minicpt "
            f"goes from {ends['step', 'seconds']} for the time of a step, from {ends['step', 'gigabytes']} for its "
            f"memory, and from {ends['score', 'seconds']} for a query.\n"
        )
    steps = table[table.what == "step"].set_index(["axis", "value", "library"]).gigabytes
    for (axis, value), pair in steps.unstack().iterrows():
        if pair["PEFT"] > MEMORY > pair["minicpt"]:
            text += (
                f"- With {value:,} {AXES[axis][3]} PEFT's step would need {pair['PEFT']:.0f} GB beside the weights; "
                f"minicpt's takes {pair['minicpt']:.1f} GB.\n"
            )
    lines = [textwrap.fill(line, 119, subsequent_indent="  ") for line in text.splitlines()]
    return "\n".join(lines) + "\n"


def figure(table: pd.DataFrame):
    """Time above, memory below, a column an axis, all logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    result, panels = pyplot.subplots(
        2, len(AXES), figsize=(11, 6), sharex="col", sharey="row", layout="constrained"
    )
    styles = {"step": "-", "score": "--"}
    for column, (axis, (name, same, values, _)) in zip(panels.T, AXES.items()):
        here = table[table.axis == axis]
        for panel, quantity in zip(column, ("seconds", "gigabytes")):
            for (what, library), line in here.groupby(["what", "library"]):
                look = {"color": COLOURS[library], "linestyle": styles[what], "linewidth": 1.4}
                panel.plot(line.value, line[quantity], **look)
                for hollow, some in line.groupby(line.rows < ROWS):
                    face = "white" if hollow else COLOURS[library]
                    dots = {"color": COLOURS[library], "markerfacecolor": face, "zorder": 3}
                    panel.plot(some.value, some[quantity], "o", markersize=4.5, **dots)
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(here.value.unique(), [f"{x:,}" for x in here.value.unique()])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        column[0].set_title(f"{name}\n", fontsize=11)
        column[0].text(0.5, 1.03, same, fontsize=8, ha="center", transform=column[0].transAxes)
        column[1].set_xlabel(values)
        column[1].axhline(MEMORY, color="#777777", linestyle=":")
        beyond = here[(here.what == "step") & (here.gigabytes > MEMORY)]
        for point in beyond.itertuples():
            note = f"would need\n{point.gigabytes:.0f} GB"
            at = {"xytext": (-8, 0), "textcoords": "offset points", "ha": "right", "va": "bottom"}
            column[1].annotate(note, (point.value, point.gigabytes), fontsize=8, **at)
    panels[0, 0].set_ylabel("time (s, one core)")
    panels[1, 0].set_ylabel("memory beside the weights (GB)")
    names = {"step": "training step, 4 rows", "score": "scoring a query"}
    handles = [
        Line2D([], [], color=COLOURS[library], linestyle=styles[what], label=f"{library}, {name}")
        for library, (what, name) in product(LIBRARIES, names.items())
    ]
    hollow = {"color": COLOURS["PEFT"], "markerfacecolor": "white", "linestyle": ""}
    handles += [
        Line2D([], [], marker="o", **hollow, label="from fewer rows"),
        Line2D([], [], color="#777777", linestyle=":", label="16 GB"),
    ]
    result.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return result


def main() -> None:
    print_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/growth"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    rows = []
    for point in tqdm(POINTS, unit="point"):
        rows += measured(point, args.out, versions)
    table = pd.DataFrame(rows)
    write_atomically(args.out / "growth.csv", table.to_csv(index=False, float_format="%.4g"))
    write_atomically(args.out / "growth.md", words(table))
    figure(table).savefig(args.out / "growth.png", dpi=100)
    print(f"{words(table)}\nWritten: {args.out}/growth.csv, .md, .png")


if __name__ == "__main__":
    main()

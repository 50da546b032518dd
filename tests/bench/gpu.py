"""What a GPU shows, in pieces: equal to the CPU, the notebooks, speed beside PEFT, the table on SmolLM2.

    make gpu                                                  all of it; stopped, it goes on at the next call
    python tests/bench/gpu.py --device cuda --out results/gpu the same
    python tests/bench/gpu.py --list                          the pieces, and which are done
    python tests/bench/gpu.py --only speed/SmolLM2-135M       some of them (a beginning of their names will do)
    python tests/bench/gpu.py --minutes 9                     begins no piece later than that, for a short lease

A piece takes less than ten minutes and leaves one file in results/gpu/. It counts as done if it was made on the same
device with the same versions and settings. What cannot be run here (no weights, no data, too little memory) is skipped
with its reason and tried again at the next call. However it ends, report.md and report.html say what there is; after
data_scripts/update_readme.py docs/speed.md shows it, to which notebook 09 points.

Models of the speed stage have random weights, for speed does not depend on them, at their full depth. `--tiny` shrinks
everything to a dry run of seconds: it shows that the script works, and nothing else.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import bench
import torch

import minicpt
from minicpt.engine import memory
from minicpt.errors import MiniCPTError, print_any_text

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 570  # seconds that a piece may take
SHAPES = {"SmolLM2-135M": ("Llama", bench.SMOLLM2)}
SHAPES |= {name: bench.SIZES["cuda"][name] for name in ("BLOOM-1.7B", "GPT-J-6B", "Llama-3-8B")}
TINY_SHAPES = {
    "tiny": (
        "Llama",
        bench.SMOLLM2
        | dict(vocab_size=300, hidden_size=36, intermediate_size=48, num_hidden_layers=2),
    )
}
DATASETS = ("sst2", "ag_news", "dbpedia", "trec")  # those of the SmolLM2 table
METHODS_OF_TABLE = ("zero", "icl", "pt", "ipt", "lora", "cpt")
# a step's first loss is rounding alone; later ones drift apart, and so do scores after a training
FIRST_LOSS, DRIFT = 1e-3, 5e-2


class Skip(Exception):
    """This piece cannot be run here; the text says why."""


class Unfinished(Exception):
    """The time of this piece is up; the next call goes on from what there is."""


@dataclass(frozen=True)
class Settings:
    device: str
    out: Path
    tiny: bool
    notebooks: Path

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def of_machine(self) -> dict:
        """What a result depends on; a piece made under another is done again."""
        name = torch.cuda.get_device_name() if self.cuda else platform.machine()
        packages = {
            package: version(package) for package in ("torch", "transformers", "peft", "minicpt")
        }
        return {"device": self.device, "name": name, "tiny": self.tiny, **packages}


@dataclass(frozen=True)
class Piece:
    """`name` is "stage/what"; `run` returns what there is to report, as JSON."""

    name: str
    run: Callable[[], dict]


# ---- equality with the CPU ------------------------------------------------------------------------------------------


def small_task(settings: Settings):
    from minicpt import load_task, make_split

    return make_split(load_task("trec"), 4, 0, 4 if settings.tiny else 40)


def equality(settings: Settings, method: str) -> dict:
    """Fit and score on the micro model, on the CPU and on the device, in float32 without TF32."""
    from minicpt import fit, load_base
    from minicpt.methods.registry import METHODS

    split, found = small_task(settings), {}
    hp = {"epochs": 2 if settings.tiny else 20} if METHODS[method].trains else {}
    for device in ("cpu", settings.device):
        predictor = fit(method, load_base("micro", device), split, hp)
        scores = predictor.scores([text for text, _ in split.queries])[0].log_softmax(-1)
        found[device] = torch.tensor(predictor.history), scores
    (losses, scores), (losses_, scores_) = found["cpu"], found[settings.device]
    relative = ((losses - losses_).abs() / losses.abs()).tolist() or [0.0]
    result = {
        "first loss": relative[0],
        "largest in training": max(relative),
        "scores": (scores - scores_).abs().max().item(),
        "same answers": (scores.argmax(-1) == scores_.argmax(-1)).float().mean().item(),
    }
    if result["first loss"] > FIRST_LOSS or result["same answers"] < 1 - DRIFT:
        raise AssertionError(f"{method} is not what it is on the CPU: {result}")
    return result


def waits(settings: Settings) -> dict:
    """How often Python waits for the GPU in a training, by torch's own count, a step."""
    from minicpt import fit, load_base
    from minicpt.methods.registry import METHODS

    if not settings.cuda:
        raise Skip("only CUDA counts how often it is waited for (torch.cuda.set_sync_debug_mode)")
    base, split, found = load_base("micro", settings.device), small_task(settings), {}
    for method in [method for method in METHODS if METHODS[method].trains]:
        counts = []
        for epochs in (10, 30):
            fit(method, base, split, {"epochs": epochs})
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fit(method, base, split, {"epochs": epochs})
            torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchroniz" in str(w.message) for w in caught))
        found[method] = (counts[1] - counts[0]) / 20  # what is done once is not counted
    return found


def attention(settings: Settings, shape: str) -> dict:
    """Which kernels attention takes in a CPT step, by the profiler's names."""
    from torch.profiler import ProfilerActivity, profile

    base = model_of(settings, shape)
    model, batch = bench.wrap(minicpt, base, 6), bench.batch_of(base, 4)
    bench.train_step(model, batch)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        bench.train_step(model, batch)
    kernels = {
        event.key.removeprefix("aten::_"): event.count
        for event in recorded.key_averages()
        if event.key.startswith("aten::_scaled_dot_product") and not event.key.endswith("backward")
    }
    implementation = base.config._attn_implementation
    if not kernels:
        kernels = {
            f"{implementation} attention of transformers, which holds its matrix": base.config.num_hidden_layers
        }
    return kernels


# ---- notebooks ------------------------------------------------------------------------------------------------------


def takes_device(path: Path) -> bool:
    """Whether a notebook is marked for a GPU: its parameters cell has a `device`."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    # `device = ...`, or one of several names on the left
    return any("device" in line.split("=")[0] for text in sources for line in text.splitlines())


def notebook(settings: Settings, path: Path) -> dict:
    import papermill

    target = settings.out / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    parameters = {"device": settings.device}
    if path.stem.startswith("14_"):
        require_smollm2()
        require_data()
    try:
        papermill.execute_notebook(
            str(path),
            str(target),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=str(path.parent),
            execution_timeout=LIMIT,
            progress_bar=False,
        )
    except papermill.PapermillExecutionError as error:
        raise AssertionError(f"cell {error.cell_index}: {error.ename}: {error.evalue}") from None
    return {"executed": target.name}


# ---- speed beside PEFT ----------------------------------------------------------------------------------------------


def model_of(settings: Settings, shape: str):
    """A frozen model of this shape with random weights, if it fits."""
    import transformers

    family, options = (TINY_SHAPES if settings.tiny else SHAPES)[shape]
    config = getattr(transformers, f"{family}Config")(**options)
    dtype = torch.bfloat16 if settings.cuda else torch.float32
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    # PEFT's step on four whole rows is what needs most
    needed = memory.weight_bytes(empty) + memory.training_bytes(empty, 4, 240, 40, shared=False)
    free = memory.free_memory(torch.device(settings.device))
    if needed > free:
        raise Skip(
            f"{shape} needs about {memory.gib(needed)} with PEFT's step, and {memory.gib(free)} are free"
        )
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def milliseconds(settings: Settings, function) -> float:
    """One call: between two CUDA events, which the GPU stamps itself; on a CPU by the clock."""
    if not settings.cuda:
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    function()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def in_turn(settings: Settings, functions: dict) -> dict:
    """Median of each function's calls, after one to warm up; they take turns, so that none has the quieter time."""
    rounds, times = 2 if settings.tiny else 15, {name: [] for name in functions}
    for function in functions.values():
        function()
    started = time.perf_counter()
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(milliseconds(settings, function))
        if time.perf_counter() - started > 60:
            break
    return {name: statistics.median(each) for name, each in times.items()}


def speed(settings: Settings, shape: str) -> dict:
    """A training step and scoring, PEFT, ours and the limit of `bench.py`: equal first, then milliseconds and MB."""
    base = model_of(settings, shape)
    models, result = bench.both(base, 6), {"equality": {}, "steps": {}, "memory (MB)": {}}
    for rows in (4, 1):
        result["equality"][f"B={rows}"] = bench.check_equal(base, models, rows)
        functions = bench.steps(base, models, 6, rows)
        result["steps"][f"B={rows}"] = in_turn(settings, functions)
        result["memory (MB)"][f"B={rows}"] = {
            name: bench.peak_mb(function, settings.device) for name, function in functions.items()
        }
    times = bench.scoring(base, models, settings.device, 0 if settings.tiny else 10)
    result["scoring, ms a query"] = {
        f"batch {rows}": {name: each["median_ms"] for name, each in of_batch.items()}
        for rows, of_batch in times.items()
    }
    return result


def cell(settings: Settings, shape: str) -> dict:
    """A cell, end to end: train on four rows, then score queries against labels of two tokens.

    PEFT as its users write it: the same steps, then a pass for each query and each label.
    """
    base = model_of(settings, shape)
    steps, queries, labels = (2, 2, 2) if settings.tiny else (25, 16, 6)
    batch, found = bench.batch_of(base, 4), {}
    ids = bench.batch_of(base, queries)["input_ids"]
    candidates = [[7 + n, 8 + n] for n in range(labels)]

    def train(model) -> None:
        weight = model.prompt_encoder["default"].delta_embedding.weight
        optimizer = torch.optim.AdamW([weight], 1e-3, weight_decay=0.0)
        for _ in range(steps):
            bench.train_step(model, batch)
            optimizer.step()

    @torch.no_grad()
    def score_by_peft(model) -> torch.Tensor:
        scores = torch.empty(queries, labels)
        for q, n in [(q, n) for q in range(queries) for n in range(labels)]:
            answer = torch.tensor(candidates[n], device=ids.device)
            row = torch.cat((ids[q], answer))[None]
            logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -3:-1]
            scores[q, n] = logits.float().log_softmax(-1).gather(1, answer[:, None]).sum()
        return scores

    scorers = {"PEFT": score_by_peft, "minicpt": lambda model: model.score(ids, candidates)}
    for name, model in bench.both(base, 6).items():
        train(model)  # warm
        seconds, scores = [], []
        for work in (lambda: train(model), lambda: scores.append(scorers[name](model))):
            seconds.append(milliseconds(settings, work) / 1000)
        found[name] = {"fit": seconds[0], "score": seconds[1], "both": sum(seconds)}
        found[name]["scores"] = scores[0].log_softmax(-1)
    apart = (found["PEFT"].pop("scores") - found["minicpt"].pop("scores")).abs().max().item()
    if apart > (0.5 if settings.cuda else 1e-2):  # bfloat16, after a training
        raise AssertionError(f"The libraries' scores differ by {apart}: no time is told.")
    return {
        "seconds": found,
        "scores differ by": apart,
        "steps": steps,
        "queries": queries,
        "labels": labels,
    }


# ---- the table on SmolLM2 -------------------------------------------------------------------------------------------


def require_smollm2() -> None:
    from minicpt.engine.sources import locate

    try:
        locate("smollm2")
    except (MiniCPTError, ImportError) as error:
        raise Skip(
            f"SmolLM2's weights are not here: {str(error).splitlines()[0][:200]} (make smollm2)"
        ) from None


def require_data() -> None:
    if not os.environ.get("MINICPT_DATA"):
        raise Skip(
            "MINICPT_DATA names no folder of real data (python data_scripts/prepare_data.py)"
        )


def table(settings: Settings, dataset: str) -> dict:
    """Ten seeds of one data set through `python -m minicpt table`, whose store knows what is done."""
    require_smollm2()
    require_data()
    out = settings.out / "smollm2"
    command = [sys.executable, "-m", "minicpt", "table", "--model", "smollm2", "--data", "real"]
    command += [
        "--datasets",
        dataset,
        "--methods",
        *METHODS_OF_TABLE,
        "--shots",
        "4",
        "--seeds",
        "10",
    ]
    command += ["--n-test", "200", "--device", settings.device, "--out", str(out)]
    if settings.tiny:
        command.append("--dry-run")
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise Unfinished("finished cells are kept in its store") from None
    if run.returncode:
        raise AssertionError((run.stderr.strip() or run.stdout.strip())[-400:])
    return {"command": " ".join(["python", *command[1:]]), "printed": run.stdout[-4000:]}


# ---- pieces ---------------------------------------------------------------------------------------------------------


def pieces(settings: Settings) -> list[Piece]:
    from minicpt.methods.registry import METHODS

    shapes = TINY_SHAPES if settings.tiny else SHAPES
    methods = ("pt", "cpt") if settings.tiny else METHODS
    books = [path for path in sorted(settings.notebooks.glob("[0-9]*.ipynb")) if takes_device(path)]
    listed = [("equality", method, equality, method) for method in methods]
    listed += [("attention", shape, attention, shape) for shape in shapes]
    listed += [("notebooks", path.stem, notebook, path) for path in books]
    listed += [("speed", shape, speed, shape) for shape in shapes]
    listed += [("cell", shape, cell, shape) for shape in shapes]
    listed += [("table", dataset, table, dataset) for dataset in DATASETS]
    found = [
        Piece(f"{stage}/{what}", lambda work=work, of=of: work(settings, of))
        for stage, what, work, of in listed
    ]
    return [Piece("waits/methods", lambda: waits(settings)), *found]


def file_of(settings: Settings, piece: Piece) -> Path:
    return settings.out / f"{piece.name.replace('/', '_')}.json"


def result_of(settings: Settings, piece: Piece) -> dict:
    """What the piece's file says, {} if there is none or it is of another machine."""
    with contextlib.suppress(OSError, ValueError):
        result = json.loads(file_of(settings, piece).read_text(encoding="utf-8"))
        if result["machine"] == settings.of_machine():
            return result
    return {}


def run_piece(settings: Settings, piece: Piece) -> dict:
    """Run it and write its file, whatever comes of it: done, skipped, unfinished or failed."""
    started = time.perf_counter()
    try:
        outcome = {"state": "done", "result": piece.run()}
    except Skip as reason:
        outcome = {"state": "skipped", "reason": str(reason)}
    except Unfinished as reason:
        outcome = {"state": "unfinished", "reason": str(reason)}
    except Exception as error:
        if memory.is_out_of_memory(error):
            outcome = {"state": "skipped", "reason": f"out of memory: {str(error).splitlines()[0]}"}
        else:
            where = traceback.format_exc(limit=-2)
            outcome = {
                "state": "failed",
                "reason": f"{type(error).__name__}: {error}",
                "where": where,
            }
    gc.collect()
    if settings.cuda:
        torch.cuda.empty_cache()
    seconds = round(time.perf_counter() - started, 1)
    outcome |= {"piece": piece.name, "machine": settings.of_machine(), "seconds": seconds}
    path = file_of(settings, piece)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    os.replace(new, path)
    return outcome


# ---- the report -----------------------------------------------------------------------------------------------------


def number(x: float) -> str:
    if x and (abs(x) < 1e-2 or abs(x) >= 1e5):
        return f"{x:.0e}"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def pipes(header: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    lines = [header, ["---"] + ["---:" if numbers else "---"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def of_stage(results: dict, stage: str) -> dict:
    """What was done in a stage: the part of the name after the slash -> result."""
    return {
        name.split("/")[1]: result["result"]
        for name, result in results.items()
        if name.startswith(f"{stage}/") and result.get("state") == "done"
    }


def equality_section(found: dict) -> str:
    header = ["method", "first loss", "largest in training", "scores", "same answers"]
    rows = [[name, *(number(result[key]) for key in header[1:])] for name, result in found.items()]
    return (
        "Relative differences of losses, largest difference of label log-scores, share of equal answers.\n\n"
        + pipes(header, rows)
    )


def waits_section(found: dict) -> str:
    (result,) = found.values()
    return pipes(["method", "waits a step"], [[name, number(n)] for name, n in result.items()])


def attention_section(found: dict) -> str:
    rows = [
        [shape, ", ".join(f"{n} × {kernel}" for kernel, n in kernels.items())]
        for shape, kernels in found.items()
    ]
    return pipes(["model", "kernels of a CPT step"], rows, numbers=False)


def notebooks_section(found: dict) -> str:
    return "Executed from the first cell to the last: " + ", ".join(found) + ".\n"


def speed_section(found: dict) -> str:
    rows = []
    for shape, result in found.items():
        for what, unit in (
            ("steps", "ms"),
            ("memory (MB)", "MB"),
            ("scoring, ms a query", "ms a query"),
        ):
            for size, values in result[what].items():
                limit = values.get("limit")
                label = {"steps": "training step", "memory (MB)": "memory of the step"}.get(
                    what, "scoring"
                )
                ratios = [
                    f"**{values['PEFT'] / values['minicpt']:.1f}**",
                    f"{values['minicpt'] / limit:.2f}" if limit else "–",
                ]
                rows.append(
                    [
                        shape,
                        f"{label}, {size} ({unit})",
                        number(values["PEFT"]),
                        number(values["minicpt"]),
                        *ratios,
                    ]
                )
    header = [
        "model",
        "what (K=6, P=240, T=40)",
        "PEFT",
        "minicpt",
        "PEFT ÷ minicpt",
        "minicpt ÷ limit",
    ]
    return pipes(header, rows)


def cell_section(found: dict) -> str:
    rows = []
    for shape, result in found.items():
        peft, ours = result["seconds"]["PEFT"], result["seconds"]["minicpt"]
        size = f"{result['steps']} steps, {result['queries']} queries, {result['labels']} labels"
        for what in ("fit", "score", "both"):
            rows.append(
                [
                    shape,
                    f"{what} ({size})",
                    number(peft[what]),
                    number(ours[what]),
                    f"**{peft[what] / ours[what]:.1f}**",
                ]
            )
    return pipes(["model", "a cell, in seconds", "PEFT", "minicpt", "PEFT ÷ minicpt"], rows)


def table_section(found: dict) -> str:
    return "\n".join(
        f"`{result['command']}`\n\n```\n{result['printed'].strip()}\n```\n"
        for result in found.values()
    )


SECTIONS = {
    "equality": ("Equal to the CPU", equality_section),
    "waits": ("How often Python waits for the GPU", waits_section),
    "attention": ("What attention runs on", attention_section),
    "notebooks": ("Notebooks", notebooks_section),
    "speed": ("Training step, memory and scoring beside PEFT", speed_section),
    "cell": ("A cell, end to end", cell_section),
    "table": ("SmolLM2 on real text, ten seeds", table_section),
}


def report(settings: Settings, results: dict) -> str:
    """The report in Markdown: a section for each stage of which there is something, then what is missing and why."""
    machine = settings.of_machine()
    parts = ["Written by `make gpu` (tests/bench/gpu.py), by nobody's hand.\n"]
    if settings.tiny or not settings.cuda:
        parts.append(
            "**A dry run: this is not a GPU, and no number below says anything about one.**\n"
        )
    parts.append(", ".join(f"{key} {value}" for key, value in machine.items()) + ".\n")
    for stage, (title, section) in SECTIONS.items():
        if found := of_stage(results, stage):
            parts.append(f"### {title}\n\n{section(found)}")
    missing = {name: r for name, r in results.items() if r.get("state") != "done"}
    if missing:
        rows = [
            [
                name,
                r.get("state", "not run yet"),
                r.get("reason", "").replace("|", "/").replace("\n", " "),
            ]
            for name, r in missing.items()
        ]
        parts.append(
            "### What is missing, and why\n\n"
            + pipes(["piece", "state", "reason"], rows, numbers=False)
        )
    return "\n".join(parts)


STYLE = """body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{border:1px solid #999;padding:.2rem .5rem}"""


def write_report(settings: Settings, listed: list[Piece]) -> Path:
    import mistune

    results = {piece.name: result_of(settings, piece) for piece in listed}
    text, path = report(settings, results), settings.out / "report.md"
    settings.out.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    body = mistune.create_markdown(plugins=["table"])(text)
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>minicpt on a GPU</title><style>{STYLE}</style>'
    path.with_suffix(".html").write_text(
        f"{page}<h1>minicpt on a GPU</h1>{body}</html>", encoding="utf-8"
    )
    return path


def main() -> int:
    print_any_text()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--tiny", action="store_true", help="a dry run of seconds")
    parser.add_argument("--list", action="store_true", help="print the pieces and stop")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="NAME",
        help="these pieces, or those that begin so",
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no piece later than that"
    )
    parser.add_argument(
        "--notebooks", type=Path, default=ROOT / "notebooks", help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "PyTorch sees no CUDA device here, and nothing was run. On a machine with one: make gpu. A dry run without "
            "one: python tests/bench/gpu.py --device cpu --tiny"
        )
    settings = Settings(args.device, args.out, args.tiny, args.notebooks)
    listed, started, counts = pieces(settings), time.perf_counter(), Counter()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for piece in listed:
        outcome = result_of(settings, piece)
        if (
            not args.list
            and outcome.get("state") != "done"
            and piece.name.startswith(tuple(args.only))
        ):
            if time.perf_counter() - started > 60 * args.minutes:
                print(f"{'later':10} {piece.name}", flush=True)
                continue
            outcome = run_piece(settings, piece)
        state = outcome.get("state", "to do")
        counts[state] += 1
        print(f"{state:10} {piece.name} {outcome.get('reason', '')}"[:200].rstrip(), flush=True)
    if not args.list:
        print(f"{write_report(settings, listed)} and .html: {dict(counts)}")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())

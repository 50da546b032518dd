"""Training step, scoring and memory beside PEFT: equality first, then interleaved medians.

    make bench [DEVICE=cuda]
    python tests/bench/bench.py --device cpu --threads 2 --out results/bench     the same

CPU: 8 layers of width 512 with the vocabularies of Llama (32k), GPT-J (50k) and BLOOM (250k); CUDA:
the paper's models at full size, in bfloat16. Weights are random: speed does not depend on them. K=6
examples of 40 tokens, queries of 40.

"the limit" is what no implementation on this model can beat: the frozen decoder with a gradient to
its inputs only, on one row of the P + B*T distinct tokens, and the head at the K + B labels alone.
One cell of a table from end to end: cells.py, which `make bench` runs too.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

from minicpt.errors import print_any_text

# one example's roles: 40 tokens, one of them the label
EXAMPLE = [1] * 5 + [2] * 25 + [0] + [3] * 6 + [4] + [0] * 2
QUERY = [1] * 5 + [2] * 25 + [0] * 2 + [3] * 7 + [4]
T = len(QUERY)
WIDTH, LAYERS = 512, 8
SMOLLM2 = dict(  # SmolLM2-135M's configuration
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
)
SIZES = {
    "cpu": {
        "Llama, 32k": (
            "Llama",
            dict(
                vocab_size=32000,
                hidden_size=WIDTH,
                intermediate_size=1376,
                num_hidden_layers=LAYERS,
                num_attention_heads=8,
            ),
        ),
        "GPT-J, 50k": (
            "GPTJ",
            dict(
                vocab_size=50400,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=8,
                rotary_dim=32,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            ),
        ),
        "BLOOM, 250k": (
            "Bloom",
            dict(vocab_size=250880, hidden_size=WIDTH, n_layer=LAYERS, n_head=8),
        ),
    },
    "cuda": {
        "Llama-3-8B": (
            "Llama",
            dict(
                vocab_size=128256,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
            ),
        ),
        "GPT-J-6B": (
            "GPTJ",
            dict(vocab_size=50400, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        ),
        "BLOOM-1.7B": ("Bloom", dict(vocab_size=250880, hidden_size=2048, n_layer=24, n_head=16)),
    },
}
SHOTS = {"cpu": (2, 6, 12, 20), "cuda": (2, 6, 10, 20, 35, 50)}
ROWS = {"cpu": (1, 4, 12), "cuda": (1, 2, 4, 8, 16)}
SCORED = 16  # queries in a batch
COLOURS = {"PEFT": "#0072B2", "minicpt": "#D55E00", "limit": "#777777"}


def base_model(name: str, device: str):
    import transformers

    family, options = SIZES[device][name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def wrap(library, base, K: int, example: list[int] = EXAMPLE):
    """CPT over K examples of these roles; both libraries get the same ids."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(
        5, base.config.vocab_size, (K * len(example),), generator=generator
    ).tolist()
    types = [t + 4 * i if t else 0 for i in range(K) for t in example]
    config = library.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=ids,
        cpt_mask=[1] * len(ids),
        cpt_tokens_type_mask=types,
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.95,
        opt_projection_epsilon=0.2,
        opt_projection_format_epsilon=0.2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return library.get_peft_model(base, config)


def both(base, K: int, example: list[int] = EXAMPLE):
    import peft

    import minicpt

    libraries = {"PEFT": peft, "minicpt": minicpt}
    return {name: wrap(library, base, K, example) for name, library in libraries.items()}


def batch_of(base, B: int) -> dict:
    ids = torch.randint(
        5, base.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(B)
    ).to(base.device)
    types = torch.tensor([QUERY] * B, device=base.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "input_type_mask": types,
    }


def train_step(model, batch: dict):
    model.zero_grad()
    loss = model(
        **{**batch, "input_type_mask": batch["input_type_mask"].clone()}
    ).loss  # PEFT changes its caller's
    loss.backward()
    return loss.detach(), model.prompt_encoder["default"].delta_embedding.weight.grad


def limit_step(base, K: int, B: int) -> None:
    D = base.get_input_embeddings().weight.shape[1]
    rows = torch.randn(1, K * len(EXAMPLE) + B * T, D, device=base.device)
    leaf = (0.02 * rows).to(base.dtype).requires_grad_()
    hidden = base.base_model(inputs_embeds=leaf, use_cache=False).last_hidden_state
    logits = base.get_output_embeddings()(hidden[0, -(K + B) :])  # (labels, V)
    logits.float().log_softmax(-1)[:, 0].sum().backward()


def steps(base, models: dict, K: int, B: int) -> dict:
    """Name -> a training step of B rows, nothing returned."""
    batch = batch_of(base, B)
    functions = {
        name: lambda model=model: train_step(model, batch) for name, model in models.items()
    }
    return functions | {"limit": lambda: limit_step(base, K, B)}


def check_equal(base, models: dict, B: int) -> dict:
    """Both libraries' loss and gradient must agree before anything is timed."""
    (loss, grad), (loss_, grad_) = (
        train_step(model, batch_of(base, B)) for model in models.values()
    )
    differences = {
        "loss": abs(loss - loss_).item() / abs(loss).item(),
        "gradient": ((grad - grad_).float().norm() / grad.float().norm()).item(),
    }
    if max(differences.values()) > (1e-5 if base.dtype == torch.float32 else 5e-2):
        raise SystemExit(
            f"The libraries disagree at B={B}: relative "
            f"differences {differences}. Nothing was timed."
        )
    return differences


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(functions: dict, device: str, seconds: float, at_least: int = 3) -> dict:
    """Run the functions in turn until the time is up: name -> median and spread in ms.

    A fast one runs more often in each round, so that all get a like share of the time.
    """
    times: dict[str, list] = {name: [] for name in functions}
    started, rounds = time.perf_counter(), 0
    while rounds < at_least or (time.perf_counter() - started < seconds and rounds < 50):
        slowest = max((statistics.median(t) for t in times.values() if t), default=0)
        for name, function in functions.items():
            repeats = min(5, int(slowest / statistics.median(times[name]))) if times[name] else 1
            for _ in range(max(1, repeats)):
                synchronize(device)
                start = time.perf_counter()
                function()
                synchronize(device)
                times[name].append(1000 * (time.perf_counter() - start))
        rounds += 1
    return {
        name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t), "n": len(t)}
        for name, t in times.items()
    }


def scoring(base, models: dict, device: str, seconds: float) -> dict:
    """Label scores of queries, one call each and in batches; per query, in milliseconds.

    PEFT as its CPT example notebook uses it: the whole forward, then the logits at the answer. With
    `logits_to_keep`, transformers' own argument, it spares the head. Ours keeps the prompt's KV
    cache between the calls.
    """
    result = {}
    for B in (1, SCORED):
        batch = {
            name: value
            for name, value in batch_of(base, B).items()
            if name in ("input_ids", "attention_mask")
        }

        def call(model, **kwargs):
            with torch.no_grad():
                return model(**batch, **kwargs).logits[:, -1]

        expected = call(models["PEFT"]).float()
        got = call(models["minicpt"], logits_to_keep=1).float()
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=1e-3 if base.dtype == torch.float32 else 0.3
        )
        functions = {
            "PEFT": lambda: call(models["PEFT"]),
            "PEFT, logits_to_keep": lambda: call(models["PEFT"], logits_to_keep=1),
            "minicpt": lambda: call(models["minicpt"], logits_to_keep=1),
        }
        functions["PEFT, logits_to_keep"]()
        times = interleaved(functions, device, seconds)
        result[B] = {
            name: {k: v / B if k != "n" else v for k, v in t.items()} for name, t in times.items()
        }
    return result


# ---- memory --------------------------------------------------------------------------------------


def status_mb(field: str) -> float:
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if field in line
        )
        / 1024
    )


def peak_mb(function, device: str) -> float:
    """Largest memory that a call needs beyond what is there before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_mb("VmRSS")
    function()
    return status_mb("VmHWM") - before


def memory(name: str, device: str, shots: tuple, rows: tuple) -> list[dict]:
    base, result = base_model(name, device), []
    train_step(both(base, 1)["minicpt"], batch_of(base, 1))  # once, to settle
    for K, B in [(6, B) for B in rows] + [(K, 4) for K in shots if K != 6]:
        for who, step in steps(base, both(base, K), K, B).items():
            result.append(
                {"model": name, "K": K, "B": B, "who": who, "peak_mb": peak_mb(step, device)}
            )
    return result


def memory_apart(*args) -> list[dict]:
    """`memory` in a process of its own; on the CPU freed memory goes back at once."""
    if args[1] != "cpu":
        return memory(*args)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [
        sys.executable,
        __file__,
        "--memory",
        json.dumps(args),
        "--threads",
        str(torch.get_num_threads()),
    ]
    return json.loads(
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    )


# ---- all of it -----------------------------------------------------------------------------------


def measure(device: str, seconds: float) -> dict:
    torch.manual_seed(0)
    result: dict = {"step": [], "scoring": [], "memory": [], "equality": [], "sweep": []}
    first = next(iter(SIZES[device]))
    for name in SIZES[device]:
        print(f"{name}: ", end="", flush=True)
        base = base_model(name, device)
        models = both(base, 6)
        limit_step(base, 6, 1)  # once, to settle; the others have run for the check
        for B in (4, 1):
            result["equality"].append({"model": name, "B": B, **check_equal(base, models, B)})
            times = interleaved(steps(base, models, 6, B), device, seconds)
            result["step"] += [
                {"model": name, "K": 6, "B": B, "who": who, **t} for who, t in times.items()
            ]
        print("steps, ", end="", flush=True)
        for B, times in scoring(base, models, device, seconds / 2).items():
            result["scoring"] += [
                {"model": name, "B": B, "who": who, **t} for who, t in times.items()
            ]
        print("scoring, ", end="", flush=True)
        if name == first:
            for K, B in [(6, B) for B in ROWS[device]] + [(K, 4) for K in SHOTS[device] if K != 6]:
                times = interleaved(
                    steps(base, both(base, K), K, B), device, seconds / 4, at_least=2
                )
                result["sweep"] += [{"K": K, "B": B, "who": who, **t} for who, t in times.items()]
            print("sweep, ", end="", flush=True)
        del base, models
        gc.collect()
        shots, rows = (SHOTS[device], ROWS[device]) if name == first else ((), (1, 4))
        result["memory"] += memory_apart(name, device, shots, rows)
        print("memory.")
    return result


def ratios(result: dict) -> list[dict]:
    """The table's rows: what was measured, PEFT's figure, ours, ratios to it and the limit."""
    rows = []

    def row(model, what, values, unit, peft="PEFT"):
        limit = values.get("limit")
        rows.append(
            {
                "model": model,
                "what": what,
                "PEFT": values[peft],
                "minicpt": values["minicpt"],
                "unit": unit,
                "PEFT / minicpt": values[peft] / values["minicpt"],
                "minicpt / limit": values["minicpt"] / limit if limit else None,
            }
        )

    for model in dict.fromkeys(r["model"] for r in result["step"]):
        for B in (4, 1):
            here = [r for r in result["step"] if (r["model"], r["B"]) == (model, B)]
            row(model, f"training step, B={B}", {r["who"]: r["median_ms"] for r in here}, "ms")
        for B in (1, SCORED):
            here = {
                r["who"]: r["median_ms"]
                for r in result["scoring"]
                if (r["model"], r["B"]) == (model, B)
            }
            how = "one call a query" if B == 1 else f"batches of {B}"
            row(model, f"scoring, {how}", here, "ms a query")
            row(
                model,
                f"scoring, {how}, PEFT with logits_to_keep",
                here,
                "ms a query",
                "PEFT, logits_to_keep",
            )
        for B in (4, 1):
            here = [r for r in result["memory"] if (r["model"], r["K"], r["B"]) == (model, 6, B)]
            row(model, f"memory of the step, B={B}", {r["who"]: r["peak_mb"] for r in here}, "MB")
    return rows


def table(result: dict) -> str:
    number = lambda x: "–" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.1f}"  # noqa: E731
    lines = [
        "| model | what (K=6, P=240, T=40) | PEFT | minicpt | PEFT ÷ minicpt | minicpt ÷ limit |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for r in ratios(result):
        over = "–" if r["minicpt / limit"] is None else f"{r['minicpt / limit']:.2f}"
        lines.append(
            f"| {r['model']} | {r['what']} ({r['unit']}) | {number(r['PEFT'])} | "
            f"{number(r['minicpt'])} | **{r['PEFT / minicpt']:.1f}** | {over} |"
        )
    machine = result["machine"]
    return "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in machine.items()) + "."]) + "\n"


def extrapolated(points: list[tuple[float, float]], where) -> list[float]:
    """a + b K + c K² through the measured points (linear layers, attention): an estimate."""
    import numpy as np

    return np.polyval(np.polyfit(*zip(*points), 2), where).tolist()


def figure(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    panels, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    kinds = [
        ("sweep", "median_ms", "training step (ms)"),
        ("memory", "peak_mb", "memory beyond the weights (MB)"),
    ]
    first = result["memory"][0]["model"]
    for line, (kind, value, label) in zip(axes, kinds):
        rows = [r for r in result[kind] if r.get("model", first) == first]
        for axis, (x, fixed, at) in zip(line, [("K", "B", 4), ("B", "K", 6)]):
            for who, colour in COLOURS.items():
                points = sorted(
                    (r[x], r[value]) for r in rows if r["who"] == who and r[fixed] == at
                )
                axis.plot(*zip(*points), "o-", color=colour, label=who, markersize=4)
                if x == "K" and points[-1][0] < 50:
                    beyond = [points[-1][0], 30, 40, 50]
                    axis.plot(
                        beyond,
                        extrapolated(points, beyond),
                        ":",
                        color=colour,
                        label=f"{who}, estimate",
                    )
            other = f"{fixed}={at}"
            axis.set(
                xlabel={"K": "examples in the context, K (40 tokens each)", "B": "rows a step, B"}[
                    x
                ],
                ylabel=label,
            )
            axis.set(title=f"{first}, {other}", yscale="log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    panels.savefig(path, dpi=110)


def main() -> None:
    print_any_text()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=6, help="time for each comparison, at least three rounds"
    )
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.memory:
        print(json.dumps(memory(*json.loads(args.memory))))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("DEVICE=cuda, but torch sees no CUDA device here. Without one: make bench")
    started = time.perf_counter()
    result = measure(args.device, args.seconds)
    processor = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    result["machine"] = {
        "device": args.device,
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": args.threads,
        **{p: version(p) for p in ("torch", "transformers", "peft")},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.device}.json").write_text(json.dumps(result, indent=1))
    (args.out / f"{args.device}.md").write_text(table(result), encoding="utf-8")
    figure(result, args.out / f"{args.device}.png")
    print(
        table(result),
        f"\n{time.perf_counter() - started:.0f} s; written: "
        f"{args.out}/{args.device}.json, .md, .png",
    )


if __name__ == "__main__":
    main()

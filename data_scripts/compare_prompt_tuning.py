"""What prompt tuning is worth at this size: beside LoRA, full fine-tuning and ICL on a real model and real sentences.

    make smollm2
    MINICPT_DATA=folder python data_scripts/compare_prompt_tuning.py --workers 2
    python data_scripts/compare_prompt_tuning.py --show            the tables of what is finished; computes nothing

Every trial leaves one JSON file in `--out`, so an interrupted run goes on where it was, and the finished ones are
written to `minicpt/assets/reference_prompt_tuning.csv`. Each runs in a process of its own, forked from one that has
loaded the model, so that peaks of memory are a method's own and nothing has to be undone.

**Equal terms.** SST-2, and for each seed the same queries, template and rows (the 16 are among the 64, those among the
256). All trained methods take 32 AdamW steps of 8 rows with a rate that falls to zero, by the one loop of this library,
and minimise the loss of the label's token. Training sentences have 12 tokens at most, which two thirds of SST-2's have,
and queries are cut to 32: a laptop should finish. 32 steps are few for prompt tuning, which is usually given hundreds.

**One rate for each method**, the best of three on seeds that nothing else uses, with 64 rows; of prompt tuning's starts
and lengths those of 16 tokens from a text stand for all. Every trial of that choice is in the file, too (seeds from
100). LoRA has PEFT's defaults (rank 8 on the query and value projections). ICL has as many of the rows in its context
as fit into 2,048 tokens.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import peft
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from minicpt import PromptTuningConfig, fit, get_peft_model, load_base, load_task, make_split
from minicpt.core.train import Recipe, train
from minicpt.data import ASSETS, Split
from minicpt.engine.base_models import BaseModel
from minicpt.engine.memory import peak_bytes, reset_peak
from minicpt.engine.prefix import loss_after
from minicpt.engine.scores import accuracy
from minicpt.engine.sources import locate
from minicpt.errors import print_any_text
from minicpt.lab.store import key_of, write_atomically
from minicpt.lab.tables import pipes
from minicpt.methods.fit import Predictor
from minicpt.methods.prepare import Job, prepare

FILE = ASSETS / "reference_prompt_tuning.csv"
ROWS, SEEDS, TUNING_SEEDS = (16, 64, 256), range(3), (100, 101)
STEPS, BATCH, TRAIN_TOKENS, QUERY_TOKENS, CONTEXT_TOKENS = 32, 8, 12, 32, 2048
COSTS = {
    "trained": "trained numbers",
    "bytes": "on disk (kB)",
    "peak_fit_mb": "peak to train (GiB)",
    "peak_score_mb": "to score (GiB)",
    "seconds_step": "a step (s)",
    "seconds_switch": "switch tasks (s)",
}
NAMES = {"icl": "ICL", "lora": "LoRA", "full": "full fine-tuning"}
PROTOCOL = (
    f"{STEPS} steps of {BATCH} rows, texts of {TRAIN_TOKENS} tokens to train and {QUERY_TOKENS} to ask, contexts of "
    f"{CONTEXT_TOKENS}"
)
RATES = {"prompt": (0.01, 0.03, 0.1), "lora": (3e-4, 1e-3, 3e-3), "full": (1e-5, 3e-5, 1e-4)}
STARTS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}
TEXT = "Decide whether the sentence from a movie review is negative or positive."
# for `prepare`: label score, no limit but the model's, no extra rows, rows at once, tokens of a text
READING = ("sum", None, (), 64, QUERY_TOKENS)
PLAIN = {"lr": 0.0, "epochs": 1, "batch_size": BATCH}  # `optimise` has the real ones
PROMPTS = [(16, "text"), (16, "vocabulary"), (16, "random"), (8, "text"), (32, "text")]


@dataclass(frozen=True)
class Trial:
    """One method on the rows of one seed; `tokens` and `start` are those of a soft prompt."""

    method: str
    rows: int
    seed: int
    n_test: int
    lr: float = 0.0
    tokens: int = 0
    start: str = ""

    def __str__(self) -> str:
        prompt = f" {self.tokens} {self.start}" if self.tokens else ""
        return f"{self.method}{prompt}, {self.rows} rows, seed {self.seed}, lr {self.lr:g}"


def tuning_trials(n_test: int) -> list[Trial]:
    """Three rates a method on the tuning seeds."""
    trials = []
    for seed in TUNING_SEEDS:
        for method, rates in RATES.items():
            prompt = PROMPTS[0] if method == "prompt" else ()
            trials += [Trial(method, 64, seed, n_test // 2, lr, *prompt) for lr in rates]
    return trials


def trials(rates: dict[str, float], rows: tuple[int, ...], seeds, n_test: int) -> list[Trial]:
    """All methods on all numbers of rows, one seed after the other; lengths and starts are compared at 64 rows."""
    plan = []
    for seed in seeds:
        for n in rows:
            plan += [Trial("icl", n, seed, n_test)]
            plan += [Trial(method, n, seed, n_test, rates[method]) for method in ("lora", "full")]
            prompts = PROMPTS if n == 64 else PROMPTS[:1]
            plan += [Trial("prompt", n, seed, n_test, rates["prompt"], *p) for p in prompts]
    return plan


def draw(base: BaseModel, trial: Trial) -> Split:
    """The rows and queries of the trial: short sentences for training, all sentences for the queries."""
    task = load_task("sst2", "real")
    lengths = map(len, base.tokenizer([text for text, _ in task.train])["input_ids"])
    short = [row for row, n in zip(task.train, lengths) if n <= TRAIN_TOKENS]
    return make_split(replace(task, train=short), trial.rows, trial.seed, trial.n_test)


# ---- the methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What a method leaves: a predictor, the tensors to keep on disk, how to put them into use, and what it cost."""

    predictor: Predictor
    kept: dict[str, torch.Tensor]
    use: Callable[[dict[str, torch.Tensor]], None]
    trained: int = 0
    seconds_step: float = 0.0
    context_rows: int = 0


def optimise(loss_of, weights: list, job: Job, lr: float) -> tuple[list[float], float]:
    """The same number of steps for every method: their losses, and the seconds of a step."""
    recipe = Recipe(lr, STEPS * BATCH // len(job.rows), BATCH)
    started = time.process_time()
    history = train(loss_of, weights, len(job.rows), recipe, job.generator)
    return history, (time.process_time() - started) / len(history)


def train_prompt(base: BaseModel, split: Split, trial: Trial) -> Trained:
    """Prompt tuning as PEFT's users write it, with the library's loss, which runs the prompt once for all rows."""
    prompt, job = prepare("pt", base, split, {"tokens": trial.tokens, **PLAIN}, *READING)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=trial.tokens,
        prompt_tuning_init=STARTS[trial.start],
        prompt_tuning_init_text=TEXT,
        tokenizer_name_or_path=locate(base.name)[0],
    )
    model = get_peft_model(base.model, config)
    weight = model.prompt_encoder["default"].embedding.weight

    def loss_of(chosen: list[int]) -> torch.Tensor:
        return loss_after(base.model, model.get_prompt(batch_size=1), *job.batch(chosen))

    history, seconds = optimise(loss_of, [weight], job, trial.lr)
    soft = model.get_prompt(batch_size=1).detach()
    predictor = Predictor(base.model, soft, prompt, split.classes, "sum", history)

    def use(kept: dict) -> None:
        base.model(inputs_embeds=kept["prompt"], use_cache=True, logits_to_keep=1)

    return Trained(predictor, {"prompt": soft}, use, weight.numel(), seconds)


def train_weights(base: BaseModel, split: Split, trial: Trial) -> Trained:
    """LoRA with PEFT's defaults, or every weight of the model."""
    prompt, job = prepare("lora", base, split, PLAIN, *READING)
    model = base.model
    if trial.method == "lora":
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    else:
        model.requires_grad_(True)
    weights = [p for p in model.parameters() if p.requires_grad]
    nothing = base.embed([])  # (1, 0, D)

    def loss_of(chosen: list[int]) -> torch.Tensor:
        return loss_after(model, nothing, *job.batch(chosen), share=False)

    history, seconds = optimise(loss_of, weights, job, trial.lr)
    predictor = Predictor(model, None, prompt, split.classes, "sum", history)
    if trial.method == "lora":
        kept = peft.get_peft_model_state_dict(adapted)
        use = partial(peft.set_peft_model_state_dict, adapted)
    else:
        kept = dict(model.named_parameters())  # the tied head once
        use = partial(model.load_state_dict, strict=False)
    return Trained(predictor, kept, use, sum(p.numel() for p in weights), seconds)


def learn_in_context(base: BaseModel, split: Split, trial: Trial) -> Trained:
    """ICL with as many of the rows as fit: what is kept are the ids of the context."""
    shots = split.shots
    while True:
        predictor = fit("icl", base, replace(split, shots=shots), text_tokens=QUERY_TOKENS)
        if predictor.prefix_length <= CONTEXT_TOKENS:
            break
        shots = shots[: int(len(shots) * CONTEXT_TOKENS / predictor.prefix_length)]
    kept = {"ids": torch.tensor([predictor.prompt.context.ids], dtype=torch.int32)}

    def use(kept: dict) -> None:
        base.model(kept["ids"].long(), use_cache=True, logits_to_keep=1)

    return Trained(predictor, kept, use, context_rows=len(shots))


# ---- one trial ------------------------------------------------------------------------------------------------------


def seconds_to_switch(result: Trained) -> tuple[int, float]:
    """Bytes of the file that has to be kept, and seconds from that file until the model is ready for a query."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kept.safetensors"
        save_file({name: t.detach().contiguous() for name, t in result.kept.items()}, file)
        started = time.process_time()
        with torch.no_grad():
            result.use(load_file(file))
        return file.stat().st_size, time.process_time() - started


def measure(trial: Trial, out: Path) -> None:
    """Run a trial in this process, which is its own, and write down what it gave."""
    torch.manual_seed(trial.seed)
    split = draw(BASE, trial)
    how = {"prompt": train_prompt, "icl": learn_in_context}.get(trial.method, train_weights)
    started = time.process_time()
    result = how(BASE, split, trial)
    fitted = time.process_time()
    fit_peak = peak_bytes(BASE.device)
    reset_peak(BASE.device)
    raw, calibrated = result.predictor.scores([text for text, _ in split.queries])
    scored = time.process_time()
    score_peak = peak_bytes(BASE.device)
    size, switch = seconds_to_switch(result)
    truth = [split.classes.index(label) for _, label in split.queries]
    history = result.predictor.history
    row = {
        **asdict(trial),
        "protocol": PROTOCOL,
        "accuracy": accuracy(raw, truth),
        "accuracy_calibrated": accuracy(calibrated, truth),
        "loss_first": history[0] if history else None,
        "loss_last": sum(history[-4:]) / 4 if history else None,
        "steps": len(history),
        "context_tokens": len(result.predictor.prompt.context),
        "context_rows": result.context_rows,
        "trained": result.trained,
        "bytes": size,
        "peak_fit_mb": fit_peak / 2**20,
        "peak_score_mb": score_peak / 2**20,
        "seconds_step": result.seconds_step,
        "seconds_fit": fitted - started,
        "seconds_score": scored - fitted,
        "seconds_switch": switch,
        "split_sha256": split.sha256,
        "model": BASE.name,
        "model_fingerprint": BASE.fingerprint,
        "threads": torch.get_num_threads(),
    }
    write_atomically(path_of(trial, out), json.dumps(row))


def path_of(trial: Trial, out: Path) -> Path:
    """The trial's file: another step count or cap is another trial."""
    return out / f"{key_of({**asdict(trial), 'protocol': PROTOCOL})}.json"


def run(plan: Iterable[Trial], out: Path, workers: int) -> list[dict]:
    """Compute what is missing, a forked process a trial, and return the results of all."""
    plan = list(plan)
    missing = [trial for trial in plan if not path_of(trial, out).exists()]
    context = multiprocessing.get_context("fork")  # a child has the model without loading it
    with context.Pool(workers, maxtasksperchild=1) as pool:
        work = pool.imap_unordered(partial(measure, out=out), missing, chunksize=1)
        for _ in tqdm(work, total=len(missing), unit="trial"):
            write(out)
    return [json.loads(path_of(trial, out).read_text()) for trial in plan]


def write(out: Path) -> None:
    """All finished trials of this protocol as one CSV."""
    table = pd.DataFrame([json.loads(path.read_text()) for path in out.glob("*.json")])
    table = table[table.protocol == PROTOCOL].sort_values(
        ["seed", "rows", "method", "tokens", "start", "lr"]
    )
    write_atomically(FILE, table.to_csv(index=False, float_format="%.6g"))


def read() -> pd.DataFrame:
    """The file as `write` wrote it: a method without a start has the empty one."""
    return pd.read_csv(FILE, keep_default_na=False, na_values={"loss_first": "", "loss_last": ""})


def best_rates(found: list[dict]) -> dict[str, float]:
    """The rate with the best mean accuracy of each method; on a tie the smaller one."""
    means = pd.DataFrame(found).groupby(["method", "lr"]).accuracy.mean()
    return {method: means[method].idxmax() for method in RATES}


def named(table: pd.DataFrame) -> pd.Series:
    """What a reader calls the method of each row."""
    prompts = [f"prompt, {n} tokens, {start}" for n, start in zip(table.tokens, table.start)]
    return table.method.replace(NAMES).where(table.method != "prompt", prompts)


def accuracy_block(table: pd.DataFrame) -> str:
    """Accuracy in percent, mean ± std over seeds, raw; a column for each number of rows."""
    table = table[table.seed < min(TUNING_SEEDS)]
    groups = table.assign(name=named(table)).groupby(["name", "rows"]).accuracy
    cells = groups.agg(lambda a: f"{100 * a.mean():.1f} ±{100 * a.std():.1f} ({len(a)})").unstack()
    cells = cells.fillna("").reset_index()
    return pipes(["method (seeds)", *[f"{n} rows" for n in cells.columns[1:]]], cells.to_numpy())


def cost_block(table: pd.DataFrame) -> str:
    """What a method costs at 64 rows, as means over the seeds."""
    table = table[(table.seed < min(TUNING_SEEDS)) & (table.rows == 64)]
    costs = table.assign(name=named(table)).groupby("name")[list(COSTS)].mean().reset_index()
    rows = []
    for name, trained, size, *peaks, step, switch in costs.to_numpy():
        sizes = f"{trained:,.0f}", f"{size / 1000:,.0f}"
        seconds = f"{step:.2f}" if step else "", f"{switch:.2f}"
        rows.append([name, *sizes, *[f"{peak / 1024:.2f}" for peak in peaks], *seconds])
    return pipes(["method", *COSTS.values()], rows)


def main() -> None:
    print_any_text()
    global BASE
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--n-test", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/prompt_tuning"))
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    if args.show:
        if args.out.is_dir():
            write(args.out)
    else:
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # PEFT's
        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in forked processes
        BASE = load_base(args.model, "cpu")
        rates = best_rates(run(tuning_trials(args.n_test), args.out, args.workers))
        print("Rates chosen on the tuning seeds:", rates)
        run(trials(rates, args.rows, range(args.seeds), args.n_test), args.out, args.workers)
    table = read()
    print(accuracy_block(table), cost_block(table), sep="\n\n")


if __name__ == "__main__":
    main()

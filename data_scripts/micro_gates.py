"""Gates and model card of the micro base model (called by pretrain_micro.py --gates and --ship).

The gates look at zero-shot and in-context accuracy only and were fixed before any trained method
was compared: the micro world is never tuned for the rank of a method.
"""

import json
import math
import random
import shutil
from statistics import mean, stdev

import make_micro_world as W
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SHOTS = (0, 2, 4, 6)
# of BLOOM-1.7B
REAL = {
    "sst2": (68, 65, 67),
    "ag_news": (61, 52, 48),
    "trec": (28, 33, 35),
    "dbpedia": (48, 23, 29),
}


# ---------------------------------------------------------------- measuring
@torch.no_grad()
def predict(model, prompts, candidates):
    """Index of the best candidate token after each prompt; padding on the right changes nothing."""
    order, best = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [0] * len(prompts)
    device = model.get_input_embeddings().weight.device
    for i in range(0, len(order), 50):
        group = order[i : i + 50]
        last = torch.tensor([len(prompts[j]) - 1 for j in group], device=device)
        tokens = torch.zeros(len(group), int(last.max()) + 1, dtype=torch.long, device=device)
        for row, j in enumerate(group):
            tokens[row, : len(prompts[j])] = torch.tensor(prompts[j])
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[
            range(len(group)), last
        ]
        scores = hidden @ model.get_input_embeddings().weight.T
        for row, j in enumerate(group):
            best[j] = int(scores[row, candidates[j]].argmax())
    return best


def exact_match(model, ids, queries, seed=0):
    """The query's text is one of the context's (of held-out concepts); chance is about 0.36."""
    rng, prompts, candidates, answers = random.Random(seed), [], [], []
    words = [w for c in W.EVALUATION if c.style in ("set", "news", "entity") for w in c.words]
    for _ in range(queries):
        n = rng.choice([2, 3, 4])
        keys, labels = rng.sample(words, n), ids(rng.sample(W.M.ARBITRARY, n))
        make = lambda i: W.example_ids(ids, ("input", "output", "\n", "\n"), ids([keys[i]]))
        order = sum((rng.sample(range(n), n) for _ in range(rng.choice([1, 2]))), [])
        answers.append(rng.randrange(n))
        prompts.append(
            sum((make(i) + [labels[i], ids.newline] for i in order), []) + make(answers[-1])
        )
        candidates.append(labels)
    return mean(a == b for a, b in zip(predict(model, prompts, candidates), answers))


def k_shot(rng, rows, classes, k):
    """k examples in total, distinct classes first, in random order."""
    pools = {c: rng.sample([r for r in rows if r["label"] == c], k) for c in classes}
    queue = []
    while len(queue) < k:
        queue += rng.sample(classes, len(classes))
    return rng.sample([pools[c].pop() for c in queue[:k]], k)


def accuracy(model, tokenizer, seeds=5, queries=200, shots=SHOTS):
    """Accuracy (%) by task, kind of labels and shots: {"trec/canonical": {"2": [seed, ...]}}."""
    model.eval()
    encode, table = lambda text: tokenizer(text)["input_ids"], {}
    for name in W.TASKS:
        spec = json.loads((W.ASSETS / "tasks" / f"{name}.json").read_text())
        rows = [
            json.loads(line)
            for line in (W.ASSETS / "tasks" / f"{name}.jsonl").read_text().splitlines()
        ]
        classes = list(spec["verbalizers"])
        for kind in ("canonical", "arbitrary"):
            cells = table[f"{name}/{kind}"] = {str(k): [] for k in shots}
            for seed in range(seeds):
                rng = random.Random(seed)
                drawn = rng.sample(spec["arbitrary_labels"], len(classes))
                label = spec["verbalizers"] if kind == "canonical" else dict(zip(classes, drawn))
                test = [
                    r
                    for c in classes
                    for r in rng.sample(
                        [r for r in rows if r["split"] == "test" and r["label"] == c],
                        math.ceil(queries / len(classes)),
                    )
                ]
                asked = [encode(f"input: {r['text']}\noutput:") for r in test]
                candidates = [encode(" " + label[c])[0] for c in classes]
                for k in shots:
                    context = k_shot(rng, [r for r in rows if r["split"] == "train"], classes, k)
                    shown = [f"input: {r['text']}\noutput: {label[r['label']]}\n" for r in context]
                    head = encode("".join(shown)) if k else []
                    best = predict(model, [head + q for q in asked], [candidates] * len(asked))
                    hits = [classes[b] == r["label"] for b, r in zip(best, test)]
                    cells[str(k)].append(round(100 * mean(hits), 2))
    model.train()
    return table


def verdicts(table, exact):
    m = {task: {int(k): mean(v) for k, v in cells.items()} for task, cells in table.items()}
    sets, trec, sst = m["set_cls/arbitrary"], m["trec/canonical"], m["sst2/arbitrary"]
    return {
        "exact match > 0.75": exact > 0.75,
        "set_cls (arbitrary): zero-shot < 40": sets[0] < 40,
        "set_cls (arbitrary): 4 shots >= 2 shots + 15": sets[4] >= sets[2] + 15,
        "set_cls (arbitrary): 6 shots >= 70": sets[6] >= 70,
        "trec: rising from 2 to 6 shots": trec[6] > trec[4] > trec[2],
        "trec: 6 shots >= chance + 15 (31.7)": trec[6] >= 100 / 6 + 15,
        "sst2 (arbitrary): 4 shots > zero-shot": sst[4] > sst[0],
        "no task with zero-shot and ICL both above 90": not any(
            c[0] > 90 and max(c[k] for k in SHOTS[1:]) > 90 for c in m.values()
        ),
    }


def measure(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    exact = round(exact_match(model, W.Ids(tokenizer), 1000), 4)
    result = {"exact_match": exact, "accuracy": accuracy(model, tokenizer)}
    result["gates"] = verdicts(result["accuracy"], result["exact_match"])
    (folder / "gates.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"exact match {result['exact_match']}")
    for task, cells in result["accuracy"].items():
        print(
            f"{task:20s}",
            "  ".join(f"{k}: {mean(v):5.1f} +-{stdev(v):4.1f}" for k, v in cells.items()),
        )
    print(
        "\n".join(f"{'met   ' if ok else 'MISSED'} {gate}" for gate, ok in result["gates"].items())
    )


# ---------------------------------------------------------------- model card
def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def curve_rows(log):
    """Steps at which the model was measured: exact match, in-context accuracy over all tasks."""
    rows = []
    for line in (x for x in log if "exact_match" in x):
        table = line["gates"] or {}
        cell = lambda k: f"{mean(mean(c[k]) for c in table.values()):.1f}" if table else "-"
        rows.append(
            [
                line["step"],
                line["phase"],
                f"{line['tokens'] / 1e6:.2f} M",
                line["label_loss"],
                line["text_loss"] or "-",
                line["label"] or "-",
                f"{line['exact_match']:.2f}",
                *map(cell, "0246"),
            ]
        )
    return rows


def plot(logs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for (name, log), style in zip(logs.items(), ("-", "--")):
        million = [x["tokens"] / 1e6 for x in log]
        left.plot(
            million,
            [x["label_loss"] for x in log],
            style,
            color="#0072B2",
            label=f"label loss, {name}",
        )
        tested = [x for x in log if "exact_match" in x]
        right.plot(
            [x["tokens"] / 1e6 for x in tested],
            [100 * x["exact_match"] for x in tested],
            style,
            color="#D55E00",
            label=f"exact match, {name}",
        )
        tested = [x for x in tested if x["gates"]]
        for task, color in (("set_cls/arbitrary", "#009E73"), ("trec/canonical", "#CC79A7")):
            right.plot(
                [x["tokens"] / 1e6 for x in tested],
                [mean(x["gates"][task]["6"]) for x in tested],
                style,
                color=color,
                label=f"{task.split('/')[0]}, 6 shots, {name}",
            )
    left.set(xlabel="million tokens", ylabel="cross-entropy of labels")
    right.set(xlabel="million tokens", ylabel="accuracy (%)", ylim=(0, 100))
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="lower right")
    fig.tight_layout()
    fig.savefig(path, dpi=75)


def shape(accuracy, task):
    """Mean accuracy with 0, 2 and 4 shots and canonical labels."""
    return [mean(accuracy[task + "/canonical"][k]) for k in "024"]


def is_near(accuracy, task):
    return all(abs(ours - real) <= 15 for ours, real in zip(shape(accuracy, task), REAL[task]))


def ship(runs):
    """Copy the best run to the assets and write its card: by gates met, aims met, ICL accuracy."""
    folder = W.ASSETS / "micro"
    results = {run.name: json.loads((run / "gates.json").read_text()) for run in runs}
    logs = {
        run.name: [json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()]
        for run in runs
    }
    icl = {
        n: mean(mean(c[k]) for c in r["accuracy"].values() for k in "246")
        for n, r in results.items()
    }
    near = {n: {task: is_near(r["accuracy"], task) for task in REAL} for n, r in results.items()}
    met = {n: (sum(r["gates"].values()), sum(near[n].values()), icl[n]) for n, r in results.items()}
    best = max(runs, key=lambda run: met[run.name])
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(best / "model" / name, folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    plot(logs, folder / "curves.png")

    cell = lambda v: f"{mean(v):.1f} ± {stdev(v):.1f}"
    tasks = results[best.name]["accuracy"]
    accuracy_rows = [
        [task, n, *(cell(r["accuracy"][task][str(k)]) for k in SHOTS)]
        for task in tasks
        for n, r in results.items()
    ]
    verdict_rows = [
        [gate, *("met" if r["gates"][gate] else "**MISSED**" for r in results.values())]
        for gate in results[best.name]["gates"]
    ]
    aim_rows = []
    for task, real in REAL.items():
        aim_rows.append(
            [
                task,
                "/".join(map(str, real)),
                *(
                    "/".join(f"{x:.0f}" for x in shape(r["accuracy"], task))
                    + (" near" if near[n][task] else " **MISSED**")
                    for n, r in results.items()
                ),
            ]
        )
    last = {n: log[-1] for n, log in logs.items()}
    unnamed = {t: [c.name for c in cs if not c.named] for t, cs in W.TASKS.items()}
    card = CARD.format(
        parameters=f"{model.num_parameters():,}",
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        heads=model.config.num_attention_heads,
        ff=model.config.intermediate_size,
        vocab=model.config.vocab_size,
        words=len(W.world_words()),
        size=f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        best=best.name,
        commands="\n".join(
            f"python data_scripts/pretrain_micro.py --seed {run.name[1:]} --out runs/{run.name}"
            for run in runs
        ),
        runs=" ".join(f"runs/{run.name}" for run in runs),
        cost=markdown(
            ["run", "steps", "tokens", "wall time (min)", "mean ICL accuracy (%)", "exact match"],
            [
                [
                    n,
                    x["step"],
                    f"{x['tokens'] / 1e6:.1f} M",
                    f"{x['seconds'] / 60:.0f}",
                    f"{icl[n]:.1f}",
                    results[n]["exact_match"],
                ]
                for n, x in last.items()
            ],
        ),
        accuracy=markdown(["task / labels", "run", *(f"{k} shots" for k in SHOTS)], accuracy_rows),
        gates=markdown(["gate", *results], verdict_rows),
        aims=markdown(["task", "BLOOM-1.7B (published)", *results], aim_rows),
        unnamed="; ".join(f"{t}: {', '.join(names)}" for t, names in unnamed.items() if names),
        curves="\n\n".join(
            f"Run {n}:\n\n"
            + markdown(
                [
                    "step",
                    "phase",
                    "tokens",
                    "label loss",
                    "text loss",
                    "label accuracy",
                    "exact match",
                    *(f"tasks, {k} shots" for k in SHOTS),
                ],
                curve_rows(log),
            )
            for n, log in logs.items()
        ),
    )
    old = (
        (folder / "README.md").read_text(encoding="utf-8")
        if (folder / "README.md").exists()
        else ""
    )
    notes = old.partition(NOTES)[2] or "\n\nNone yet.\n"
    (folder / "README.md").write_text(card + "\n" + NOTES + notes, encoding="utf-8")
    print(f"shipped {best.name}; mean ICL accuracy {icl}")


NOTES = "## Notes on these runs"  # written by hand; what stands below this heading is kept
CARD = """# Micro base model

A Llama with {parameters} parameters ({layers} layers, width {width}, {heads} heads, feed-forward {ff}, RoPE theta
500, tied embeddings, no biases, vocabulary {vocab}, {size} MB fp32), pretrained from a plain random initialisation on
a generated world ([make_micro_world.py](../../../data_scripts/make_micro_world.py)) of {words} English words. It
knows no other English. It exists so that prompt-tuning methods can be taught and tested offline in seconds; it is not
a language model for any other use. It loads with `AutoModelForCausalLM.from_pretrained` and
`AutoTokenizer.from_pretrained`.

## How it was made

```
python data_scripts/make_micro_world.py
{commands}
python data_scripts/pretrain_micro.py --gates RUN      # for each run
python data_scripts/pretrain_micro.py --ship {runs}
```

Curriculum: (0) copying repeated random strings over 128 words, (1) key-value rows, (2) exact-match examples in the
prompt templates, (3) the full mixture: 70 % episodes, 30 % sentences. Muon on matrices, AdamW on embeddings and
norms, bf16 autocast. Phases 0-2 end when exact-match accuracy in the training rows passes a threshold. Rows are 128
tokens in phase 3; half the batches of its last fifth (10 % of its tokens) are rows of 512. Each run used one thread
of a shared 2-core CPU machine. On the same machine a seed gives the same data and schedule.

{cost}

Shipped: **{best}** (rule, set before any trained method was run on either: most gates met, then most of the aims below,
then the higher mean in-context accuracy).

**What is held out.** No training episode opposes two classes of one evaluation task; their canonical labels are never
episode labels. A single evaluation class does appear in episodes, with arbitrary labels, so the *words* are not
unseen. Sentences name the evaluation classes ("so it is about sports.") except these, which only occur unnamed:
{unnamed}.

## Accuracy

Percent, mean ± standard deviation over 5 evaluation seeds (examples, labels and queries are drawn anew; at least 200
balanced queries each); the answer is the best of the task's label tokens. k shots = k examples in total, distinct
classes first. Chance: sst2 50, ag_news 25, trec 16.7, dbpedia 7.1, set_cls 25. "canonical" = the task's own label
words, "arbitrary" = meaningless words drawn for each seed. With fewer shots than classes, arbitrary labels allow at
most about k / classes.

{accuracy}

## Gates

Fixed before any trained method was compared; none of them looks at a trained method. Exact match: the query's text is
one of the context's (chance about 0.36).

{gates}

Aim beyond the gates (not a gate): zero-shot / 2 / 4 shots with canonical labels shaped like a real model's; "near"
means that all three numbers are within 15 points of the published ones.

{aims}

## Curves

`label loss`, `text loss` and `label accuracy` are means over the last 50 training steps (full vocabulary, labels
after their first use; phases 0-1 have no such labels). `exact match` and `tasks` (mean over all tasks and both kinds
of labels; 2 seeds x 60 queries) are measured at that step.

![curves](curves.png)

{curves}

## Limits

* Small world, template sentences; texts outside it fall back to bytes the model has never seen.
* Rows longer than 512 tokens were not trained, and the configuration allows no more.
* Two pretraining seeds; numbers move by several points from seed to seed, and the standard deviations above are
  between evaluation seeds of one model, not between models.
"""

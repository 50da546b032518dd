"""Pretrain the micro base model on the generated world, measure its gates and ship it.

    python data_scripts/make_micro_world.py                        # first: the world itself
    python data_scripts/pretrain_micro.py --seed 0 --out runs/s0   # train, or resume
    python data_scripts/pretrain_micro.py --gates runs/s0          # zero-shot, in-context accuracy
    python data_scripts/pretrain_micro.py --ship runs/s0 runs/s1   # the better seed, with its card

The model is a plain, randomly initialised transformers Llama.  On natural-looking rows alone a
model of this size does not learn to read its context within minutes, so training follows a
curriculum: copying repeated strings, then key-value rows, then exact-match examples in the prompt
templates, then the full mixture of episodes and text.
"""

import argparse
import json
import random
import time
from pathlib import Path

import make_micro_world as W
import micro_gates as G
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minicpt.errors import print_any_text

# a fifth kind of token, next to W.OTHER, FIRST, LABEL and EXACT: the copy of a repeated string
REPEAT = 4
# phase: row length, rows per batch, exact-match accuracy at which it ends, and its longest duration
# in steps
PHASES = [(32, 96, 0.55, 1500), (48, 64, 0.65, 1200), (64, 48, 0.72, 800), (128, 24, None, None)]
LONG = (512, 6)  # every second batch of the last fifth of phase 3, so that longer contexts work
MUON_LR, ADAM_LR = (5e-3, 2e-3), (3e-3, 1.5e-3)  # phases 0-2, phase 3


# ---------------------------------------------------------------- model
def fp32_attention(module, q, k, v, mask, scaling=None, **_):
    """Causal attention in fp32: its bf16 backward is twice as slow on a CPU."""
    out = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("fp32_causal", fp32_attention)


def new_model(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=352,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="fp32_causal",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if "embed" in name:
            torch.nn.init.normal_(p, std=0.05)
        elif p.ndim == 2:  # the two matrices that write into the residual stream start small
            std = config.hidden_size**-0.5
            torch.nn.init.normal_(
                p, std=0.3 * std if "o_proj" in name or "down_proj" in name else std
            )
    return model


def optimizers(model):
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    return [
        torch.optim.Muon(
            matrices, lr=MUON_LR[0], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=ADAM_LR[0], betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rates(step, phase, start, steps):
    """Constant after a warm-up; phase 3 glides to its lower rate, its last 40 % decay to zero."""
    if phase < 3:
        warm = min(1, (step + 1) / 60)
        return MUON_LR[0] * warm, ADAM_LR[0] * warm
    t = step - start
    glide, decay = min(1, t / 150), min(1, (steps - t) / (0.4 * steps))
    return [(a + (b - a) * glide) * decay for a, b in (MUON_LR, ADAM_LR)]


# ---------------------------------------------------------------- data
def repeat_row(rng, words, length):
    row = rng.sample(words, rng.randint(3, 14))
    return (row * length)[:length], ([W.OTHER] * len(row) + [REPEAT] * length)[:length], 0.0


def key_value_row(rng, ids, words, length, formats):
    """`k v k v ...` in one of several formats; the value of a key seen before is the target."""
    n = rng.choice([3, 4, 6])
    keys, values = rng.sample(words, n), rng.sample(words, n)
    style, rounds, tpl = rng.choice(formats), rng.random() < 0.5, W.template(rng)
    row, kinds, seen, queue = [], [], set(), []
    while len(row) < length:
        queue = queue or (rng.sample(range(n), n) if rounds else [rng.randrange(n)])
        i = queue.pop()
        part = [keys[i]]
        if style == "template":
            part = W.example_ids(ids, tpl, part)
        elif style != "plain":
            part.append(ids.word[":"])
        end = [] if style in ("plain", "colon") else [ids.newline]
        row += part + [values[i]] + end
        kinds += [W.OTHER] * len(part) + [W.EXACT if i in seen else W.FIRST] + [W.OTHER] * len(end)
        seen.add(i)
    return row[:length], kinds[:length], 0.0


def make_row(rng, ids, phase, t, length, words, active):
    """One row of a phase: token ids, kinds, share of other tokens in the language-model loss."""
    if phase == 0:
        if rng.random() < 0.8:
            return repeat_row(rng, active, length)
        return key_value_row(rng, ids, active, length, ["plain"] * 3 + ["colon"] * 2)
    if phase == 1:
        pool = words if rng.random() < 0.5 else active
        return key_value_row(rng, ids, pool, length, ["plain", "colon", "line"] + ["template"] * 5)
    if phase == 2:
        draw = rng.random()
        if draw < 0.4:
            return key_value_row(rng, ids, words, length, ["template"])
        if draw < 0.79:
            return *W.key_episode(rng, ids, length, [2, 3, 4, 6], longest=2, noise=0), 0.1
        return *W.lm_row(rng, ids, length), 0.5
    if rng.random() < 0.3:
        return *W.lm_row(rng, ids, length), 0.5
    if t < 300 and rng.random() < 0.3:
        return *W.key_episode(rng, ids, length, [2, 3, 4, 6], longest=2, noise=0), 0.1
    return *W.episode(rng, ids, length), 0.1


def make_batch(seed, step, phase, t, shape, ids, words, active):
    """The batch depends on (seed, step) only, so a resumed run sees the same data."""
    rng, length = random.Random(f"{seed}-{step}"), shape[0]
    rows = [make_row(rng, ids, phase, t, length, words, active) for _ in range(shape[1])]
    tokens, kinds = (np.array([row[i] for row in rows]) for i in (0, 1))
    share = np.array([row[2] for row in rows])[:, None]
    text = (kinds == W.OTHER) & (np.random.default_rng([seed, step]).random(kinds.shape) < share)
    kinds = np.where(text, -1, kinds)  # -1: other tokens chosen for the language-model loss
    keep = np.isin(kinds, (-1, W.LABEL, W.EXACT, REPEAT))
    keep[:, 0] = False  # nothing predicts the first token
    return (
        torch.from_numpy(tokens),
        torch.from_numpy(kinds),
        torch.from_numpy(keep.reshape(-1).nonzero()[0]),
    )


# ---------------------------------------------------------------- training
def train_step(body, batch, phase, active, device):
    """Loss and counts of one batch; the output head runs only where there is a target."""
    tokens, kinds, where = (x.to(device) for x in batch)
    with torch.autocast(device, torch.bfloat16):
        hidden = body(input_ids=tokens, use_cache=False).last_hidden_state
        pad = -len(where) % 256  # few distinct sizes keep the allocator from growing
        picked = hidden.flatten(0, 1)[F.pad(where - 1, (0, pad))]
        # phase 0 has 128 active words: with the full softmax all other embeddings would be pushed
        # away
        embedding = body.embed_tokens.weight  # tied: the same matrix reads and predicts tokens
        table = embedding[active] if phase == 0 else embedding
        logits = (picked @ table.T).float()[: len(where)]
    targets, kind = tokens.flatten()[where], kinds.flatten()[where]
    goal = torch.searchsorted(active, targets) if phase == 0 else targets
    losses = F.cross_entropy(logits, goal, reduction="none")
    label = kind != -1
    loss = losses[label].mean() + (0.5 * losses[~label].mean() if (~label).any() else 0)
    hit = logits.detach().argmax(-1) == goal
    stats = {
        "loss": losses[label].sum(),
        "labels": label.sum(),
        "text_loss": losses[~label].sum(),
        "texts": (~label).sum(),
    }
    for name, code in (("label", W.LABEL), ("exact", W.EXACT), ("repeat", REPEAT)):
        stats[name + "_hits"], stats[name + "_n"] = hit[kind == code].sum(), (kind == code).sum()
    return loss, {k: float(v.detach()) for k, v in stats.items()}


def train(args):
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(W.ASSETS / "micro")
    ids, model = W.Ids(tokenizer), new_model(tokenizer).to(args.device)
    words = sorted(ids.word[w] for w in W.NOUNS + W.M.ARBITRARY)
    picked = sorted(random.Random(args.seed).sample(words, 128 - 1))
    active = torch.tensor(sorted(picked + [ids.word[":"]]), device=args.device)
    opts = optimizers(model)
    now = {"step": 0, "phase": 0, "start": 0, "tokens": 0, "seconds": 0.0}
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=args.device)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["opts"]):
            opt.load_state_dict(state)
        now = saved["now"]
    log, sums, clock = open(args.out / "log.jsonl", "a+"), {}, time.time()
    log.seek(0)  # a resumed run repeats the steps after its checkpoint: drop their lines
    kept = [line for line in log if json.loads(line)["step"] <= now["step"]]
    log.truncate(0)
    log.writelines(kept)
    while now["phase"] < 3 or now["step"] - now["start"] < args.steps:
        step, phase, t = now["step"], now["phase"], now["step"] - now["start"]
        long = phase == 3 and t >= 0.8 * args.steps and step % 2
        shape = LONG if long else PHASES[phase][:2]
        for opt, lr in zip(opts, learning_rates(step, phase, now["start"], args.steps)):
            opt.param_groups[0]["lr"] = lr
        batch = make_batch(args.seed, step, phase, t, shape, ids, words, picked)
        loss, stats = train_step(model.model, batch, phase, active, args.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        sums = {k: sums.get(k, 0) + v for k, v in stats.items()}
        now["step"], now["tokens"] = step + 1, now["tokens"] + shape[0] * shape[1]
        if now["step"] % 50 == 0:
            now["seconds"], clock = now["seconds"] + time.time() - clock, time.time()
            rate = lambda a, b: round(sums[a] / sums[b], 4) if sums[b] else None
            line = {
                **now,
                "label_loss": rate("loss", "labels"),
                "text_loss": rate("text_loss", "texts"),
                **{k: rate(k + "_hits", k + "_n") for k in ("label", "exact", "repeat")},
            }
            end, longest = PHASES[phase][2:]
            if phase < 3 and ((line["exact"] or 0) > end or t + 1 >= longest):
                now["phase"], now["start"] = phase + 1, now["step"]
            if now["step"] % 500 == 0 or now["phase"] != phase:
                line["gates"] = (
                    G.accuracy(model, tokenizer, seeds=2, queries=60) if phase > 1 else None
                )
                line["exact_match"] = G.exact_match(model, ids, 300)
                state = {
                    "model": model.state_dict(),
                    "opts": [o.state_dict() for o in opts],
                    "now": now,
                }
                torch.save(state, checkpoint)
                save(model, tokenizer, args.out / "model")
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(json.dumps(line), flush=True)
            sums = {}
    save(model, tokenizer, args.out / "model")


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main():
    print_any_text()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=4000, help="steps of phase 3 (3072 tokens each)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/micro"), help="folder of checkpoint, log and model"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="one is fastest for a model this small"
    )
    parser.add_argument("--gates", type=Path, metavar="RUN", help="measure the model of a run")
    parser.add_argument(
        "--ship",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="copy the best measured run to the assets",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.gates:
        G.measure(args.gates)
    elif args.ship:
        G.ship(args.ship)
    else:
        train(args)


if __name__ == "__main__":
    main()

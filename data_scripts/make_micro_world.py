"""Generate the micro world: tokenizer, sentences, training episodes and the five micro tasks.

    python data_scripts/make_micro_world.py      # writes minicpt/assets/{micro,tasks}

The world is a few dozen concept sets (words that belong together and a name for them), news topics,
kinds of entities, question types and polar adjectives. The base model is pretrained on two kinds of
rows:
  * language-model rows: sentences that make words of one class occur together and (mostly) name the
    class;
  * episodes: `input: <text>\\noutput: <label>\\n` repeated to the row's end, which teach reading the
    context.
The evaluation tasks are held out: no episode ever opposes two classes of one evaluation task, their
canonical labels are never episode labels, and an evaluation class enters an episode only alone and
with arbitrary labels (without that, a model of this size does not learn to match those words in a
context at all).
"""

import argparse
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import micro_words as M

from minicpt.errors import print_any_text

ASSETS = Path(__file__).resolve().parent.parent / "minicpt" / "assets"
INPUTS = ["input", "text", "sentence"]
OUTPUTS = ["output", "label", "target"]
INTRAS = ["\n", " "]
INTERS = ["\n"]
PUNCTUATION = [".", ",", "?", ":"]  # glued to the word before them, as in ordinary English
SPECIALS = ["<pad>", "<eos>"]


# ---------------------------------------------------------------- the classes of the world
@dataclass
class Class:
    name: str
    words: list  # member words, or question forms
    style: str  # how its texts look: set, news, entity, review or question
    task: str = ""  # evaluation task it belongs to ("" = free for episodes)
    named: bool = True  # does any sentence tell its name?
    verbs: tuple = ()  # reviews only
    other: "Class" = None  # reviews only: the opposite polarity


def parse(block, style, task="", sep=None):
    for line in block.strip().splitlines():
        name, words = line.split(":", 1)
        words = [w.strip() for w in words.split(sep)]
        yield Class(name.lstrip("-"), words, style, task, named=not name.startswith("-"))


def polar_classes(half, task):
    pick = lambda block: block.split("|")[half].split()
    positive = Class("positive", pick(M.POSITIVE), "review", task, verbs=pick(M.POSITIVE_VERBS))
    negative = Class("negative", pick(M.NEGATIVE), "review", task, verbs=pick(M.NEGATIVE_VERBS))
    positive.other, negative.other = negative, positive
    return [negative, positive]


SETS = list(parse(M.SETS, "set"))
for c in SETS:
    c.task = "set_cls" if c.name in M.SET_CLS else ""
FREE_SETS = [c for c in SETS if not c.task]
FREE_QUESTIONS = list(parse(M.TRAIN_QUESTIONS, "question", sep="|"))
FREE_POLAR = polar_classes(0, "")
TASKS = {
    "sst2": polar_classes(1, "sst2"),
    "ag_news": list(parse(M.TOPICS, "news", "ag_news")),
    "trec": list(parse(M.QUESTIONS, "question", "trec", sep="|")),
    "dbpedia": list(parse(M.KINDS, "entity", "dbpedia")),
    "set_cls": [c for c in SETS if c.task],
}
EVALUATION = [c for classes in TASKS.values() for c in classes]
SLOTS = {
    slot: words if isinstance(words, list) else words.split() for slot, words in M.SLOTS.items()
}
SLOTS["{n}"] = NOUNS = [w for c in FREE_SETS for w in c.words]
# label words occur in meaningless text as well
SLOTS["{g}"] = M.ARBITRARY + [c.name for c in EVALUATION]


# ---------------------------------------------------------------- texts (lists of words)
def fill(rng, template, words=(), name=""):
    """Fill the slots of a template; `{w}` takes distinct words of the class."""
    words = iter(rng.sample(words, min(5, len(words))))
    return [
        next(words)
        if t == "{w}"
        else name
        if t == "{c}"
        else rng.choice(SLOTS[t])
        if t in SLOTS
        else t
        for t in template.split()
    ]


def clause(rng, polar):
    if rng.random() < 0.2:
        return fill(rng, rng.choice(M.VERB_CLAUSES), polar.verbs)
    return fill(rng, rng.choice(M.CLAUSES), polar.words)


def review(rng, polar, hard):
    """A hard review has two clauses of its polarity, one of the other, perhaps a neutral one."""
    if hard:
        clauses = [clause(rng, polar), clause(rng, polar), clause(rng, polar.other)]
    else:
        clauses = [clause(rng, polar) for _ in range(rng.choice([1, 1, 2]))]
    if rng.random() < (0.6 if hard else 0.2):
        clauses.append(fill(rng, rng.choice(M.NEUTRAL)))
    rng.shuffle(clauses)
    text = clauses[0]
    for part in clauses[1:]:
        text = text + [rng.choice([",", "and", "but"])] + part
    return text


def text_of(rng, cls, style=None, noise=0.0, hard=True):
    """A text of the class; `noise` is the share of its words replaced by random nouns."""
    style = style or cls.style
    if style == "review":
        return review(rng, cls, hard)
    if style == "question":
        return fill(rng, rng.choice(cls.words)) + ["?"] * (rng.random() < 0.8)
    words = cls.words
    if noise:
        words = [rng.choice(NOUNS) if rng.random() < noise else w for w in words]
    if style == "set":
        return rng.sample(words, rng.choice([1, 2, 3, 3, 4]))
    return fill(rng, rng.choice(M.NEWS if style == "news" else M.ENTITY), words)


def show(words):
    """A list of words as ordinary text (punctuation glued to the word before)."""
    text = " ".join(words)
    for p in PUNCTUATION:
        text = text.replace(f" {p}", p)
    return text


# ---------------------------------------------------------------- language-model sentences
def sentence(rng):
    """One sentence or two; classes have equal rates, unnamed ones lose the naming part."""
    style = rng.choices(
        ["set", "news", "entity", "review", "question", "generic"], [30, 18, 18, 14, 14, 10]
    )[0]
    if style == "generic":
        return fill(rng, rng.choice(M.GENERIC))
    held_out = rng.random() < 0.6
    if style == "set":
        cls = rng.choice(SETS)
        if not cls.named or rng.random() < 0.3:
            return fill(rng, rng.choice(M.UNNAMED_SET), cls.words)
        return fill(rng, rng.choice(M.NAMING_SET), cls.words, cls.name)
    if style == "review":
        side = rng.randrange(2)
        cls = (TASKS["sst2"] if held_out else FREE_POLAR)[side]
        name = rng.choice(M.POLAR_NAMES)[1 - side]
        return text_of(rng, cls, hard=rng.random() < 0.2) + fill(rng, M.NAMING["review"], (), name)
    task = {"news": "ag_news", "entity": "dbpedia", "question": "trec"}[style]
    cls = rng.choice(
        TASKS[task] if held_out else FREE_QUESTIONS if style == "question" else FREE_SETS
    )
    text = text_of(rng, cls, style)
    text = text[:-1] if text[-1] == "?" else text
    if cls.named and rng.random() < 0.8:
        return text + fill(rng, M.NAMING[style], (), cls.name)
    # an unnamed pair: the words cluster, the name stays unknown
    end = "?" if style == "question" else "."
    more = text_of(rng, cls, style)
    return text + [end] + (more if more[-1] == "?" else more + [end])


# ---------------------------------------------------------------- tokenizer
TEMPLATE_WORDS = INPUTS + OUTPUTS + ["classify"]


def world_words():
    classes = SETS + EVALUATION + FREE_QUESTIONS + FREE_POLAR
    templates = (
        M.NEWS
        + M.ENTITY
        + M.CLAUSES
        + M.VERB_CLAUSES
        + M.NEUTRAL
        + M.NAMING_SET
        + M.UNNAMED_SET
        + M.GENERIC
    )
    texts = templates + [*M.NAMING.values(), *M.TEXT_NAMES.values(), *TEMPLATE_WORDS]
    texts += ["the as or a and which of these labels example examples"]
    words = {w for text in texts for w in text.split()}
    for c in classes:
        words |= {c.name, *c.verbs} | {w for form in c.words for w in form.split()}
    for pool in [*SLOTS.values(), *M.POLAR_NAMES]:
        words |= set(pool)
    return sorted(w for w in words if w.isalpha())


def build_tokenizer():
    """Byte-level BPE without merges: a world word is one token, all else falls back to bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab += ["Ġ" + p for p in PUNCTUATION] + ["Ġ" + w for w in world_words()] + TEMPLATE_WORDS
    bpe = models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


class Ids:
    """Word -> token id, as the tokenizer gives it (main() checks that) but much faster."""

    def __init__(self, tokenizer):
        vocab = tokenizer.get_vocab()
        self.size = len(vocab)
        self.word = {t[1:]: i for t, i in vocab.items() if t.startswith("Ġ") and len(t) > 1}
        self.word.update({p: vocab[p] for p in PUNCTUATION})
        self.start = {w: vocab[w] for w in TEMPLATE_WORDS}  # the same words at the start of a line
        self.newline, self.pad = vocab["Ċ"], vocab["<pad>"]

    def __call__(self, words):
        return [self.word[w] for w in words]


def template(rng):
    """(input, output, intra, inter): the default 40 % of the time, else any combination."""
    if rng.random() < 0.4:
        return "input", "output", "\n", "\n"
    return rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice(INTRAS), rng.choice(INTERS)


def example_ids(ids, tpl, text_ids):
    """Ids of an example up to and including `output:`; the label and a newline follow."""
    inp, out, intra, _ = tpl
    middle = [ids.newline, ids.start[out]] if intra == "\n" else [ids.word[out]]
    return [ids.start[inp], ids.word[":"], *text_ids, *middle, ids.word[":"]]


# ---------------------------------------------------------- rows: (ids, kinds), kinds as below
# other token / a label's first use / a later use / an exact repetition
OTHER, FIRST, LABEL, EXACT = range(4)


def lm_row(rng, ids, length):
    row = []
    if rng.random() < 0.12:  # a repeated random string keeps plain copying alive
        row = ids(rng.sample(NOUNS, rng.randint(4, 30)))
        row = row * (length // len(row) + 1)
    while len(row) < length:
        row += ids(sentence(rng)) + [ids.newline] * (rng.random() < 0.3)
    return row[:length], [OTHER] * length


def fill_row(rng, ids, length, texts, labels, known, late=False, exact=False, head=()):
    """Repeat examples `text -> label` to the row's end.  `texts` are functions, one for each class;
    `known`: the labels can be guessed before their first use (canonical names)."""
    tpl, n = template(rng), len(texts)
    row, kinds, seen = list(head), [OTHER] * len(head), set()
    rounds, queue = rng.random() < 0.5, []
    early = rng.sample(range(n), rng.randint(1, n - 1)) if late and n > 2 else None
    for turn in range(length):
        if early and turn >= 2 and rng.random() < 0.2:
            early = None  # from here on the remaining classes appear as well
        if early:
            k = rng.choice(early)
        elif rounds:  # distinct classes first, as in k-shot sampling
            queue = queue or rng.sample(range(n), n)
            k = queue.pop()
        else:
            k = rng.randrange(n)
        part = example_ids(ids, tpl, ids(texts[k]()))
        kind = EXACT if exact and k in seen else LABEL if known or k in seen else FIRST
        seen.add(k)
        row += part + [ids.word[labels[k]], ids.newline]
        kinds += [OTHER] * len(part) + [kind, OTHER]
        if len(row) >= length:
            return row[:length], kinds[:length]


def arbitrary_labels(rng, n):
    """Label words or random nouns (never a canonical label of an evaluation task)."""
    return rng.sample(M.ARBITRARY if rng.random() < 0.45 else NOUNS, n)


def key_episode(rng, ids, length, sizes, longest=4, noise=3):
    """Exact matching: the text of a class is a fixed key of words (plus noise words)."""
    n = rng.choice(sizes)
    keys = [rng.sample(NOUNS + M.ARBITRARY, rng.randint(1, longest)) for _ in range(n)]
    most = rng.randint(0, noise)

    def text(key):
        words = list(key)
        for _ in range(rng.randint(0, most)):
            words.insert(rng.randint(0, len(words)), rng.choice(NOUNS))
        return words

    texts = [lambda key=key: text(key) for key in keys]
    return fill_row(rng, ids, length, texts, arbitrary_labels(rng, n), known=False, exact=True)


def with_held_out(rng, classes, styles=None):
    """Replace up to three classes by evaluation classes, at most one of each evaluation task."""
    tasks = [t for t in TASKS if not styles or TASKS[t][0].style in styles]
    for i, task in enumerate(rng.sample(tasks, rng.randint(1, min(3, len(tasks), len(classes))))):
        classes[i] = rng.choice(TASKS[task])
    return classes


def random_forms(rng):
    """A class of made-up sentence skeletons: function words, noun slots, often a shared anchor."""
    anchor, shared = rng.sample(SLOTS["{f}"], 2), rng.random() < 0.6
    forms = []
    for _ in range(rng.choice([1, 2, 3, 4])):
        start = anchor if shared else rng.sample(SLOTS["{f}"], 2)
        words = start + rng.choices(
            ["{n}", "{f}", "{place}", "{name}"], [5, 4, 1, 1], k=rng.randint(1, 5)
        )
        forms.append(" ".join(words))
    return Class("", forms, "question")


def episode(rng, ids, length):
    """One row of one random task: set membership, sentiment, sentence forms or exact keys."""
    family = rng.choices(["set", "sentiment", "form", "key"], [48, 24, 16, 12])[0]
    sizes = [2, 2, 3, 3, 4, 4, 4, 5, 6, 6, 8, 10, 14]
    if family == "key":
        return key_episode(rng, ids, length, [2, 3, 4, 4, 5, 6, 8])
    n, known, late = rng.choice(sizes), rng.random(), False
    mode = "canonical" if known < 0.4 else "permuted" if known < 0.5 else "arbitrary"
    hard, noise = rng.random() < 0.6, rng.choice([0, 0, 0, 0.15, 0.3])
    if family == "sentiment":
        classes = list(FREE_POLAR)
        if (
            mode == "arbitrary" and rng.random() < 0.6
        ):  # one polarity from the evaluation adjectives
            side = rng.randrange(2)
            classes[side] = TASKS["sst2"][side]
        names = rng.choice(M.POLAR_NAMES[1:])[::-1]
        texts = [lambda c=c: text_of(rng, c, hard=hard) for c in classes]
        subject = "review"
    else:
        if family == "set":
            classes = rng.sample(FREE_SETS, n)
        else:
            types = rng.sample(FREE_QUESTIONS, min(n, len(FREE_QUESTIONS)))
            made_up = mode == "arbitrary" or rng.random() < 0.5
            classes = [random_forms(rng) if made_up and rng.random() < 0.7 else c for c in types]
            mode = "arbitrary" if made_up else mode
        if mode == "arbitrary" and rng.random() < 0.8:
            classes = with_held_out(
                rng, classes, ["question"] if family == "form" else ["set", "news", "entity"]
            )
        style = (
            None if family == "form" else rng.choices(["set", "news", "entity"], [46, 27, 27])[0]
        )
        names = [c.name for c in classes]
        texts = [lambda c=c: text_of(rng, c, style, noise) for c in classes]
        subject = M.TEXT_NAMES[style or "question"]
        late = mode == "canonical" and rng.random() < 0.15
    n = len(classes)
    labels = (
        names
        if mode == "canonical"
        else rng.sample(names, n)
        if mode == "permuted"
        else arbitrary_labels(rng, n)
    )
    head = ()
    if n <= 6 and rng.random() < 0.12:  # sometimes an instruction comes first
        words = instruction(subject, rng.sample(labels, n))
        head = [ids.start[words[0]]] + ids(words[1:]) + [ids.newline]
    return fill_row(rng, ids, length, texts, labels, mode == "canonical", late, head=head)


# ---------------------------------------------------------------- the evaluation tasks
def instruction(subject, labels):
    words = ["classify", "the", subject, "as", labels[0]]
    for label in labels[1:-1]:
        words += [",", label]
    return words + ["or", labels[-1], "."]


def task_rows(rng, classes, train, test):
    seen, rows = set(), []
    for split, count in (("train", train), ("test", test)):
        for cls in classes:
            for _ in range(count):
                text = show(text_of(rng, cls))
                while text in seen or " " not in text:
                    text = show(text_of(rng, cls))
                seen.add(text)
                rows.append({"text": text, "label": cls.name, "split": split})
    rng.shuffle(rows)
    return rows


def write_tasks(rng, folder):
    sizes = {
        "sst2": (80, 400),
        "ag_news": (50, 200),
        "trec": (40, 120),
        "dbpedia": (40, 50),
        "set_cls": (40, 200),
    }
    titles = dict(
        sst2="SST-2",
        ag_news="AG News",
        trec="TREC",
        dbpedia="DBpedia",
        set_cls="Set Classification",
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, classes in TASKS.items():
        rows = task_rows(rng, classes, *sizes[name])
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        labels = [c.name for c in classes]
        spec = {
            "name": name,
            "title": f"{titles[name]} (micro)",
            "source": "generated by data_scripts/make_micro_world.py",
            "verbalizers": {label: label for label in labels},
            "arbitrary_labels": M.ARBITRARY,
            "default_labels": "arbitrary" if name == "set_cls" else "canonical",
            "templates": {
                "input": [f"{w}: {{}}" for w in INPUTS],
                "output": [f"{w}: {{}}" for w in OUTPUTS],
                "intra": INTRAS,
                "inter": INTERS,
            },
            # the library fills in the label words in use
            "instruction": f"classify the {M.TEXT_NAMES[classes[0].style]} as {{labels}}.",
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        (folder / f"{name}.jsonl").write_bytes(data)
        (folder / f"{name}.json").write_text(json.dumps(spec, indent=1) + "\n")


def check(tokenizer):
    """Fast ids and tokenizer agree, no word belongs to two classes, every label is one token."""
    classes = FREE_SETS + FREE_POLAR + [c for c in EVALUATION if c.style != "question"]
    words = [w for c in classes for w in c.words]
    twice = {w for w in words if words.count(w) > 1}
    assert not twice, f"words in two classes: {sorted(twice)}"
    names = {c.name for c in EVALUATION}
    assert not names & set(NOUNS + M.ARBITRARY), "a canonical label could become an episode label"
    ids, rng = Ids(tokenizer), random.Random(1)
    for make in (episode, lm_row, lambda *a: key_episode(*a, sizes=[3])):
        for _ in range(200):
            row, _ = make(rng, ids, 128)
            assert tokenizer(tokenizer.decode(row))["input_ids"] == row, tokenizer.decode(row)
    for text in ("Naïve café — 東京 😀\t x\n", "input: the plot was great\noutput: positive\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert all(len(tokenizer(" " + w)["input_ids"]) == 1 for w in names | set(M.ARBITRARY))


def main():
    print_any_text()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the task rows")
    parser.add_argument(
        "--out", type=Path, default=ASSETS, help="folder that gets micro/ and tasks/"
    )
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    check(tokenizer)
    tokenizer.save_pretrained(args.out / "micro")
    write_tasks(random.Random(args.seed), args.out / "tasks")
    print(f"vocabulary {len(tokenizer)}; tasks: {', '.join(TASKS)}; written to {args.out}")


if __name__ == "__main__":
    main()

"""Tasks, verbalizers, few-shot splits: from a task's name to K labelled shots and a list of queries.

A task is two files: `<name>.jsonl` with one {"text", "label", "split"} a line, and `<name>.json` with its verbalizers
and templates. Micro tasks and a reader's own have this form; real ones come from the hub, or a folder in its schema.
"""

import hashlib
import json
import os
import random
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, product, zip_longest
from pathlib import Path
from string import Formatter

from .core.templates import Template
from .errors import MiniCPTError, check_type, unknown, whole_number
from .schema import ASSETS, check_words, conform, parse, read_text

TASKS = ("sst2", "ag_news", "trec", "dbpedia", "set_cls")
TABLE_SHOTS = (2, 4, 6)
OPTIONAL = ("title", "instruction", "arbitrary_labels", "default_labels")  # in a task's file
KINDS = ("canonical", "arbitrary")  # of label words
# for real tasks: things that no class is named after, each one token behind a space for GPT-2 and SmolLM2
ARBITRARY = (
    "barrel basket bell bottle box brick bucket button candle chair clock curtain door feather flag fountain hook "
    "ladder lamp mirror nail needle pencil pillow pipe ribbon rope shell spoon string thread wheel"
).split()
Row = tuple[str, str]  # text, class name


@dataclass(frozen=True)
class Task:
    """A classification task: rows of (text, class), a label word per class, template pools."""

    name: str
    train: list[Row]
    test: list[Row]
    verbalizers: dict[str, str]  # class -> label word(s)
    templates: list[Template]
    title: str = ""
    instruction: str = ""  # {labels} stands for the label words
    arbitrary_labels: list[str] = field(default_factory=list)
    default_labels: str = "canonical"

    @cached_property
    def sha256(self) -> str:
        """Hash of all that decides what is drawn from the task: rows, words, templates, instruction, in their order."""
        content = {**vars(self), "title": "", "templates": [vars(t) for t in self.templates]}
        return _sha256(json.dumps(content).encode())[:16]


def _build(spec: dict, splits: dict[str, list[Row]]) -> Task:
    """Check the rows of train and test against the verbalizers and put a task together."""
    name, verbalizers = spec["name"], spec["verbalizers"]
    for where, rows in splits.items():
        for i, (_, label) in enumerate(rows, 1):
            if label not in verbalizers:
                raise MiniCPTError(
                    f"{name}, {where} row {i}: {unknown('label', label, verbalizers)}"
                )
    seen = {label for _, label in splits["train"]}
    if len(seen) == 1:
        raise MiniCPTError(
            f"{name}: all training rows are of the class {seen.pop()!r}; add rows of another class."
        )
    check_words(verbalizers)
    check_words({word: word for word in spec.get("arbitrary_labels", [])})
    pools = [spec["templates"][part] for part in ("input", "output", "intra", "inter")]
    templates = [Template(*chosen) for chosen in product(*pools)]
    optional = {"title": name} | {key: spec[key] for key in OPTIONAL if key in spec}
    return Task(name, **splits, verbalizers=verbalizers, templates=templates, **optional)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def load_task_file(path: str | Path) -> Task:
    """Load a task from its JSON file; the rows lie beside it in a JSONL of the same name.

    Raises `MiniCPTError` naming the file, the line or key, and what is valid.
    """
    path = Path(path)
    rows_path = path.with_suffix(".jsonl")
    try:
        text, rows = read_text(path), read_text(rows_path)
        digest = _sha256(rows_path.read_bytes())
    except FileNotFoundError as error:
        raise MiniCPTError(
            f"{error.filename} does not exist; a task is two files, {path.name} and {rows_path.name}."
        ) from error
    spec = parse(text, f"{path}: ")
    conform(spec, "task", "key", f"{path}: ")
    if spec.get("sha256", digest) != digest:
        raise MiniCPTError(
            f'{rows_path} has changed: its sha256 is {digest}. Restore it, or drop "sha256" from {path}.'
        )
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for number, line in enumerate(rows.split("\n"), 1):  # a text may hold what else ends a line
        if line.strip():
            where = f"{rows_path}, line {number}: "
            row = parse(line, where)
            conform(row, "row", "key", where)
            splits[row["split"]].append((row["text"], str(row["label"])))
    return _build(spec, splits)


def real_specs() -> dict[str, dict]:
    """Hub names, columns, verbalizers and template pools of the paper's data sets."""
    return json.loads((ASSETS / "real_tasks.json").read_text(encoding="utf-8"))


def load_real_task(name: str, data_dir: str | Path | None = None) -> Task:
    """Load a real task through `datasets`: from `data_dir` (or $MINICPT_DATA) if given, else from the hub.

    Raises `MiniCPTError` for a name, folder or hub data set that cannot be had, and for a column that is missing.
    """
    specs = real_specs()
    if name not in specs:
        raise unknown("real task", name, [*specs, "set_cls (generated: there is no other)"])
    spec = specs[name]
    # the TREC trap: label numbers mean the hub's order of classes, which is the order of the verbalizers here
    named = dict(enumerate(spec["verbalizers"]))
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for split, rows in splits.items():
        for i, row in enumerate(load_table(spec, split, data_dir), 1):
            for column in _text_columns(spec):
                if not isinstance(row[column], str):
                    raise MiniCPTError(
                        f"{name}, {split} row {i}: the column {column!r} must be text, got {row[column]!r}; mend the "
                        "row, or leave it out."
                    )
            text, label = spec["text"].format(**row).strip(), row[spec["label_column"]]
            if text:
                rows.append((text, named.get(label, f"label {label}")))
    return _build({**spec, "name": name, "arbitrary_labels": ARBITRARY}, splits)


def _text_columns(spec: dict) -> list[str]:
    return [column for _, column, _, _ in Formatter().parse(spec["text"]) if column]


def load_table(spec: dict, split: str, data_dir: str | Path | None = None):
    """One split of a real data set as `datasets` has it, all columns of the hub's schema, those needed checked."""
    import datasets

    datasets.disable_progress_bars()
    data_dir = data_dir or os.environ.get("MINICPT_DATA")
    if data_dir:
        file = Path(data_dir).expanduser() / spec["folder"] / f"{split}.jsonl"
        if not file.is_file():
            raise MiniCPTError(
                f"{file} does not exist; the data folder needs {spec['folder']}/train.jsonl and test.jsonl."
            )
        try:
            # the library's own reader keeps a copy by path and time: a file of the same time would not be read again
            lines = file.read_text(encoding="utf-8-sig").split("\n")
            table = datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])
        except (AttributeError, ValueError, TypeError) as error:
            raise MiniCPTError(f"{file}: {error}. It needs one JSON object per line.") from error
        where = str(file)
    else:
        table = _load_hub(spec, split)
        where = f"{spec['hub']} ({split})"
    for column in (*_text_columns(spec), spec["label_column"]):
        if column not in table.column_names:
            raise MiniCPTError(
                f"{where} has no column {column!r}; it has {', '.join(table.column_names)}."
            )
    return table


def _load_hub(spec: dict, split: str):
    """One split from the hub; where the data set's main revision holds a script, from its parquet revision."""
    import datasets

    place = spec["hub"], spec.get("config")
    options = {"split": spec["splits"][split]}
    try:
        try:
            return datasets.load_dataset(*place, **options)
        except RuntimeError:  # "Dataset scripts are no longer supported"
            return datasets.load_dataset(*place, **options, revision="refs/convert/parquet")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise MiniCPTError(
            f"Cannot load {spec['hub']} from the hub: {reason}. Without a network, give a folder in the hub's schema "
            f"(--data-dir or MINICPT_DATA, with {spec['folder']}/train.jsonl and test.jsonl), or use --data micro."
        ) from error


def load_task(name: str | Path, data: str = "micro", data_dir: str | Path | None = None) -> Task:
    """Load a task: an embedded one by name, the real one of that name (`data="real"`), or your own `.json` file."""
    name = str(name)
    if name.endswith(".json"):
        return load_task_file(name)
    if data == "real" and name != "set_cls":  # which is generated, for every model the same
        return load_real_task(name, data_dir)
    if data not in ("micro", "real"):
        raise unknown("data", data, ("micro", "real"))
    if name not in TASKS:
        raise unknown("task", name, [*TASKS, "a path to your own task's .json file"])
    return load_task_file(ASSETS / "tasks" / f"{name}.json")


# ---- splits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """What one cell sees: K shots in context order, the queries, a label word per class, a template."""

    task: str
    shots: list[Row]
    queries: list[Row]
    verbalizers: dict[str, str]
    template: Template
    instruction: str
    seed: int

    @property
    def classes(self) -> list[str]:
        return list(self.verbalizers)

    @property
    def sha256(self) -> str:
        """Hash of everything in the split: two runs with one hash saw the same rows in the same order."""
        template = vars(self.template)
        content = [self.shots, self.queries, self.verbalizers, template, self.instruction]
        return _sha256(json.dumps(content, ensure_ascii=False).encode())[:16]


def sample_shots(labels: list[str], k: int, seed: int, per_class: bool = False) -> list[int]:
    """Draw the indices of k shots with an own generator (the global one is not touched), in random order.

    `per_class=False`: k in total, from distinct classes first. `per_class=True`: k of each class, so k*C in all.
    The 2 shots of a seed are among its 4. Raises `MiniCPTError` if there are too few rows.
    """
    k, seed = whole_number("shots", k, 0), whole_number("seed", seed)
    generator = random.Random(f"shots {seed}")
    by_class: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        by_class.setdefault(label, []).append(i)
    order = sorted(by_class)
    generator.shuffle(order)
    for rows in by_class.values():
        generator.shuffle(rows)
    small = {c: len(by_class[c]) for c in order if len(by_class[c]) < k}
    if per_class and small:
        raise MiniCPTError(
            f"Cannot draw {k} shots of each class: too few rows in {small}. Use fewer shots."
        )
    if not per_class and k > len(labels):
        raise MiniCPTError(
            f"Cannot draw {k} shots from {len(labels)} training rows. Use fewer shots or more rows."
        )
    # each round takes the next row of every class that has one: distinct classes first
    rounds = chain.from_iterable(zip_longest(*(by_class[c] for c in order)))
    chosen = [i for i in rounds if i is not None]
    del chosen[k * len(order) if per_class else k :]
    random.Random(f"order {seed} {k}").shuffle(chosen)
    return chosen


def label_words(task: Task, kind: str, seed: int) -> dict[str, str]:
    """Choose a label word per class: the task's own, or arbitrary ones drawn anew for each seed."""
    if kind == "canonical":
        return dict(task.verbalizers)
    if kind != "arbitrary":
        raise unknown("label kind", kind, KINDS)
    if len(task.arbitrary_labels) < len(task.verbalizers):
        raise MiniCPTError(
            f"{task.name} lists {len(task.arbitrary_labels)} arbitrary labels, it needs one per class."
        )
    words = random.Random(f"labels {seed}").sample(task.arbitrary_labels, len(task.verbalizers))
    return dict(zip(task.verbalizers, words))


def fill_instruction(instruction: str, words: list[str]) -> str:
    """Write the label words where the instruction says {labels}."""
    *others, last = words
    return instruction.replace("{labels}", f"{', '.join(others)} or {last}")


def make_split(
    task: Task, shots: int, seed: int, n_test: int = 200, labels: str = "", per_class: bool = False
) -> Split:
    """Draw the split of a seed: shots, at most `n_test` queries, label words and one template of the task's pool.

    Queries, words and template depend on the seed alone, so that methods and shot counts compare on equal terms.
    """
    seed, n_test = whole_number("seed", seed), whole_number("n_test", n_test, 1)
    check_type("per_class", per_class, bool)
    chosen = sample_shots([label for _, label in task.train], shots, seed, per_class)
    queries = random.Random(f"queries {seed}").sample(task.test, min(n_test, len(task.test)))
    if not queries:
        raise MiniCPTError(f'{task.name} has no test rows; mark some rows with "split": "test".')
    template = random.Random(f"template {seed}").choice(task.templates)
    words = label_words(task, labels or task.default_labels, seed)
    instruction = fill_instruction(task.instruction, [*words.values()])
    return Split(
        task.name, [task.train[i] for i in chosen], queries, words, template, instruction, seed
    )


def split_hashes(task: Task, seeds=range(5)) -> dict[str, str]:
    """Hash of every split of a table: "4-shot seed 0" -> 16 hexadecimal digits."""
    drawn = product(TABLE_SHOTS, seeds)
    return {f"{k}-shot seed {seed}": make_split(task, k, seed).sha256 for k, seed in drawn}


def manifest() -> dict[str, str]:
    """Hashes of the micro tasks' splits: the committed `assets/splits.json` freezes them."""
    tasks = {name: split_hashes(load_task(name)) for name in TASKS}
    return {f"{name} {key}": sha for name, hashes in tasks.items() for key, sha in hashes.items()}

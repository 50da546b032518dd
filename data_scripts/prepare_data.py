"""Fetch the real data sets once, write a data card each, and check their splits against the frozen hashes.

    python data_scripts/prepare_data.py --out data                       from the hub (needs a network)
    python data_scripts/prepare_data.py --out data --from-dir FOLDER     from a folder in the hub's schema
    python data_scripts/prepare_data.py --out data --freeze              also record rows that nobody recorded before

then `make table1 DATA=real DATA_DIR=data`. Rows go to `<out>/<data set>/{train,test}.jsonl` with all columns of the hub
and never into the repository; `minicpt/assets/real_splits.json` keeps the hashes: of the rows, and of the splits that
tables draw from them. What is there already is not fetched again; a file is written whole or not at all.
"""

import argparse
import io
import json
import sys
from collections import Counter
from pathlib import Path

from minicpt.data import ASSETS, Task, load_real_task, load_table, real_specs, split_hashes
from minicpt.errors import MiniCPTError, print_any_text
from minicpt.lab.store import write_atomically
from minicpt.lab.tables import pipes

FROZEN = ASSETS / "real_splits.json"


def fetch(spec: dict, out: Path, from_dir: Path | None) -> None:
    """Write both splits of a data set under `out`, unless they are there."""
    for split in ("train", "test"):
        file = out / spec["folder"] / f"{split}.jsonl"
        if file.is_file():
            continue
        table = load_table(spec, split, from_dir)
        rows = io.BytesIO()
        table.to_json(rows, force_ascii=False)
        write_atomically(file, rows.getvalue().decode("utf-8"))


def card(name: str, spec: dict, task: Task) -> str:
    """The data card of what lies in the folder, in Markdown."""
    counts = {
        split: Counter(label for _, label in rows)
        for split, rows in (("train", task.train), ("test", task.test))
    }
    lines = [
        f"# {spec['title']}",
        "",
        f"`{name}` in the tables; on the hub `{spec['hub']}`"
        + (f", configuration `{spec['config']}`" if spec.get("config") else "")
        + ".",
        "",
        f"**Terms.** {spec['terms']}.",
        "",
        f"**Text.** `{spec['text']!r}` of the columns; **source of templates "
        f"and label words.** {spec['source']}.",
        "",
    ]
    for split, rows in (("train", task.train), ("test", task.test)):
        whole = spec["rows"][split]
        kind = (
            "the whole split"
            if len(rows) == whole
            else f"not the whole split, which has {whole} on the hub"
        )
        lines += [
            f"**{split}.** {len(rows)} rows with text ({kind}), hub split `{spec['splits'][split]}`.",
            "",
        ]
    lines += [
        f"**Label order.** Numbers of the column `{spec['label_column']}`. {spec.get('note', '')}".rstrip(),
        "",
    ]
    rows = [
        (i, label, word, counts["train"][label], counts["test"][label])
        for i, (label, word) in enumerate(spec["verbalizers"].items())
    ]
    lines.append(pipes(["number", "class", "label word", "train", "test"], rows))
    return "\n".join(
        [*lines, "", f"**Hash of rows, label words and templates.** `{task.sha256}`", ""]
    )


def check(name: str, task: Task, freeze: bool) -> str:
    """Compare the task's splits with the frozen ones of the same task; with `freeze`, record those of a new one."""
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    known, found = frozen.setdefault(name, {}), split_hashes(task)
    if task.sha256 in known:
        if known[task.sha256]["splits"] != found:
            raise MiniCPTError(
                f"{name}: the same task gives other splits than the frozen ones: the sampler has changed."
            )
        return "splits as frozen"
    if not freeze:
        return f"rows not seen before ({len(known)} other versions are frozen); --freeze records their hashes"
    known[task.sha256] = {"train": len(task.train), "test": len(task.test), "splits": found}
    write_atomically(FROZEN, json.dumps(frozen, indent=1) + "\n")
    return "hashes recorded"


def main() -> int:
    print_any_text()
    specs = real_specs()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "tasks", nargs="*", default=[], metavar="TASK", help=f"{' '.join(specs)} [all]"
    )
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write [data]")
    parser.add_argument(
        "--from-dir", type=Path, help="take the rows from this folder instead of the hub"
    )
    parser.add_argument(
        "--freeze", action="store_true", help="record the hashes of rows not seen before"
    )
    args = parser.parse_args()
    failed = 0
    for name in args.tasks or specs:
        try:
            if name not in specs:
                raise MiniCPTError(f"Unknown task {name!r}. Valid: {', '.join(specs)}.")
            fetch(specs[name], args.out, args.from_dir)
            task = load_real_task(name, args.out)
            write_atomically(
                args.out / specs[name]["folder"] / "README.md", card(name, specs[name], task)
            )
            print(
                f"{name:8} {len(task.train):6} train {len(task.test):6} test rows: {check(name, task, args.freeze)}"
            )
        except MiniCPTError as error:  # the others still get their turn
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

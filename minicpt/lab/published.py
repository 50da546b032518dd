"""Numbers that others have published, with source and strength of evidence; what is not known is not there.

To add a number: put a cell into `assets/published.json`, its source into "sources" (citation, url; "anchor": true for
another study's baseline) and its evidence into "evidence". `load_published` names what is wrong with an entry.
"""

import json
from pathlib import Path

from ..data import ASSETS, TASKS, real_specs
from ..errors import MiniCPTError
from ..methods.registry import METHODS

KEYS = ["model", "dataset", "method", "shots"]  # one row of a table
NEEDED = {
    "cells": [*KEYS, "value", "source", "evidence"],
    "statements": ["text", "source", "evidence"],
    "ablations": ["rows", "source", "evidence"],
}


def load_published(path: str | Path | None = None) -> dict:
    """Read published.json: sources, evidence, cells, statements, ablations.

    Raises `MiniCPTError`, naming the entry, for a missing key, an unknown name, a source without citation, a value
    outside 0..100, a negative std, shots or n that are no counts, a cell twice, and for what is not JSON.
    """
    path = Path(path or ASSETS / "published.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise MiniCPTError(
            f"{path.name} is not valid JSON: {error}. Often a comma is missing or too many."
        ) from error

    def require(fine, entry, problem, remedy):
        if not fine:
            raise MiniCPTError(f"{path.name}, {entry}: {problem}; {remedy}")

    def complete(entry, keys, name):
        require(
            isinstance(entry, dict),
            name,
            f"{entry!r} is no object",
            f"give one with {', '.join(keys)}",
        )
        missing = [key for key in keys if key not in entry]
        require(
            not missing,
            name,
            f"no {', '.join(missing)}",
            f"add it: all of {', '.join(keys)} are needed",
        )

    complete(data, ["sources", "evidence", *NEEDED], "the file")
    for name, source in data["sources"].items():
        complete(source, ["citation", "url"], f"sources.{name}")
    datasets = list(dict.fromkeys([*TASKS, *real_specs()]))
    valid = {
        "source": data["sources"],
        "evidence": data["evidence"],
        "dataset": datasets,
        "method": METHODS,
    }
    for part, i in [(part, i) for part in NEEDED for i in range(len(data[part]))]:
        entry, name = data[part][i], f"{part}[{i}]"
        complete(entry, NEEDED[part], name)
        for key in valid.keys() & entry.keys():
            require(
                entry[key] in valid[key],
                name,
                f"unknown {key} {entry[key]!r}",
                f"use {', '.join(valid[key])}",
            )
    seen = {}
    for i, cell in enumerate(data["cells"]):
        for key, fine, what, remedy in (
            (
                "value",
                lambda x: type(x) in (int, float) and 0 <= x <= 100,
                "percentage",
                "give a number from 0 to 100",
            ),
            (
                "std",
                lambda x: x is None or type(x) in (int, float) and x >= 0,
                "spread",
                "give percentage points or null",
            ),
            (
                "n",
                lambda x: x is None or type(x) is int and x > 0,
                "count",
                "give the number of runs or null",
            ),
            (
                "shots",
                lambda x: type(x) is int and x >= 0,
                "count",
                "give the number of shots, 0 for zero-shot",
            ),
        ):
            require(
                fine(cell.get(key)), f"cells[{i}]", f"{key} {cell.get(key)!r} is no {what}", remedy
            )
        first = seen.setdefault(tuple(cell[key] for key in KEYS), i)
        require(
            first == i,
            f"cells[{i}]",
            f"the same cell as cells[{first}]",
            "keep the one with the better evidence",
        )
    return data

"""Numbers that others have published, with source and strength of evidence; what is not known is not there.

To add a number: put a cell into `assets/published.json`, its source into "sources" (citation, url; "anchor": true for
another study's baseline) and its evidence into "evidence". `load_published` names what is wrong with an entry.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from ..data import ASSETS, TASKS, real_specs
from ..errors import MiniCPTError, unknown
from ..methods.registry import METHODS

KEYS = ["model", "dataset", "method", "shots"]  # one row of a table
NEEDED = {
    "sources": ["citation", "url"],
    "cells": [*KEYS, "value", "source", "evidence"],
    "statements": ["text", "source", "evidence"],
    "ablations": ["rows", "source", "evidence"],
}
NUMBERS = {  # of a cell: what it is, its types, its range
    "value": ("a percentage", (int, float), 0, 100),
    "std": ("percentage points or null", (int, float, type(None)), 0, math.inf),
    "n": ("a number of runs or null", (int, type(None)), 1, math.inf),
    "shots": ("a number of shots", (int,), 0, math.inf),
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
    mistake = next(_mistakes(data), None)
    if mistake:
        raise MiniCPTError(f"{path.name}, {mistake}")
    return data


def _mistakes(data: dict) -> Iterator[str]:
    """What is wrong with the file; each check relies on those before it, so only the first mistake is to be read."""
    yield from _incomplete("the file", data, ["evidence", *NEEDED])
    names = {
        "source": data["sources"],
        "evidence": data["evidence"],
        "dataset": [*TASKS, *real_specs()],
        "method": METHODS,
    }
    seen = {}
    for part, needed in NEEDED.items():
        entries = data[part].items() if part == "sources" else enumerate(data[part])
        for i, entry in entries:
            place = f"{part}[{i}]"
            yield from _incomplete(place, entry, needed)
            for key, valid in names.items():
                if key in entry and entry[key] not in valid:
                    yield f"{place}: {unknown(key, entry[key], valid)}"
            if part != "cells":
                continue
            for key, (what, kinds, least, most) in NUMBERS.items():
                value = entry.get(key)
                if type(value) not in kinds or value is not None and not least <= value <= most:
                    yield f"{place}: {key} {value!r} is not {what}; correct it."
            twin = seen.setdefault(tuple(entry[key] for key in KEYS), place)
            if twin != place:
                yield f"{place}: the same cell as {twin}; keep the one with the better evidence."


def _incomplete(place: str, entry: object, needed: list[str]) -> Iterator[str]:
    missing = [key for key in needed if not isinstance(entry, dict) or key not in entry]
    if missing:
        yield f"{place}: {', '.join(missing)} is missing; an entry is an object with {', '.join(needed)}."

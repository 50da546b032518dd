"""The store: one JSON file a result, written whole or not at all, resumable; and its results as one CSV file."""

import json
import math
import os
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from ..errors import MiniCPTError

ORDER = ["dataset", "method", "shots", "seed", "n_test", "model"]
MEASURED = ["accuracy", "accuracy_calibrated", "split_sha256", "device", "threads"]
SECONDS = ["fit", "score"]
NUMBERS = ["accuracy", "accuracy_calibrated", "seconds_fit", "seconds_score", "threads"]
COLUMNS = (  # of the CSV, in this order; the rest of a cell's configuration follows
    "dataset method shots seed n_test accuracy accuracy_calibrated label_score split_sha256 "
    "seconds_fit seconds_score device threads"
).split()


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and move it in place, so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name per process: two may write at once
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Store:
    """A folder of results, one JSON file a cell; `<key>.error.json` holds a failure and never counts as done."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, cell) -> Path:
        return self.folder / f"{cell.key()}.json"

    def get(self, cell) -> dict | None:
        """The stored result, or None if there is none yet or its file is damaged (it is then set aside)."""
        return self._read(self.path(cell))

    def put(self, cell, result: dict) -> None:
        write_atomically(self.path(cell), json.dumps(result, ensure_ascii=False))
        self._error_path(cell).unlink(missing_ok=True)

    def put_error(self, cell, error: BaseException) -> None:
        report = {
            "config": cell.config(),
            "error": f"{type(error).__name__}: {error}",
            "traceback": "".join(traceback.format_exception(error)),
        }
        write_atomically(self._error_path(cell), json.dumps(report, indent=1, ensure_ascii=False))

    def results(self) -> Iterator[dict]:
        """All good results of the folder, the oldest first."""
        paths = [path for path in self.folder.glob("*.json") if len(path.stem) == 40]
        for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name)):
            result = self._read(path)
            if result:
                yield result

    def error(self, cell) -> str | None:
        """The message of a cell's failure, None if there is none."""
        path = self._error_path(cell)
        return _json(path)["error"] if path.exists() else None

    def errors(self) -> list[dict]:
        return [_json(path) for path in sorted(self.folder.glob("*.error.json"))]

    def refill(self, path: str | Path, cells: Sequence) -> int:
        """Take the results of cells that are missing here from a CSV of `export`; return how many were taken.

        A row is taken where its configuration is the whole of a cell's, weights and rows included, and its split is the
        one that the cell draws here; a warning counts rows of other splits. Such a result has "source", the file's
        name, and neither scores nor a history. `MiniCPTError` for a file that is missing or lacks columns, for numbers
        that are none, and for two rows of one cell.
        """
        path, others, taken = Path(path), 0, 0
        names = list(cells[0].config())
        rows = _rows(path, names)
        for cell in cells:
            config = cell.config()
            row = rows.get(tuple(map(_text, config.values())))
            if row is None or self.get(cell):
                continue
            if row["split_sha256"] != cell.split().sha256:
                others += 1
                continue
            measured = {name: row[name] for name in MEASURED}
            seconds = {part: row[f"seconds_{part}"] for part in SECONDS}
            self.put(cell, {"config": config, "source": path.name, **measured, "seconds": seconds})
            taken += 1
        if others:
            warnings.warn(
                f"{others} rows of {path.name} come from other splits than those drawn here: they are not taken, "
                "their cells are computed.",
                stacklevel=2,
            )
        return taken

    def _error_path(self, cell) -> Path:
        return self.path(cell).with_suffix(".error.json")

    def _read(self, path: Path) -> dict | None:
        if not path.exists():
            return None
        try:
            result = _json(path)
            if "config" in result and "accuracy" in result:
                return result
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
            pass  # as damaged as a file without these two
        aside = path.with_suffix(".damaged")
        with suppress(FileNotFoundError):  # another run saw it, too
            os.replace(path, aside)
        warnings.warn(
            f"{path.name} is damaged; moved to {aside.name}, the cell counts as not done.",
            stacklevel=3,
        )
        return None


# ---- results as a CSV -----------------------------------------------------------------------------------------------


def export(results: Iterable[dict]) -> str:
    """The results as a CSV that `Store.refill` reads: a row a cell, sorted, floats with six decimals."""
    rows = []
    for result in sorted(results, key=lambda result: [result["config"][name] for name in ORDER]):
        seconds = {f"seconds_{part}": result["seconds"][part] for part in SECONDS}
        row = {name: _text(value) for name, value in result["config"].items()}
        rows.append(row | {name: result[name] for name in MEASURED} | seconds)
    table = pd.DataFrame(rows)
    columns = dict.fromkeys([*COLUMNS, *table.columns])
    return table[list(columns)].to_csv(index=False, float_format="%.6f")


def _rows(path: Path, names: list[str]) -> dict[tuple[str, ...], dict]:
    """The rows of such a CSV by their configuration, which is the columns `names` as text."""
    if not path.is_file():
        raise MiniCPTError(f"{path} does not exist; give a CSV that `minicpt table` wrote.")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    lacking = [name for name in [*COLUMNS, *names] if name not in table]
    if lacking:
        raise MiniCPTError(
            f"{path.name} has no column {', '.join(lacking)}, and without it a result may belong to another cell. "
            "Write the file anew with `minicpt table`, which leaves it as cells.csv."
        )
    table[NUMBERS] = table[NUMBERS].apply(pd.to_numeric, errors="coerce")
    highest = [1, 1, math.inf, math.inf, math.inf]
    fine = (table[NUMBERS].ge(0) & table[NUMBERS].le(highest)).all(axis=1)
    bad = table[~fine | table.duplicated(names)].index
    if len(bad):
        raise MiniCPTError(
            f"{path.name}, line {bad[0] + 2}: a number is missing or out of range, or the cell stands there before. "
            "Remove the line; its cell is then computed."
        )
    return dict(zip(map(tuple, table[names].to_numpy()), table.to_dict("records")))


def _text(value: object) -> str:
    """A value of a configuration as it stands in the CSV."""
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True)


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))

"""The store: one JSON file a result, written whole or not at all, resumable; and its results as one CSV file."""

import hashlib
import json
import os
import platform
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pandas as pd

from ..errors import MiniCPTError

MEASURED = ("accuracy", "accuracy_calibrated", "split_sha256", "device", "threads")
# a row of the CSV; the key is that of the whole configuration
COLUMNS = (
    "dataset method shots seed n_test accuracy accuracy_calibrated label_score split_sha256 "
    "seconds_fit seconds_score device threads text_tokens model model_fingerprint key"
).split()


def key_of(config: dict) -> str:
    """sha1 of the canonical configuration: the name of the result's file."""
    return hashlib.sha1(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and move it in place, so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: others may write the same file now, on another host with the same process id too
    temporary = path.with_name(f".{path.name}.{platform.node()}.{uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_all(folder: Path, texts: dict[str, str]) -> dict[str, Path]:
    """Write several files into a folder; return the paths by name."""
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return {name: folder / name for name in texts}


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
        """Keep a result, under the configuration that it was computed with: files may have changed since."""
        path = self.folder / f"{key_of(result['config'])}.json"
        write_atomically(path, json.dumps(result, ensure_ascii=False))
        self._error_path(cell).unlink(missing_ok=True)

    def check_room(self) -> None:
        """Raise `OSError` for a folder that takes no files, or has no room for a result: before hours of computing."""
        probe = self.folder / f"probe-{uuid4().hex}"
        write_atomically(probe, " " * 2**14)
        probe.unlink()

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

    def refill(self, path: str | Path, cells: Iterable) -> int:
        """Take the results of cells that are missing here from a CSV of `export`; return how many were taken.

        A row is taken where its key is a cell's (so its whole configuration, weights and rows included) and its split
        is the one that the cell draws here; a warning counts rows of other splits. Such a result has "source", the
        file's name, and neither scores nor a history. `MiniCPTError` for a file that is missing or lacks columns, for
        an accuracy that is none, and for two rows of one cell.
        """
        path = Path(path)
        rows, others, taken = _rows(path), 0, 0
        for cell in cells:
            row = rows.get(cell.key())
            if row is None or self.get(cell):
                continue
            if row["split_sha256"] != cell.split().sha256:
                others += 1
                continue
            result = {name: row[name] for name in MEASURED}
            result["seconds"] = {"fit": row["seconds_fit"], "score": row["seconds_score"]}
            self.put(cell, {"config": cell.config(), "source": path.name, **result})
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
    """The results as a CSV that `Store.refill` reads: one row for each cell, sorted, floats with six decimals."""
    rows = []
    for result in results:
        config = result["config"]
        seconds = {f"seconds_{part}": took for part, took in result["seconds"].items()}
        rows.append({**result, **config, **seconds, "key": key_of(config)})
    table = pd.DataFrame(rows, columns=COLUMNS)
    table = table.astype({"text_tokens": "Int64"}).sort_values(
        ["dataset", "method", "shots", "seed", "key"]
    )
    return table.to_csv(index=False, float_format="%.6f")


def _rows(path: Path) -> dict[str, dict]:
    """The rows of such a CSV by key."""
    if not path.is_file():
        raise MiniCPTError(
            f"{path} does not exist; give the cells.csv that `minicpt table` writes."
        )
    # a hash may look like a number
    table = pd.read_csv(
        path, dtype=dict.fromkeys(["split_sha256", "model_fingerprint", "key"], str)
    )
    lacking = [name for name in COLUMNS if name not in table]
    if lacking:
        raise MiniCPTError(
            f"{path.name} has no column {', '.join(lacking)}; give the cells.csv that `minicpt table` writes."
        )
    accuracies = table[["accuracy", "accuracy_calibrated"]].apply(pd.to_numeric, errors="coerce")
    fine = (accuracies.ge(0) & accuracies.le(1)).all(axis=1)
    bad = table.index[~fine | table.key.duplicated()]
    if len(bad):
        raise MiniCPTError(
            f"{path.name}, line {bad[0] + 2}: an accuracy is no number from 0 to 1, or an earlier line has its cell. "
            "Remove the line; its cell is then computed."
        )
    return {row["key"]: row for row in table[COLUMNS].to_dict("records")}


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))

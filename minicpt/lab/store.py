"""The store: one JSON file a result, written whole or not at all, resumable."""

import json
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# ---- the store ------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and move it in place, so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}.tmp"
    )  # a name per process: two may write at once
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
        self.path(cell).with_suffix(".error.json").unlink(missing_ok=True)

    def put_error(self, cell, error: BaseException) -> None:
        report = {
            "config": cell.config(),
            "error": f"{type(error).__name__}: {error}",
            "traceback": "".join(traceback.format_exception(error)),
        }
        write_atomically(
            self.path(cell).with_suffix(".error.json"),
            json.dumps(report, indent=1, ensure_ascii=False),
        )

    def results(self) -> Iterator[dict]:
        """All good results of the folder, the oldest first."""
        for path in sorted(
            self.folder.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name)
        ):
            if len(path.stem) == 40 and (result := self._read(path)):
                yield result

    def error(self, cell) -> str | None:
        """The message of a cell's failure, None if there is none."""
        path = self.path(cell).with_suffix(".error.json")
        return json.loads(path.read_text(encoding="utf-8"))["error"] if path.exists() else None

    def errors(self) -> list[dict]:
        return [
            json.loads(p.read_text(encoding="utf-8"))
            for p in sorted(self.folder.glob("*.error.json"))
        ]

    def _read(self, path: Path) -> dict | None:
        if not path.exists():
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            result["config"], result["accuracy"]
            return result
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            aside = path.with_suffix(".damaged")
            with suppress(FileNotFoundError):  # another run saw it, too
                os.replace(path, aside)
            warnings.warn(
                f"{path.name} is damaged; moved to {aside.name}, the cell counts as not done.",
                stacklevel=3,
            )
            return None

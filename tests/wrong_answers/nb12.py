"""Typical wrong answers to notebook 12, and words that the checker's message must hold."""

import os
import tempfile
from pathlib import Path


def write(
    name=lambda path: path.with_name(f".{path.name}.{os.getpid()}.tmp"),
    caught=BaseException,
    again=True,
    first=lambda path: None,
    inside=True,
):
    def write_whole(path, text):
        temporary = name(path)
        if not inside:
            temporary.write_text(text, encoding="utf-8")
        try:
            if inside:
                temporary.write_text(text, encoding="utf-8")
            first(path)
            os.replace(temporary, path)
        except caught:
            temporary.unlink(missing_ok=True)
            if again:
                raise

    return write_whole


def in_place(path, text):
    path.write_text(text, encoding="utf-8")


def copied(path, text):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    path.write_text(temporary.read_text(encoding="utf-8"), encoding="utf-8")
    temporary.unlink()


WRONG = {
    "write_whole": [
        (in_place, "written in place"),
        (copied, "written in place"),
        (
            write(lambda path: Path(tempfile.gettempdir()) / f"{path.name}.{os.getpid()}"),
            "in another folder",
        ),
        (write(lambda path: path.with_name(path.name + ".tmp")), "the same temporary name"),
        (write(caught=()), "catch BaseException"),
        (write(caught=Exception), "catch BaseException"),
        (write(inside=False), "put the writing into the `try`"),
        (write(first=lambda path: path.unlink()), "removed before the rename"),
        (write(again=False), "the error is swallowed"),
        (lambda path, text: path.write_text(text, encoding="latin-1"), "'é' was to be written"),
    ],
}

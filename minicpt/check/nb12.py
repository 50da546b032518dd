"""Checker of notebook 12: a file that is there whole or not at all."""

import functools
import inspect
import itertools
import os
import tempfile
import threading
from pathlib import Path
from unittest import mock

from .engine import NotYet, checker, expect, guarded


def without_result(student):
    """The student's function, guarded anew: this one may return nothing."""

    @functools.wraps(inspect.unwrap(student))
    def call(*arguments):
        inspect.unwrap(student)(*arguments)
        return True

    return guarded(call)


def failing(student, path: Path, text: str) -> bool:
    """Call the student's function where it cannot succeed: did the error come through?"""
    try:
        student(path, text)
    except (NotYet, KeyboardInterrupt):  # the engine turns other errors into NotYet
        return True
    return False


def looked_at(student, path: Path, rounds: int = 60) -> dict[str, int]:
    """Write two texts in turn while a thread reads: how often it saw each, or neither."""
    texts = {"old": "old " * 20000, "new": "new " * 20000}
    seen, over = {"old": 0, "new": 0, "half a file": 0}, threading.Event()
    path.write_text(texts["old"], encoding="utf-8")

    def read():
        while not over.is_set():
            found = path.read_text(encoding="utf-8") if path.exists() else ""
            seen[next((name for name, text in texts.items() if text == found), "half a file")] += 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for name, _ in zip(itertools.cycle(("new", "old")), range(rounds)):
            student(path, texts[name])
    finally:
        over.set()
        reader.join()
    return seen


@checker("12.1")
def write_whole(student, generator):
    """A temporary file of its own name in the same folder, then a rename; no rest after failure."""
    import matplotlib.pyplot as plt

    student = without_result(student)
    with tempfile.TemporaryDirectory() as name:
        folder, moves, interrupted = Path(name), [], False
        path, text = folder / "result.json", "née\n" * 50
        path.write_text("the old result", encoding="utf-8")
        rename = os.replace

        def moved(source, target, **kwargs):
            moves.append((Path(source).absolute(), Path(target).absolute()))
            if interrupted:
                raise KeyboardInterrupt  # stands for Ctrl-C
            return rename(source, target, **kwargs)

        def left():
            return sorted(entry.name for entry in folder.iterdir() if entry != path)

        before = path.stat().st_ino
        with mock.patch("os.replace", moved), mock.patch("os.rename", moved):
            for words in ("", "a", "\n", "é", text):  # the smallest first
                student(path, words)
                expect(path.exists(), f"after the text {words!r:.20} there is no file.")
                found = path.read_text(encoding="utf-8", errors="replace")
                expect(
                    found == words,
                    f"the file does not hold the text: {words!r:.40} was to be written in UTF-8, "
                    f"and the file holds {found!r:.40}.",
                )
            expect(not left(), f"the temporary file is still there after a good end: {left()}.")
            expect(
                path.stat().st_ino != before or bool(moves),
                "the file is written in place: a kill in the middle leaves "
                "half of it. Write a temporary file, then rename it with os.replace.",
            )
            if moves:
                source, target = moves[-1]
                expect(
                    target == path,
                    f"the file is renamed to {target.name}, not to the path that was asked for.",
                )
                expect(
                    source.parent == folder,
                    "the temporary file is in another folder: from another file system a rename "
                    "is a copy, which can be interrupted. Put it beside the result.",
                )
                with mock.patch(
                    "os.getpid", lambda: 4711
                ):  # as if another process wrote the same result
                    student(path, text)
                expect(
                    moves[-1][0] != source,
                    "two processes that write the same result use the same temporary "
                    "name, and one renames what the other has half written. Put "
                    "os.getpid() into it, or use tempfile.",
                )
                path.write_text("the old result", encoding="utf-8")
                interrupted = True
                through = failing(student, path, text)
                expect(
                    path.exists(),
                    "the old file is removed before the rename: a kill in between leaves "
                    "none. os.replace replaces it in one go.",
                )
                expect(
                    path.read_text(encoding="utf-8") == "the old result",
                    "interrupted before the rename, the old "
                    "result is gone: nothing may touch it before.",
                )
                expect(
                    not left(),
                    "after Ctrl-C (a KeyboardInterrupt, which `except Exception` does "
                    "not catch) the temporary file is still there: catch "
                    "BaseException, remove it, raise again.",
                )
                expect(through, "the error is swallowed: after the clean-up, `raise` it again.")
        path.write_text("the old result", encoding="utf-8")
        # no encoding has this character: writing fails
        through = failing(student, path, "half a text, then \ud800")
        expect(
            path.read_text(encoding="utf-8") == "the old result",
            "writing failed, and the old result is gone: the "
            "temporary file must be whole before anything happens to the old one.",
        )
        expect(
            not left(),
            "writing failed, and the temporary file was left: put the writing into the `try`, too.",
        )
        expect(through, "the error is swallowed: after the clean-up, `raise` it again.")
        seen = looked_at(student, path)
    expect(
        not seen["half a file"],
        f"another process that looked meanwhile saw half a file or none "
        f"{seen['half a file']} times.",
    )
    figure, panel = plt.subplots(figsize=(4.4, 2.2), layout="constrained")
    panel.bar(
        range(3), list(seen.values()), color=["#56B4E9", "#0072B2", "#D55E00"], edgecolor="black"
    )
    panel.bar_label(panel.containers[0])
    panel.set(
        xticks=range(3),
        xticklabels=["whole, old", "whole, new", "half or none"],
        ylabel="times seen",
    )
    panel.set_ylim(top=1.2 * max(seen.values()))
    plt.close(figure)
    return (
        figure,
        "What a reader saw while your function wrote 60 times: whole "
        "old and whole new files, no half one.",
    )

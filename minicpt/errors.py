"""What goes wrong, in words: every error says what was wrong, what is valid and what to do next."""

import difflib
import io
import sys
import warnings
from collections.abc import Iterable


class MiniCPTError(ValueError):
    """Base of the errors that a user of minicpt can mend; the message says how."""


class TrainingDiverged(MiniCPTError):
    """The training loss became NaN or infinite; the message names the step and the learning rate."""


def unknown(kind: str, name: object, valid: Iterable[str]) -> MiniCPTError:
    """Build the error for a name that does not exist: the valid ones are listed, the nearest first."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name), valid, n=len(valid) or 1, cutoff=0.4)
    ordered = near + [v for v in valid if v not in near]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return MiniCPTError(f"Unknown {kind} {name!r}.{hint} Valid: {', '.join(ordered)}.")


def warn(message: str) -> None:
    """Issue a `UserWarning` that points to the line outside of this package that led to it."""
    package, frame, level = __name__.partition(".")[0], sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] == package:
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


def print_any_text() -> None:
    """Let this process print any text: UTF-8 into files and pipes, `?` for what a terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):  # a notebook's own, or none at all
            continue
        encoding = None if stream.isatty() else "utf-8"  # None: the terminal's
        stream.reconfigure(encoding=encoding, errors="replace")

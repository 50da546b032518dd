"""What goes wrong, in words: every error says what was wrong, what is valid and what to do next."""

import difflib
import io
import math
import sys
import warnings
from collections.abc import Iterable
from numbers import Integral, Real


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


def check_characters(text: str) -> None:
    """Raise `MiniCPTError` for a lone surrogate, half of a character, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MiniCPTError(
            f"{text!r:.80} has half a character (a lone surrogate) at place {error.start}. Decode its source as UTF-8, "
            "or put text.encode('utf-8', 'replace').decode() in its place."
        ) from error


def whole_number(name: str, value: object, least: float = -math.inf) -> int:
    """The value as an int: 4, 4.0 and NumPy's 4 are one number. `MiniCPTError` for 4.5, "4", True, or below `least`."""
    whole = isinstance(value, Integral) or (isinstance(value, Real) and float(value).is_integer())
    if not whole or isinstance(value, bool) or value < least:
        bound = "" if least == -math.inf else f" from {least}"
        raise MiniCPTError(f"{name} must be a whole number{bound}, such as 4; got {value!r}.")
    return int(value)


def check_type(name: str, value: object, kind) -> None:
    """Raise `MiniCPTError` for a value that is not of this type (or union of types): "False" would count as true."""
    if not isinstance(value, kind):
        raise MiniCPTError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}.")


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

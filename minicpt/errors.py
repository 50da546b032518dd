"""What goes wrong, in words: every error says what was wrong, what is valid and what to do next."""

import difflib
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


def check_characters(text: str) -> None:
    """Raise `MiniCPTError` for a lone surrogate, half of a character, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MiniCPTError(
            f"{text!r:.80} has half a character (a lone surrogate) at place {error.start}. Decode its source as UTF-8, "
            "or put text.encode('utf-8', 'replace').decode() in its place."
        ) from error


def warn(message: str) -> None:
    """Issue a `UserWarning` that points to the line outside of this package that led to it."""
    package, frame, level = __name__.partition(".")[0], sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] == package:
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)

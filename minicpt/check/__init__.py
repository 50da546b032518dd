"""Checkers of the exercises: `check.<name>(function)` says what is wrong, or draws a picture.

Each notebook has a file of its own (`nb01.py`, ...), which is found by its name. `dir(check)` lists
the checkers, and `check.NotYet` is what they raise. Importing this package changes nothing;
`check.start()` does, in a notebook.
"""

import importlib
import pkgutil

from .engine import CHECKERS, NotYet, start

__all__ = ["NotYet", "start"]


def _names() -> list[str]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        if module.name.rpartition(".")[2].startswith("nb"):
            importlib.import_module(module.name)  # its checkers register themselves
    return sorted(CHECKERS)


def __getattr__(name: str):
    names = [] if name.startswith("_") else _names()
    if name in names:
        return CHECKERS[name]
    raise AttributeError(
        f"module 'minicpt.check' has no checker {name!r}; it has {', '.join(names)}"
    )


def __dir__():
    return [*__all__, *_names()]

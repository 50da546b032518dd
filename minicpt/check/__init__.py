"""Checkers of the notebooks' exercises: `check.<name>(function)` says in words what is wrong, or draws a picture.

One file a notebook (`nb01.py`, ...), found by its name; `dir(check)` lists the checkers, `check.NotYet` is what they raise.
"""

import importlib
import pkgutil
import sys

from .engine import CHECKERS, NotYet, explain_missing_names

__all__ = ["NotYet"]

if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
    explain_missing_names(shell)


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

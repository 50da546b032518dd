"""What all checkers share: call the student's function, compare, say in words what differs."""

import copy
import functools
import inspect
import linecache
import random
import traceback
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .smallest import Case

CHECKERS: dict[str, Callable] = {}


class NotYet(AssertionError):
    """An exercise is not solved yet; the message says what is wrong and what to look at."""

    def _render_traceback_(
        self,
    ):  # IPython asks for it: the message alone, not the checker's inside
        return [f"NotYet: {self}"]


class Unclear(NotYet):
    """The answer is a known mistake's, which is nearly right on this input: another input tells them apart."""


def start() -> None:
    """Make this notebook's NameErrors say what to do next, for most often a cell above was not run.

    It installs a handler for NameErrors in the running IPython shell and replaces one that is
    there, so a notebook calls it by name, in its first cell. Outside IPython it does nothing.
    """
    from IPython import get_ipython

    def explain(shell, kind, error, trace, tb_offset=None):
        *_, (innermost, _) = traceback.walk_tb(trace)
        if innermost.f_globals is shell.user_ns:  # a cell's own code, not a library's
            error.add_note(
                "Was a cell above not run, or the kernel restarted? Choose Run > Run All Above "
                "Selected Cell, then run this cell again."
            )
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc((NameError,), explain)


def checker(exercise: str):
    """Make `check.<name>` of a function `(student, generator) -> (figure, alt text)`.

    `student` is the student's function, guarded: what it raises becomes `NotYet`. `generator`
    (torch) is seeded afresh at every call. The function raises `NotYet` (through `same` or
    `expect`) or returns a picture, which is shown.
    """

    def decorate(body: Callable) -> Callable:
        @functools.wraps(body)
        def check(function) -> None:
            try:
                if not callable(function):
                    raise NotYet(
                        f"check.{body.__name__} takes the function itself, not "
                        f"{describe(function)}: write check.{body.__name__}(name_of_your_function)."
                    )
                figure, alt = asked(body, guarded(function))
            except NotYet as wrong:
                raise NotYet(f"Exercise {exercise}: {wrong}") from None
            from ..pictures import show

            print(f"Exercise {exercise}: right.")
            show(figure, alt)

        check.exercise = exercise
        CHECKERS[body.__name__] = check
        return check

    return decorate


def asked(body: Callable, function: Callable, draws: int = 5):
    """Call a checker with a random input, and with others while a mistake is nearly right on it."""
    unclear = None
    for _ in range(draws):
        generator = torch.Generator().manual_seed(random.SystemRandom().randrange(2**31))
        try:
            shown = body(function, generator)
        except Unclear as wrong:
            unclear = wrong
        else:
            break
    if unclear:
        raise unclear  # what was wrong once is not right, whatever another input says
    return shown


def guarded(function: Callable) -> Callable:
    """Wrap the student's function: errors and arguments changed in place become `NotYet` in words.

    A tensor that requires a gradient may be changed: it is there to be trained.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = inspect.signature(function)
        try:
            names = given.bind(*args, **kwargs).arguments
        except TypeError:
            raise NotYet(
                f"your function is called with {len(args) + len(kwargs)} arguments, but its "
                f"signature is {given}: leave the signature as it was."
            ) from None
        kept = {name: copy.deepcopy(value) for name, value in names.items() if plain(value)}
        try:
            result = function(*args, **kwargs)
        except NotImplementedError:
            raise NotYet(
                "not done yet: replace the `raise NotImplementedError` by your code, run "
                "that cell, and then this one again."
            ) from None
        except NotYet:
            raise
        except Exception as error:  # noqa: BLE001  whatever a student's code may raise
            raise NotYet(
                f"your function raised {type(error).__name__}: {error}{line_of(error, function)}"
            ) from None
        for name, value in kept.items():
            if not equal(names[name], value, 0):
                raise NotYet(
                    f"your function changes its argument `{name}` in place; make a new one instead."
                )
        if result is None:
            raise NotYet("your function returns None: is the `return` missing?")
        return result

    return call


def expect(condition: bool, words: str) -> None:
    """Raise `NotYet(words)` unless the condition holds."""
    if not condition:
        raise NotYet(words)


def same(
    got,
    want,
    wrong: Mapping[str, object] | None = None,
    what: str = "the result",
    atol: float = 1e-4,
    case: Case | None = None,
) -> None:
    """Raise `NotYet` unless `got` equals `want`; a known mistake is named.

    For any other, a `case` is shrunk to the smallest input on which the answer is still wrong.

    `wrong` maps the words for a mistake to what it gives on this input. Where that is nearly the
    right answer it gets no name, and the checker draws another input. Tensors and numbers are
    compared within `atol` (a number may be a 0-dimensional tensor), lists and tuples item by item,
    everything else with ==. Booleans may come as integers 0 and 1, neither of them as floats.
    """
    if equal(got, want, atol):
        expect_whole(got, want, what)
        return
    kind = NotYet
    for words, value in (wrong or {}).items():
        if equal(got, value, atol):
            if not equal(value, want, 10 * atol):
                raise NotYet(words)
            kind = Unclear
    words = difference(got, want, atol)
    if case is None or not alike(got, want):
        raise kind(f"{what} {words}")
    report = case.report(lambda a, b: equal(a, b, 10 * atol))
    if report and words.startswith("is wrong"):
        words = "is wrong."  # the report has a place that is easier to follow
    raise kind(f"{what} {words}\n{report}".rstrip())


def expect_whole(got, want, what: str) -> None:
    """Raise `NotYet` if booleans or whole numbers were asked for, and came as floating point."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        return
    if want.is_floating_point() or not got.is_floating_point():
        return
    found = f"{what} has the right values, but as floating-point numbers ({got.dtype})"
    if want.dtype == torch.bool:
        raise NotYet(
            f"{found}: such a mask cannot select tokens, and attention would add it to its scores "
            "instead of hiding anything. Return booleans."
        )
    raise NotYet(
        f"{found}: return whole numbers ({want.dtype}). torch.ones and torch.zeros make floats "
        "unless you name a dtype; x.new_ones and x.new_full keep the dtype of x."
    )


def alike(a, b) -> bool:
    """Are both numbers, or both of one kind? Otherwise the kind is what is wrong."""
    numbers = (Tensor, int, float)
    return type(a) is type(b) or (isinstance(a, numbers) and isinstance(b, numbers))


def plain(value) -> bool:
    """Is it data that a function must not change: an untrained tensor, a list, a dictionary?"""
    return (isinstance(value, Tensor) and not value.requires_grad) or isinstance(
        value, (list, dict)
    )


def equal(a, b, atol: float) -> bool:
    """Are both equal: tensors and numbers by shape and value, sequences item by item?"""
    if isinstance(a, (Tensor, int, float)) and isinstance(b, (Tensor, int, float)):
        a, b = (torch.as_tensor(x).detach().cpu().double() for x in (a, b))
        return a.shape == b.shape and torch.allclose(
            a, b, rtol=1e-4 if atol else 0, atol=atol, equal_nan=not atol
        )
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return (
            type(a) is type(b) and len(a) == len(b) and all(equal(x, y, atol) for x, y in zip(a, b))
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key], atol) for key in a)
    return type(a) is type(b) and bool(a == b)


def difference(got, want, atol: float) -> str:
    """Say how `got` differs from `want`: its kind, its shape or length, or the first place."""
    if isinstance(want, Tensor) and isinstance(got, Tensor):
        if got.shape != want.shape:
            return f"has shape {tuple(got.shape)}, expected {tuple(want.shape)}."
        got, want = got.detach().cpu().double(), want.detach().cpu().double()
        if got.isnan().any():
            return f"is NaN at index {got.isnan().nonzero()[0].tolist()}: look for 0/0 or log(0)."
        off = ~torch.isclose(got, want, rtol=1e-4, atol=atol)
        if not off.ndim:
            return f"is wrong: it is {got.item():.4g}, expected {want.item():.4g}."
        at = off.nonzero()[0].tolist()
        return (
            f"is wrong in {int(off.sum())} of {off.numel()} places; at index {at} it is "
            f"{got[tuple(at)].item():.4g}, expected {want[tuple(at)].item():.4g}."
        )
    if isinstance(want, (list, tuple)) and type(got) is type(want):
        if len(got) != len(want):
            return f"has {len(got)} items, expected {len(want)}."
        at = next(i for i, (x, y) in enumerate(zip(got, want)) if not equal(x, y, atol))
        return f"is wrong at item {at}: {difference(got[at], want[at], atol)}"
    if isinstance(want, str) and isinstance(got, str):
        at = next(
            (i for i, (x, y) in enumerate(zip(got, want)) if x != y), min(len(got), len(want))
        )
        found, expected = got[at : at + 20], want[at : at + 20]
        return f"differs from character {at} on: {found!r}, expected {expected!r}."
    if isinstance(want, (int, float)) and isinstance(got, (int, float)):
        return f"is {got:.6g}, expected {want:.6g}."
    return f"is {describe(got)}, expected {describe(want)}."


def describe(value) -> str:
    """Name a value's kind in words, with its shape, length or value."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return (
        f"{value!r} ({type(value).__name__})"
        if isinstance(value, (str, int, float))
        else f"a {type(value).__name__}"
    )


def line_of(error: Exception, function: Callable) -> str:
    """Find the line of the student's function in which an error arose."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code is code:
            text = linecache.getline(code.co_filename, number).strip()
            return f"\n  in its line {number - code.co_firstlineno + 1}: {text}"
    return ""

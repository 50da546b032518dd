"""Shrink an input on which an answer is wrong until nothing can be left out of it, and show what is left.

A checker knows some mistakes by name. For any other it has a `Case`: the exercise's input, the way to the right answer,
and what may be left out. `Case.report` then shows the smallest wrong input it finds, both answers on it, and what is
computed on the way.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_CALLS = 3000  # of the student's function while an input shrinks: a second or two
EACH_ITS_OWN = "*"


@dataclass
class Case:
    """One input of an exercise, by name, and how to make it smaller.

    - `solve(**given)` gives a dictionary: what is computed on the way, in order; the last entry is the right answer
    - `axes`: the names of each value's axes, as in `{"delta": "P D", "epsilon": "P"}`. Values with an axis of the same
      name are cut together; `*` is cut in each list item alone. A list's first axis is the list itself
    - `valid(**given)`: is it an input that the exercise allows?
    - `arguments(**given)`: the student's arguments by name, where these are not `given` itself
    """

    student: Callable
    solve: Callable[..., dict]
    given: dict[str, Any]
    axes: dict[str, str] = field(default_factory=dict)
    valid: Callable[..., bool] = lambda **given: True
    arguments: Callable[..., dict] = dict

    def answer(self, given: dict) -> Any:
        """What the student's function gives on this input."""
        return self.student(*self.arguments(**given).values())

    def right(self, given: dict) -> Any:
        """The right answer on this input."""
        return [*self.solve(**given).values()][-1]

    def report(self, agree: Callable[[Any, Any], bool]) -> str:
        """Show the smallest input on which the two do not `agree`; empty if they do on the whole one."""
        calls = 0

        def fails(given: dict) -> bool:
            nonlocal calls
            calls += 1
            with suppress(Exception):  # an input too small for the student's code, or for ours
                if calls > MOST_CALLS or not self.valid(**given):
                    return False
                return not agree(self.answer(given), self.right(given))
            return False

        if not fails(self.given):
            return ""
        given = shrink(self.given, self.axes, fails)
        shown = [
            f"    {name} = {written(value)}" for name, value in self.arguments(**given).items()
        ]
        *steps, (_, right) = self.solve(**given).items()
        on_the_way = [f"    {name}: {written(value)}" for name, value in steps]
        if on_the_way:
            on_the_way = [
                "On the way to it (compare with yours, one after the other):",
                *on_the_way,
            ]
        lines = [
            "The smallest input found on which it is wrong:",
            *shown,
            f"Your answer: {written(self.answer(given))}",
            f"Expected:    {written(right)}",
            *on_the_way,
        ]
        return "\n".join(lines)


def shrink(given: dict, axes: dict[str, str], fails: Callable[[dict], bool]) -> dict:
    """Cut and simplify while the input still `fails`."""
    for _ in range(4):  # what was simplified may allow another cut
        before = given
        for axis in dict.fromkeys(" ".join(axes.values()).split()):
            given = shorten(given, axes, axis, fails)
        for name in given:
            given = simplify(given, name, fails)
        if given is before:
            break
    return given


def shorten(given: dict, axes: dict[str, str], axis: str, fails: Callable[[dict], bool]) -> dict:
    """Cut pieces out of all values along one axis."""
    places = {name: names.split().index(axis) for name, names in axes.items() if axis in names}
    if axis != EACH_ITS_OWN:
        name, place = next(iter(places.items()))

        def without(given: dict, at: int, width: int) -> dict:
            return {name: cut(given[name], place, at, width) for name, place in places.items()}

        return cut_away(given, lambda given: size(given[name], place), without, fails)
    for name, place in places.items():
        for i in range(len(given[name])):

            def item_without(given: dict, at: int, width: int, name=name, place=place, i=i) -> dict:
                items = [*given[name]]
                items[i] = cut(items[i], place - 1, at, width)
                return {name: items}

            def length(given: dict, name=name, place=place, i=i) -> int:
                return size(given[name][i], place - 1)

            given = cut_away(given, length, item_without, fails)
    return given


def cut_away(given: dict, length: Callable, without: Callable, fails: Callable) -> dict:
    """Leave out what can be left out, long pieces first."""
    width = length(given)
    while width > 0:
        at = 0
        while at + width <= length(given):
            shorter = given | without(given, at, width)
            if fails(shorter):
                given = shorter
            else:
                at += 1
        width //= 2
    return given


def size(value: Any, axis: int) -> int:
    """Length of a tensor, an array, a string or a list along an axis."""
    if isinstance(value, (list, str)):
        return size(value[0], axis - 1) if axis else len(value)
    return value.shape[axis]


def cut(value: Any, axis: int, at: int, width: int) -> Any:
    """Leave out `width` places from `at` on, along an axis; a new value."""
    if isinstance(value, list) and axis:
        return [cut(item, axis - 1, at, width) for item in value]
    if isinstance(value, (list, str)):
        return value[:at] + value[at + width :]
    if isinstance(value, np.ndarray):
        return np.delete(value, range(at, at + width), axis)
    kept = [i for i in range(value.shape[axis]) if not at <= i < at + width]
    return value.index_select(axis, torch.tensor(kept, dtype=torch.long))


def simplify(given: dict, name: str, fails: Callable[[dict], bool]) -> dict:
    """Replace the numbers and strings of one value by simpler ones, all at once or one by one."""
    tried = True
    while tried:
        tried = False
        for value in simpler(given[name]):
            candidate = {**given, name: value}
            if fails(candidate):
                given, tried = candidate, True
                break
    return given


def simpler(value: Any) -> Iterator[Any]:
    """Values of the same form that are a little easier to read."""
    if isinstance(value, (Tensor, np.ndarray)):
        yield from simpler_numbers(value)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            for one in simpler(item):
                yield type(value)([*value[:i], one, *value[i + 1 :]])
    elif isinstance(value, str):
        for width in sorted({len(value) // 2, 1}, reverse=True):
            for at in range(len(value) - width + 1):
                yield cut(value, 0, at, width) if width else value
    elif not isinstance(value, bool) and isinstance(value, (int, float)):
        yield from simpler_than(value)


def simpler_numbers(value: Tensor | np.ndarray) -> Iterator[Any]:
    """The same tensor or array with all of its numbers simpler, or one of them."""
    flat = value.reshape(-1)
    if not len(flat) or str(value.dtype).endswith("bool"):
        return
    for digits in (0, 1):
        rounded = value.round() if digits == 0 else (value * 10).round() / 10
        if str(value.dtype).find("float") >= 0 and bool((rounded != value).any()):
            yield rounded
    for i, number in enumerate(flat.tolist()):
        for one in simpler_than(number):
            changed = flat.clone() if isinstance(flat, Tensor) else flat.copy()
            changed[i] = one
            yield changed.reshape(value.shape)


def simpler_than(number: float) -> list[float]:
    """Numbers that are written with fewer signs, or are nearer to zero in as many."""
    if isinstance(number, int):
        return [n for n in (0, 1, number // 2, number - 1) if 0 <= n < number]
    found = dict.fromkeys([0.0, 1.0, *(round(number, digits) for digits in (0, 1, 2)), abs(number)])
    return [one for one in found if weight(one) < weight(number)]


def weight(number: float) -> tuple[int, float]:
    """How hard a number is to read: signs first, then its size."""
    return len(f"{number:.6g}"), abs(number)


def written(value: Any) -> str:
    """Write a value as one would on paper: nested lists, four digits."""
    if isinstance(value, (Tensor, np.ndarray)):
        return written(value.tolist())
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{written(k)}: {written(v)}' for k, v in value.items())}}}"
    if isinstance(value, float):
        return f"{value + 0.0:.4g}"  # no -0
    return repr(value)

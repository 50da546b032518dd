"""The checkers of notebooks 04 and 05: the masters' solutions are right, typical wrong answers are named."""

import inspect
from pathlib import Path

import nbformat
import pytest
import torch
from wrong_answers import nb04, nb05

from minicpt import check

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
WRONG = nb04.WRONG | nb05.WRONG


def cells(stem, tag):
    book = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4)
    return [cell.source for cell in book.cells if tag in cell.metadata.get("tags", [])]


@pytest.fixture(scope="module")
def right():
    """The functions of the masters' solution cells, by name."""
    functions = {}
    for stem in ("04_context_and_token_roles", "05_cpt_step_by_step"):
        for source in cells(stem, "solution"):
            exec(source, space := {"torch": torch})
            functions |= {name: value for name, value in space.items() if inspect.isfunction(value)}
    return functions


def test_every_exercise_has_a_checker_and_three_wrong_answers(right):
    assert set(right) == set(WRONG) and len(right) == 8
    assert all(len({words for _, words in answers}) >= 3 for answers in WRONG.values())


@pytest.mark.parametrize("name", WRONG)
def test_the_masters_solution_is_right(name, right, capsys):
    for _ in range(3):  # on fresh input each time
        getattr(check, name)(right[name])
    assert capsys.readouterr().out.count(f"Exercise {getattr(check, name).exercise}: right.") == 3


@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, answers in WRONG.items() for i in range(len(answers))]
)
def test_a_wrong_answer_is_named(name, number):
    function, words = WRONG[name][number]
    for _ in range(5):
        with pytest.raises(check.NotYet) as error:
            getattr(check, name)(function)
        assert words in str(error.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_stub_is_not_done_yet(name):
    def stub(*args):
        raise NotImplementedError

    with pytest.raises(check.NotYet, match="not done yet"):
        getattr(check, name)(stub)

"""The exercises: derived files are fresh, stubs fail, solutions pass, wrong answers get words.

Solutions are taken from the masters. `wrong_answers/nbNN.py` holds at least three typical wrong
ones for every checker.
"""

import importlib
import re
import sys
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch

from minicpt import check
from minicpt.check.engine import checker, same
from minicpt.check.smallest import Case

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data_scripts"))
builder = importlib.import_module("build_notebooks")
sys.path.pop(0)
WITH_EXERCISES = [p for p in builder.MASTERS if builder.exercises(nbformat.read(p, as_version=4))]
CHECKERS = [name for name in dir(check) if name not in check.__all__]
WRONG, RIGHT = {}, {}
for file in sorted((ROOT / "tests" / "wrong_answers").glob("nb*.py")):
    answers = importlib.import_module(f"wrong_answers.{file.stem}")
    WRONG |= answers.WRONG
    RIGHT |= getattr(answers, "RIGHT", {})


def found(path):
    return builder.exercises(nbformat.read(path, as_version=4))


def name_of(cell):
    """The checker that a check cell calls."""
    return re.search(r"check\.(\w+)\(", cell.source)[1]


# ---- the builder ---------------------------------------------------------------------------------


def test_derived_notebooks_are_fresh(tmp_path):
    """If this fails: python data_scripts/build_notebooks.py --exercises"""
    builder.write_derived(tmp_path)
    for kind in builder.NOTE:
        rebuilt, committed = (
            {p.name: p.read_text(encoding="utf-8") for p in (folder / kind).glob("*.ipynb")}
            for folder in (tmp_path, ROOT / "notebooks")
        )
        assert rebuilt.keys() == committed.keys() == {p.name for p in WITH_EXERCISES}
        assert [name for name in rebuilt if rebuilt[name] != committed[name]] == []


def test_every_lesson_has_exercises():
    # the tour, the report of one cell
    without = {"00_start_here", "run_cell"}
    assert {p.stem for p in builder.MASTERS} - {p.stem for p in WITH_EXERCISES} == without
    assert sum(len(found(p)) for p in WITH_EXERCISES) >= 18


@pytest.mark.parametrize("path", builder.TRANSLATIONS, ids=lambda path: path.name)
def test_a_translation_has_the_code_and_outputs_of_its_master(path):
    """If this fails: python data_scripts/build_notebooks.py --exercises"""
    assert nbformat.read(path, as_version=4) == builder.translated(path)


def test_a_translation_with_other_cells_than_its_master_is_refused(tmp_path, monkeypatch):
    path = builder.TRANSLATIONS[0]
    notebook = nbformat.read(path, as_version=4)
    del notebook.cells[0]
    shorter = tmp_path / path.name
    nbformat.write(notebook, shorter)
    monkeypatch.setattr(type(shorter), "relative_to", lambda self, _: self)
    with pytest.raises(ValueError, match="other cells than its master"):
        builder.translated(shorter)


@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda p: p.stem)
def test_exercises_are_in_form(path):
    for k, (task, _, test) in enumerate(found(path), 1):
        number = f"{path.stem[:2]}.{k}"
        assert task.source.startswith(f"### Exercise {number}: ")
        assert getattr(check, name_of(test)).exercise == number
        hints = re.findall(r"<details><summary>Hint( \d)?</summary>", task.source)
        stages = [f" {stage}" for stage in range(1, len(hints) + 1)] if len(hints) > 1 else [""]
        assert hints == stages
        assert task.source.count("</details>") == len(hints)
        assert "*Expected figure:*" in task.source


def test_teaching_lists_the_notebooks_as_they_are():
    """If this fails: python data_scripts/build_notebooks.py --exercises"""
    text = (ROOT / "notebooks" / "TEACHING.md").read_text(encoding="utf-8")
    assert (
        builder.TABLE.search(text)[0].split("-->\n")[1].removesuffix("<!-- /contents -->")
        == builder.contents()
    )


def test_a_badge_only_where_the_address_is_set(tmp_path, monkeypatch):
    address = tmp_path / "pyproject.toml"
    for urls, repository in (
        ("", None),
        ('[project.urls]\nRepository = "https://example.org/a/b"', None),
        ('[project.urls]\nRepository = "https://github.com/a/b.git"', "a/b"),
    ):
        address.write_text(f'[project]\nname = "x"\n{urls}')
        assert builder.github(address) == repository
    nbformat.write(master(TASK, SOLUTION, CHECK), tmp_path / "01_one.ipynb")
    for repository in (None, "a/b"):
        monkeypatch.setattr(builder, "github", lambda: repository)
        note = builder.derive(tmp_path / "01_one.ipynb", "exercises").cells[1].source
        assert (
            "colab.research.google.com/github/a/b/blob/main/notebooks/exercises/01_one.ipynb"
            in note
        ) == bool(repository)


def master(*cells):
    return nbformat.v4.new_notebook(cells=list(cells))


def cell(source, *tags, kind=nbformat.v4.new_code_cell):
    return kind(source, metadata={"tags": list(tags)})


TASK = cell(
    "### Exercise 01.1: one\n\nDifficulty 3 of 5 · 5 minutes",
    "exercise",
    kind=nbformat.v4.new_markdown_cell,
)
SOLUTION = cell(
    'import torch\n\ndef f(x):\n    """Give x.\n\n    (P,)"""\n    # as it is\n    return x',
    "solution",
)
CHECK = cell("check.f(f)", "check")


def test_builder_refuses_what_is_no_exercise():
    with pytest.raises(ValueError, match="three cells in a row"):
        builder.exercises(master(TASK, CHECK, SOLUTION))
    with pytest.raises(ValueError, match="three cells in a row"):
        builder.exercises(master(SOLUTION, CHECK))
    with pytest.raises(ValueError, match="Difficulty"):
        untitled = cell("### Exercise", "exercise", kind=nbformat.v4.new_markdown_cell)
        builder.exercises(master(untitled, SOLUTION, CHECK))
    for source in (
        "def f(x):\n    return x",
        'x = 1\ndef f(x):\n    """Give x."""\n    return x',
        '"""Give x."""',
    ):
        with pytest.raises(ValueError, match="one function with a docstring"):
            builder.parts(cell(source, "solution"))


def test_stub_keeps_imports_signature_and_docstring(tmp_path):
    nbformat.write(master(TASK, SOLUTION, CHECK), tmp_path / "01_one.ipynb")
    stub = builder.derive(tmp_path / "01_one.ipynb", "exercises").cells[2]
    given, body = builder.parts(SOLUTION)
    assert stub.source == f'{given}\n    raise NotImplementedError("Exercise 01.1: one")'
    assert f"{given}\n{body}" == SOLUTION.source and body == "    # as it is\n    return x"


def test_nbgrader_export(tmp_path):
    """nbgrader's format, version 3, in its layout, source/assignment/notebook."""
    written = builder.write_nbgrader(tmp_path)
    assert [p.relative_to(tmp_path) for p in written] == [
        Path("source") / p.stem / p.name for p in WITH_EXERCISES
    ]
    for path, source in zip(written, WITH_EXERCISES):
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        marked = [c for c in book.cells if "nbgrader" in c.metadata]
        ids = [c.metadata.nbgrader.grade_id for c in marked]
        assert len(marked) == 2 * len(found(source)) and len(set(ids)) == len(ids)
        for solution, test, (task, original, _) in zip(marked[::2], marked[1::2], found(source)):
            flags = [
                {k: c.metadata.nbgrader[k] for k in ("grade", "solution", "locked")}
                for c in (solution, test)
            ]
            assert flags == [
                {"grade": False, "solution": True, "locked": False},
                {"grade": True, "solution": False, "locked": True},
            ]
            assert test.metadata.nbgrader.points == int(
                re.search(r"Difficulty (\d)", task.source)[1]
            )
            assert all(c.metadata.nbgrader.schema_version == 3 for c in (solution, test))
            # the markers enclose the body and nothing else: without them and with what they
            # enclose, it is the solution
            lines = solution.source.splitlines()
            begin, end = lines.index("    ### BEGIN SOLUTION"), lines.index("    ### END SOLUTION")
            assert "\n".join(lines[:begin]) == builder.parts(original)[0]
            assert "\n".join(lines[:begin] + lines[begin + 1 : end]) == original.source.rstrip("\n")


# ---- stubs, solutions, wrong answers -------------------------------------------------------------


@pytest.fixture(scope="module")
def shell():
    from IPython.core.interactiveshell import InteractiveShell

    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def run(shell, *cells):
    for one in cells:
        shell.run_cell(one.source).raise_error()


def setup_of(path):
    return next(c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda p: p.stem)
def test_solutions_pass_and_stubs_say_so(shell, path, capsys):
    """All in one shell: a solution needs its notebook's first code cell and nothing else."""
    run(shell, setup_of(path))
    stubs = [
        c for c in builder.derive(path, "exercises").cells if "stub" in c.metadata.get("tags", [])
    ]
    for (task, solution, test), stub in zip(found(path), stubs, strict=True):
        run(shell, stub)
        with pytest.raises(check.NotYet, match="not done yet"):
            run(shell, cell("from minicpt import check"), test)
        capsys.readouterr()
        run(shell, solution, test)
        number = re.match(r"### Exercise ([\d.]+)", task.source)[1]
        assert f"Exercise {number}: right." in capsys.readouterr().out


def test_a_cell_out_of_order_says_what_to_do(shell, capsys):
    """The note is for cells' own code; others, and those inside a library, stay as they are."""
    run(shell, cell("from minicpt import check; check.start()"))
    for source, noted in (
        ("of_a_cell_above", True),
        ("(lambda: of_a_cell_above)()", True),
        ("eval('inside_a_library', {})", False),
        ("1 / 0", False),
    ):
        error = shell.run_cell(source).error_in_exec
        assert ("Run All Above" in "".join(getattr(error, "__notes__", []))) == noted
        assert ("Run All Above" in capsys.readouterr().out) == noted
    shell.set_custom_exc((), None)


def test_importing_the_checkers_leaves_the_shell_alone(shell):
    """Whoever imports the library keeps their handlers; a notebook asks for ours by name."""
    shell.set_custom_exc((), None)
    run(shell, cell("import importlib, minicpt.check; importlib.reload(minicpt.check)"))
    assert shell.custom_exceptions == ()
    run(shell, cell("minicpt.check.start()"))
    assert shell.custom_exceptions == (NameError,)
    shell.set_custom_exc((), None)


def test_outside_a_notebook_start_does_nothing(monkeypatch):
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    check.start()


@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda p: p.stem)
def test_notebooks_with_exercises_start_the_help(path):
    assert "\ncheck.start()" in setup_of(path).source


def test_every_checker_has_its_wrong_answers():
    assert (
        sorted(WRONG)
        == CHECKERS
        == sorted(name_of(test) for path in WITH_EXERCISES for _, _, test in found(path))
    )
    assert all(len(answers) >= 3 for answers in WRONG.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, wrong, words", [(name, *answer) for name in WRONG for answer in WRONG[name]]
)
def test_wrong_answers_are_named(name, wrong, words):
    for _ in range(3):  # the input is fresh every time: no lucky one
        with pytest.raises(check.NotYet) as caught:
            getattr(check, name)(wrong)
        assert words in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, right", [(name, answer) for name in RIGHT for answer in RIGHT[name]]
)
def test_right_answers_in_another_form_than_the_solution_pass(name, right, capsys):
    for _ in range(3):
        getattr(check, name)(right)
    assert "right." in capsys.readouterr().out


# ---- the engine ----------------------------------------------------------------------------------


def test_an_unknown_mistake_is_shown_on_the_smallest_input():
    """Axes of one name are cut together, numbers become simple, and what an exercise excludes never comes up."""

    def scaled(x, factor):
        return {"rows": x.sum(1), "scaled": x.sum(1) * factor}

    def never_above_two(x, factor):
        return x.sum(1).clamp(max=2) * factor

    x = torch.linspace(-1, 5, 12).reshape(4, 3)
    given, axes = {"x": x, "factor": torch.ones(4)}, {"x": "N D", "factor": "N"}
    case = Case(never_above_two, scaled, given, axes, lambda x, factor: bool((x < 2.5).all()))
    assert case.report(torch.equal) == ""  # no valid input: nothing to show
    case.valid = lambda x, factor: bool((factor > 0).all())
    lines = case.report(lambda a, b: check.engine.equal(a, b, 1e-3)).splitlines()
    assert lines == [
        "The smallest input found on which it is wrong:",
        "    x = [[5]]",
        "    factor = [1]",
        "Your answer: [2]",
        "Expected:    [5]",
        "On the way to it (compare with yours, one after the other):",
        "    rows: [5]",
    ]


def test_an_answer_that_changes_from_call_to_call_is_not_shrunk_forever():
    luck = iter(range(100_000))
    case = Case(lambda x: next(luck), lambda x: {"x": x}, {"x": list(range(50))}, {"x": "n"})
    assert "smallest input" in case.report(lambda a, b: a == b)


@pytest.fixture
def double():
    """A checker of x -> 2 x, not registered."""

    @checker("99.1")
    def doubles(student, generator):
        x = torch.rand(3, generator=generator)
        same(student(x), 2 * x, {"it is the square": x * x})
        from matplotlib.figure import Figure

        return Figure(), "An empty figure, as a check needs one to show."

    check.engine.CHECKERS.pop("doubles")
    return doubles


def raises(x):
    return x.no_such_method()


def spoil(x):
    x *= 2
    return x


@pytest.mark.parametrize(
    "inputs, words",
    [
        ([2.0003, 3.0], "it is the square"),
        ([2.0003, 2.0], "the result is 4.0012, expected 4.0006"),  # never taken for right
        ([2.0003] * 5, "the result is 4.0012, expected 4.0006"),
    ],
)
def test_a_mistake_that_is_nearly_right_on_one_input_is_named_on_another(inputs, words):
    left = iter(inputs)

    @checker("99.2")
    def doubles(student, generator):
        x = next(left)
        same(student(x), 2 * x, {"it is the square": x * x})
        return None, ""

    check.engine.CHECKERS.pop("doubles")
    with pytest.raises(check.NotYet) as caught:
        doubles(lambda x: x * x)
    assert words in str(caught.value)
    assert list(left) == []


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x: x * x, "it is the square"),
        (lambda x: x, "is wrong in 3 of 3 places; at index [0]"),
        (lambda x: (2 * x)[None], "has shape (1, 3), expected (3,)"),
        (lambda x: 2 * x / 0 * 0, "is NaN"),
        (lambda x: (2 * x).tolist(), "is a list of 3, expected a tensor of shape (3,)"),
        (lambda x: None, "return"),
        (lambda: 1, "leave the signature as it was"),
        (partial(raises), "raised AttributeError"),
        (raises, "in its line 2: return x.no_such_method()"),
        (spoil, "changes its argument `x` in place"),
        (5, "takes the function itself"),
    ],
)
def test_engine_says_what_is_wrong(double, wrong, words):
    double(lambda x: x + x)
    with pytest.raises(check.NotYet, match="^Exercise 99.1: ") as caught:
        double(wrong)
    assert words in str(caught.value)
    assert caught.value._render_traceback_() == [f"NotYet: {caught.value}"]


def test_a_trained_tensor_may_change(double):
    """A step of training changes its parameter: that is no spoiled argument."""
    weight = torch.ones(2, requires_grad=True)
    check.engine.guarded(lambda w: w.data.mul_(2))(weight)
    assert weight.tolist() == [2, 2]


@pytest.mark.parametrize(
    "got, want, words",
    [
        ([1, 2], [1, 3], "at item 1: the result"),
        ([1], [1, 3], "1 items, expected 2"),
        ("abc", "abd", "character 2"),
        ((1, "a"), (1, "b"), "item 1"),
        (1.5, 2, "1.5, expected 2"),
        ({"a": torch.ones(1)}, {"a": torch.zeros(1)}, "a dict"),
    ],
)
def test_same_finds_the_difference(got, want, words):
    same(want, want)
    with pytest.raises(check.NotYet, match="^the result ") as caught:
        same(got, want)
    assert words.replace("the result", "is") in str(caught.value)


def test_a_wrong_name_lists_the_checkers():
    with pytest.raises(AttributeError, match="has no checker 'nope'; it has .*label_score"):
        check.nope  # noqa: B018

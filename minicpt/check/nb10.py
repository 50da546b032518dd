"""Checkers of notebook 10: drawing shots, the paired interval, Holm's correction."""

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from scipy import stats

from .engine import NotYet, checker, describe, expect, same
from .smallest import Case
from .steps import holm_steps, interval_steps

FEW = (([1], 1), ([1, 1], 1), ([2, 1], 2), ([2, 1], 3), ([2, 2], 3))  # rows of each class, and K
DRAWS = 300  # so many that chance cannot pass for a rule, nor a rule for chance


def whole(generator: torch.Generator, low: int, high: int) -> int:
    """Draw a whole number from low to high."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def numbers(got, what: str, n: int) -> list[float]:
    """The student's n numbers as a list of floats, from an array, a list or a tuple."""
    try:
        values = np.asarray(got, dtype=float)
    except (TypeError, ValueError):
        values = None
    expect(
        values is not None and values.shape == (n,),
        f"return {what}, {n} numbers; yours is "
        f"{describe(got) if values is None or not values.shape else f'of shape {values.shape}'}.",
    )
    return values.tolist()


def rows(generator: torch.Generator, sizes: list[int]) -> list[str]:
    """Labels of len(sizes) classes, so many rows each, mixed."""
    labels = [
        name
        for name, size in zip(["bird", "fish", "tree", "stone", "river"], sizes)
        for _ in range(size)
    ]
    return [labels[i] for i in torch.randperm(len(labels), generator=generator)]


def valid_draw(chosen, labels: list[str], K: int) -> None:
    """Raise `NotYet` unless these are K different rows, from distinct classes first."""
    try:
        check_rows(chosen, labels, K)
    except NotYet as wrong:
        if len(labels) > 4:
            raise
        shown = f"Your answer on labels = {labels}, K = {K}: {chosen!r}"
        raise NotYet(f"{wrong}\n{shown}") from None


def check_rows(chosen, labels: list[str], K: int) -> None:
    """Raise `NotYet` with the rule that is broken."""
    expect(
        isinstance(chosen, (list, tuple)), f"return a list of row numbers, not {describe(chosen)}."
    )
    n_classes = len({*labels})
    expect(
        not any(isinstance(i, str) for i in chosen),
        "these are labels; return the numbers of their rows.",
    )
    expect(
        len(chosen) == K or len(chosen) != K * n_classes,
        f"these are {len(chosen)} rows, K = {K} for each class; K is the number in total.",
    )
    expect(len(chosen) == K, f"these are {len(chosen)} rows; K = {K} were asked for.")
    expect(
        all(isinstance(i, (int, np.integer)) and 0 <= i < len(labels) for i in chosen),
        "some are no row numbers, 0 to len(labels) - 1.",
    )
    expect(len({*chosen}) == K, "a row was drawn twice: draw without replacement.")
    drawn, there = Counter(labels[i] for i in chosen), Counter(labels)
    behind = min((drawn[name] for name in there if drawn[name] < there[name]), default=K)
    expect(
        max(drawn.values(), default=0) <= behind + 1,
        f"the classes do not take turns: some class has {max(drawn.values(), default=0)} examples "
        f"while another, with rows left, has {behind}. Distinct classes first.",
    )


@checker("10.1")
def draw_shots(student, generator):
    """K rows in total, from distinct classes first, all else left to the given generator."""
    import matplotlib.pyplot as plt

    def draws(labels, K, n=DRAWS):
        """Many draws by the student's function, each valid and repeatable."""
        found = []
        for _ in range(n):
            seed = whole(generator, 0, 2**31 - 2)
            found.append(student(labels, K, random.Random(seed)))
            valid_draw(found[-1], labels, K)
            expect(
                list(found[-1]) == list(student(labels, K, random.Random(seed))),
                "the same generator gives two "
                "different draws: take all randomness from `rng`, none from `random` or NumPy.",
            )
        return found

    for sizes, K in FEW:  # the smallest first
        draws(rows(generator, sizes), K, 40)
    labels = rows(generator, [6] * 5)
    some, each, twice = draws(labels, 2), draws(labels, 5), draws(labels, 10)
    by_class = Counter(labels[i] for chosen in some for i in chosen)
    fair = DRAWS * 2 / 5
    expect(
        all(abs(by_class[name] - fair) < fair / 2 for name in {*labels}),
        "with K = 2 of 5 classes some come far more often than others, or always: which classes "
        "stand among the K must be left to chance.",
    )
    by_row = Counter(i for chosen in each for i in chosen)
    fair = DRAWS / 6
    expect(
        all(by_row[i] > fair / 4 for i in range(len(labels))),
        "some rows of a class are (almost) never drawn: "
        "which row stands for its class must be left to chance.",
    )
    first = Counter(labels[chosen[0]] for chosen in each)
    expect(
        max(first.values()) < DRAWS / 2,
        "the classes stand in one fixed order: shuffle what you have drawn.",
    )
    in_turn = sum(len({labels[i] for i in chosen[:5]}) == 5 for chosen in twice)
    expect(
        in_turn < DRAWS / 2,
        "with two examples of each class, the first five are always of five classes: the rounds "
        "still show. Shuffle the rows at the end.",
    )
    beside = (
        sum(sum(labels[a] == labels[b] for a, b in pairwise(chosen)) for chosen in twice) / DRAWS
    )
    expect(
        beside < 3, "examples of one class stand next to each other: shuffle the rows at the end."
    )
    draws(rows(generator, [1, 4, 2, 4]), 9)  # a class that runs out of rows
    figure, panel = plt.subplots(figsize=(5, 2.4), layout="constrained")
    panel.bar([*by_class], [*by_class.values()], color="#56B4E9", edgecolor="black")
    panel.axhline(DRAWS * 2 / 5, color="black", linestyle="--")
    panel.set(ylabel="drawn", title=f"{DRAWS} draws of K = 2 from 5 classes")
    plt.close(figure)
    return (
        figure,
        "How often your function drew each of five classes: five bars of about the same height.",
    )


@checker("10.2")
def paired_interval(student, generator):
    """The mean difference and the ends of its t interval."""
    import matplotlib.pyplot as plt

    def standard(n):
        z = torch.randn(n, generator=generator, dtype=torch.float64).numpy()
        return (z - z.mean()) / z.std(ddof=1)

    for n in (5, 4, 8):
        baseline = 60 + 12 * standard(n)
        d = whole(generator, 3, 8) + whole(generator, 2, 5) * standard(n)
        ours = baseline + d
        error, t = d.std(ddof=1) / np.sqrt(n), stats.t.ppf(0.975, n - 1)
        apart = np.sqrt((ours.var(ddof=1) + baseline.var(ddof=1)) / n)
        welch = (
            stats.ttest_ind(ours, baseline, equal_var=False).confidence_interval().high - d.mean()
        )

        def around(half, values=d):
            return [values.mean(), values.mean() - half, values.mean() + half]

        wrong = {
            "1.96 is for known spreads or many seeds; few seeds need "
            "Student's t, stats.t.ppf(0.975, n - 1).": around(1.96 * error),
            "the standard deviation is divided by n: say "
            "ddof=1, so that it is divided by n - 1.": around(t * d.std() / np.sqrt(n)),
            "1.96 and ddof=0, two mistakes: Student's t, and a "
            "standard deviation divided by n - 1.": around(1.96 * d.std() / np.sqrt(n)),
            "the square root of n is missing: that is the spread of "
            "single differences, not of their mean.": around(t * d.std(ddof=1)),
            "it divides by n instead of its square root.": around(t * d.std(ddof=1) / n),
            "that is the prediction interval, for one more split; the "
            "interval of the mean is asked for.": around(t * d.std(ddof=1) * np.sqrt(1 + 1 / n)),
            "0.95 in t.ppf leaves 5 % on each side: 95 % in the middle need 0.975.": around(
                stats.t.ppf(0.95, n - 1) * error
            ),
            "t has n degrees of freedom; it must be n - 1.": around(stats.t.ppf(0.975, n) * error),
            "the difference is the wrong way round: ours minus baseline.": around(t * error, -d),
            "these are the mean and its plus and minus: return the two ends.": [
                d.mean(),
                -t * error,
                t * error,
            ],
            "the standard error alone is no 95 % interval: multiply by Student's t.": around(error),
        }
        given = ours.copy(), baseline.copy()
        got = numbers(student(ours, baseline), "the difference and its two ends", 3)
        expect(
            all(map(np.array_equal, given, (ours, baseline))),
            "your function changes its arguments in place.",
        )
        for half in (
            welch,
            *(factor * apart for factor in (1.96, t, stats.t.ppf(0.975, 2 * n - 2))),
        ):
            expect(
                not np.allclose(got, around(half), atol=1e-3),
                "these are two unrelated samples: subtract split by "
                "split first, then the spread that the splits share is gone.",
            )
        case = Case(
            lambda *given: numbers(student(*given), "the difference and its two ends", 3),
            interval_steps,
            {"ours": ours, "baseline": baseline},
            {"ours": "n", "baseline": "n"},
            lambda ours, baseline: len(ours) > 1 and (ours - baseline).std() > 0,
        )
        what = "the list of difference and ends"
        same(got, around(t * error), wrong, what, atol=1e-3, case=case)
    figure, panel = plt.subplots(figsize=(5.5, 1.8), layout="constrained")
    panel.plot(d, [1] * n, "o", color="#56B4E9", markeredgecolor="black", label="differences")
    panel.plot(got[1:], [0, 0], color="#D55E00", linewidth=4, label="your interval")
    panel.plot(got[0], 0, "o", color="black", label="their mean")
    panel.axvline(0, color="black", linewidth=1)
    panel.set(yticks=[], ylim=(-0.7, 1.6), xlabel="ours minus baseline (points)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    plt.close(figure)
    return (
        figure,
        "The differences of eight splits as dots, below them your "
        "interval as a bar around their mean.",
    )


@checker("10.3")
def holm(student, generator):
    """The smallest p times m, the next times m - 1, ...; a running maximum, at most 1, put back."""
    import matplotlib.pyplot as plt

    for m in (8, 5, 12):
        # two that nearly tie, so that without the running maximum the second falls below the first;
        # 0.6 · 2 passes 1
        u = torch.rand(m - 4, generator=generator, dtype=torch.float64).numpy()
        ordered = np.sort(np.array([0.004, 0.00401, *(0.006 + 0.2 * u), 0.6, 0.7]))
        order = np.arange(m)
        while np.array_equal(
            order[order], np.arange(m)
        ):  # a permutation that is not its own inverse
            order = torch.randperm(m, generator=generator).numpy()
        p = np.empty(m)
        p[order] = ordered
        down, factors = ordered * np.arange(m, 0, -1), np.arange(m, 0, -1)
        right = np.minimum(np.maximum.accumulate(down), 1)

        def back(values, order=order):
            result = np.empty(len(order))
            result[order] = values
            return result.tolist()

        ranked = np.minimum.accumulate((ordered * m / np.arange(1, m + 1))[::-1])[::-1]
        wrong = {
            "that is Bonferroni: every p times m. Holm's factor falls, m "
            "for the smallest, then m - 1, ..., 1.": back(np.minimum(ordered * m, 1)),
            "that is Bonferroni, and above 1: every p times m.": back(ordered * m),
            "the running maximum is missing: an adjusted p must "
            "not fall below that of a smaller p.": back(np.minimum(down, 1)),
            "the running maximum is missing, and the limit of 1.": back(down),
            "some are above 1: they are probabilities, cut them off at 1.": back(
                np.maximum.accumulate(down)
            ),
            "they come back sorted: return them in the order of p.": right.tolist(),
            "they are put back the wrong way: `result[order] = sorted "
            "values`, not `sorted values[order]`.": right[order].tolist(),
            "nothing was corrected: these are the p-values as they were.": p.tolist(),
            "the factors are the wrong way round: m for the smallest p, 1 for the largest.": back(
                np.minimum(np.maximum.accumulate(ordered * factors[::-1]), 1)
            ),
            "the factors follow the order of `p`, not the sorted one: sort first.": np.minimum(
                p * factors, 1
            ).tolist(),
            "that is Hochberg's, a running minimum from the largest down; "
            "Holm's is a running maximum from below.": back(
                np.minimum(np.minimum.accumulate(down[::-1])[::-1], 1)
            ),
            "that is Benjamini and Hochberg's false discovery rate, another "
            "promise: Holm's factors are m, ..., 2, 1.": back(np.minimum(ranked, 1)),
            "the factors begin at m - 1: the smallest p is multiplied by m.": back(
                np.minimum(np.maximum.accumulate(ordered * (factors - 1)), 1)
            ),
        }
        given = p.copy()
        got = numbers(student(p), "the adjusted p-values", m)
        expect(
            np.array_equal(p, given),
            "your function changes its argument `p` in place; make a new array.",
        )
        case = Case(
            lambda values: numbers(student(values), "the adjusted p-values", len(values)),
            holm_steps,
            {"p": p},
            {"p": "m"},
            lambda p: len(p) > 0 and bool(((0 < p) & (p <= 1)).all()),
        )
        same(got, back(right), wrong, "the list of adjusted p-values", atol=1e-6, case=case)
    figure, panel = plt.subplots(figsize=(5.5, 2.4), layout="constrained")
    panel.plot(range(1, m + 1), ordered, "o", color="#56B4E9", markeredgecolor="black", label="p")
    panel.plot(range(1, m + 1), np.sort(got), "s-", color="#D55E00", label="adjusted")
    panel.axhline(0.05, color="black", linestyle=":")
    panel.set(yscale="log", xlabel="comparison, sorted by p", ylabel="p-value")
    panel.legend(frameon=False)
    plt.close(figure)
    return (
        figure,
        "p-values in sorted order as dots, your adjusted ones as "
        "squares above them that never fall.",
    )

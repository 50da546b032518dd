"""Checker of exercise 10.4: what is unfair in a comparison, found in its log."""

from itertools import combinations

import numpy as np
import torch

from .engine import NotYet, checker, describe, expect
from .nb10 import whole

FAULTS = {
    "splits": "the two methods were tested on different splits",
    "tuned on test": "a method chose its setting on a split that it is tested on",
    "effort": "one method tried more settings than the other",
    "best of many": "the table shows something else than the mean over all test runs of a method",
}


def study(faults, generator: torch.Generator, n: int = 2) -> tuple[list[dict], dict[str, float]]:
    """The log and the table of a study with these faults: two methods, n tuning and n test splits each.

    Which method gains is drawn. Both tune on the same splits, one of them runs each test twice, and the order is mixed:
    all of that is fair.
    """
    favoured, other = [("ours", "baseline"), ("baseline", "ours")][whole(generator, 0, 1)]
    names = [f"{whole(generator, 16**3, 16**4 - 1):x}{i}" for i in range(3 * n)]
    tuning, test, elsewhere = names[:n], names[n : 2 * n], names[2 * n :]
    log, table = [], {}
    twice = 1 + ("best of many" in faults or whole(generator, 0, 1))
    for method in (favoured, other):
        gains = method == favoured
        tried = 3 if gains and "effort" in faults else 2
        on = [*tuning[1:], test[0]] if gains and "tuned on test" in faults else tuning
        where = [*test[1:], elsewhere[0]] if not gains and "splits" in faults else test
        runs = [("tuning", k, split) for k in range(tried) for split in on]
        runs += [("test", 1, split) for split in where for _ in range(twice if gains else 1)]
        for stage, setting, split in runs:
            accuracy = float(whole(generator, 50, 90))
            log.append(dict(zip(KEYS, (method, stage, setting, split, accuracy))))
        found = [
            run["accuracy"] for run in log if (run["method"], run["stage"]) == (method, "test")
        ]
        best = gains and "best of many" in faults
        if best and len({*found}) == 1:
            log[-1]["accuracy"] = found[-1] = found[-1] + 5.0
        table[method] = max(found) if best else float(np.mean(found))
    order = torch.randperm(len(log), generator=generator).tolist()
    return [log[i] for i in order], table


KEYS = ("method", "stage", "setting", "split", "accuracy")


def told(log: list[dict], table: dict) -> str:
    """The log as lines, sorted, and the table."""
    lines = sorted("    " + ", ".join(str(run[key]) for key in KEYS) for run in log)
    shown = ", ".join(f"{method}: {value:.2f}" for method, value in table.items())
    return "\n".join([f"The log ({', '.join(KEYS)}):", *lines, f"The table: {shown}"])


@checker("10.4")
def audit(student, generator):
    """Compare the test splits, tuning against test splits, the numbers of settings, and the table with the means."""
    for size in range(len(FAULTS) + 1):  # none, one, two, ...: the smallest study comes first
        for faults in combinations(FAULTS, size):
            for n in (2, 2, 4):
                log, table = study(faults, generator, n)
                found = student(log, table)
                compare(found, set(faults), log, table)
    return drawn(generator)


def compare(found, faults: set[str], log: list[dict], table: dict) -> None:
    """Raise `NotYet` with what was missed or is not there, and the study."""
    expect(isinstance(found, (set, list, tuple)), f"return a set of names, not {describe(found)}.")
    unknown = [name for name in found if name not in FAULTS]
    expect(not unknown, f"{unknown} is none of the four names: {', '.join(FAULTS)}.")
    missed = sorted(faults - {*found})
    invented = sorted({*found} - faults)
    if not missed and not invented:
        return
    if missed:
        words = f"your audit misses {missed[0]!r}: {FAULTS[missed[0]]}."
    else:
        words = f"your audit finds {invented[0]!r} where there is none. {HARMLESS[invented[0]]}"
    raise NotYet(
        f"{words}\n{told(log, table)}\nYour answer: {sorted(found)}\nExpected:    {sorted(faults)}"
    )


HARMLESS = {
    "splits": "Both methods are tested on the same set of splits; order, and how often one is run, do not matter.",
    "tuned on test": "What one method is tuned on may be anything but a split that the same table tests on.",
    "effort": "Count different settings in tuning, not runs.",
    "best of many": "The table shows the mean over all test runs of each method; a last digit is rounding.",
}


def drawn(generator: torch.Generator):
    """What each fault alone does to a method that is exactly as good as its rival, and the alt text."""
    import matplotlib.pyplot as plt

    rng = np.random.default_rng(int(torch.randint(2**31 - 1, (1,), generator=generator)))
    studies, splits = 4000, 5

    def runs(*shape):
        return rng.normal(0, 6, (studies, *shape))

    shared = rng.normal(0, 8, (studies, splits))  # how hard a split is, for both methods
    fair = (shared + runs(splits)).mean(1) - (shared + runs(splits)).mean(1)
    elsewhere = rng.normal(0, 8, (studies, splits))
    gains = {
        "fair": fair,
        "splits": (shared + runs(splits)).mean(1) - (elsewhere + runs(splits)).mean(1),
        "tuned on test": runs(8, splits).mean(2).max(1) - runs(splits).mean(1),
        "best of many": (shared + runs(splits)).max(1) - (shared + runs(splits)).mean(1),
    }
    figure, panel = plt.subplots(figsize=(5.5, 2.4), layout="constrained")
    for y, (name, gain) in enumerate(gains.items()):
        low, high = np.quantile(gain, [0.05, 0.95])
        panel.plot([low, high], [y, y], color="#56B4E9", linewidth=5)
        panel.plot(gain.mean(), y, "o", color="black")
    panel.axvline(0, color="black", linewidth=1)
    panel.set(yticks=range(len(gains)), yticklabels=gains, ylim=(-0.5, 3.5))
    panel.set(xlabel="difference of two equal methods (points), 90 % of studies")
    plt.close(figure)
    return (
        figure,
        "The reported difference of two equally good methods, simulated with three of the faults: a "
        "fair study is centred on zero, different splits make it wider, tuning on the test and the "
        "best of many runs shift it upwards.",
    )

"""Checker of notebook 11: a published number against the prediction interval of one's own."""

import numpy as np
import torch
from scipy import stats

from .engine import checker, describe, expect, same

VERDICTS = ["inside", "ours is higher", "ours is lower"]


@checker("11.1")
def judge(student, generator):
    """The ends of the 95 % prediction interval, and on which side of it the published number lies."""
    import matplotlib.pyplot as plt

    for n, place in ((5, -1.3), (4, 1.3), (8, -0.8), (2, 0.9), (5, 0.7)):
        # place: of the published number, in half widths from the mean; 0.7, 0.8, 0.9 are outside the mean's interval
        z = torch.randn(n, generator=generator, dtype=torch.float64).numpy()
        x = 60 + (2 + 3 * torch.rand((), generator=generator).item()) * (z - z.mean()) / z.std(
            ddof=1
        )
        mean, std, t, both = x.mean(), x.std(ddof=1), stats.t.ppf(0.975, n - 1), np.sqrt(1 + 1 / n)
        half = t * std * both
        published, given = mean + place * half, x.copy()
        got = student(x, published)
        expect(
            np.array_equal(x, given), "your function changes its argument `accuracies` in place."
        )
        expect(
            isinstance(got, (tuple, list)) and len(got) == 3,
            f"return three things, low, high and the verdict; yours is {describe(got)}.",
        )
        *ends, verdict = got
        try:
            ends = [float(end) for end in ends]
        except (TypeError, ValueError):
            expect(False, "the first two things are the ends of the interval, two numbers.")

        def around(half, mean=mean):
            return [mean - half, mean + half]

        wrong = {
            "that is the interval of your mean. The published number is one number with a spread of its own: "
            "the square root is that of 1 + 1/n.": around(t * std / np.sqrt(n)),
            "that is the spread of one number around the *true* mean. Yours is estimated from n seeds, which adds "
            "s²/n to the variance: multiply by the square root of 1 + 1/n.": around(t * std),
            "1.96 is for a known spread; n seeds only estimate it and "
            "need Student's t, stats.t.ppf(0.975, n - 1).": around(1.96 * std * both),
            "the standard deviation is divided by n: say ddof=1, so that it is divided by n - 1.": around(
                t * x.std() * both
            ),
            "1.96 and ddof=0, two mistakes: Student's t, and a standard deviation divided by n - 1.": around(
                1.96 * x.std() * both
            ),
            "t has n degrees of freedom; it must be n - 1.": around(
                stats.t.ppf(0.975, n) * std * both
            ),
            "0.95 in t.ppf leaves 5 % on each side: 95 % in the middle need 0.975.": around(
                stats.t.ppf(0.95, n - 1) * std * both
            ),
            "the square root is missing: variances add up, so it is the square root of 1 + 1/n.": around(
                t * std * (1 + 1 / n)
            ),
            "the standard deviation alone is no 95 % interval: multiply by Student's t.": around(
                std * both
            ),
            "the interval lies around the published number; it belongs around your own mean.": around(
                half, published
            ),
            "the two ends are the wrong way round: low first.": [mean + half, mean - half],
            "these are the half width and its negative: add the mean.": [-half, half],
        }
        same(ends, around(half), wrong, f"the list of the two ends (n = {n})", atol=1e-3)
        right = VERDICTS[0 if abs(place) < 1 else 1 if place < 0 else 2]
        where = f"{published:.2f} and the interval is {ends[0]:.2f} to {ends[1]:.2f}"
        expect(
            verdict in VERDICTS,
            f"the verdict is one of {', '.join(VERDICTS)}; yours is {describe(verdict)}.",
        )
        if abs(place) < 1:
            expect(
                verdict == right,
                f"the published number is {where}: it lies inside, although outside the interval of the mean; your "
                f"verdict is {verdict!r}.",
            )
        expect(
            verdict == right,
            f"the published number is {where}, so the verdict is {right!r}, seen from our side; yours is {verdict!r}.",
        )
    figure, panel = plt.subplots(figsize=(5.5, 1.8), layout="constrained")
    panel.plot(x, [1] * n, "o", color="#56B4E9", markeredgecolor="black", label="your accuracies")
    panel.plot(ends, [0, 0], color="#D55E00", linewidth=4, label="one more number (95 %)")
    panel.axvline(published, color="black", linestyle="--", label=f"published: {verdict}")
    panel.set(yticks=[], ylim=(-0.7, 1.6), xlabel="accuracy (%)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    plt.close(figure)
    return (
        figure,
        "Accuracies of some seeds as dots, below them the prediction interval as a bar, and the "
        "published number as a dashed line inside it.",
    )

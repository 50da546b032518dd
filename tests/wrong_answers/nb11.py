"""Typical wrong answers to notebook 11, and words that the checker's message must hold."""

import numpy as np
from scipy import stats


def verdict(low, high, published, words=("inside", "ours is higher", "ours is lower")):
    return words[0 if low <= published <= high else 1 if published < low else 2]


def judged(x, published, half, words=("inside", "ours is higher", "ours is lower")):
    low, high = x.mean() - half, x.mean() + half
    return low, high, verdict(low, high, published, words)


def half_of(x, factor=None, ddof=1, root=None):
    n = len(x)
    factor = factor or stats.t.ppf(0.975, n - 1)
    return factor * x.std(ddof=ddof) * (np.sqrt(1 + 1 / n) if root is None else root)


def of_the_mean(x, published):
    return judged(x, published, half_of(x, root=1 / np.sqrt(len(x))))


def verdict_of_the_mean(x, published):
    low, high, _ = judged(x, published, half_of(x))
    return low, high, of_the_mean(x, published)[2]


def in_place(x, published):
    x.sort()
    return judged(x, published, half_of(x))


SWAPPED = "inside", "ours is lower", "ours is higher"
WRONG = {
    "judge": [
        (of_the_mean, "that is the interval of your mean"),
        (lambda x, p: judged(x, p, half_of(x, root=1)), "estimated from n seeds"),
        (lambda x, p: judged(x, p, half_of(x, factor=1.96)), "need Student's t"),
        (lambda x, p: judged(x, p, half_of(x, ddof=0)), "say ddof=1"),
        (lambda x, p: judged(x, p, half_of(x, 1.96, 0)), "two mistakes"),
        (lambda x, p: judged(x, p, half_of(x, root=1 + 1 / len(x))), "the square root is missing"),
        (lambda x, p: judged(x, p, half_of(x), SWAPPED), "seen from our side"),
        (verdict_of_the_mean, "although outside the interval of the mean"),
        (lambda x, p: judged(x, p, half_of(x), ("yes", "no", "no")), "the verdict is one of"),
        (lambda x, p: judged(x, p, half_of(x))[:2], "return three things"),
        (lambda x, p: judged(x, p, 1.02 * half_of(x)), "the list of the two ends (n = 5)"),
        (in_place, "in place"),
    ]
}


def with_scipy(x, published):
    """The same interval from scipy's own distribution, and a list instead of a tuple."""
    low, high = stats.t.interval(
        0.95, len(x) - 1, loc=np.mean(x), scale=np.std(x, ddof=1) * (1 + 1 / len(x)) ** 0.5
    )
    return [float(low), float(high), verdict(low, high, published)]


RIGHT = {"judge": [with_scipy]}

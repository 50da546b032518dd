"""Typical wrong answers to notebook 10, and words that the checker's message must hold."""

import random

import numpy as np
from scipy import stats


def by_class(labels):
    return {
        name: [i for i, label in enumerate(labels) if label == name] for name in sorted({*labels})
    }


def in_turns(labels, K, rng, classes=True, rows=True, last=True, source=None):
    """Right, unless a shuffle is left out or another generator is the source."""
    rng = source or rng
    found = by_class(labels)
    names = rng.sample([*found], len(found)) if classes else [*found]
    lists = [rng.sample(found[name], len(found[name])) if rows else found[name] for name in names]
    chosen = [one[turn] for turn in range(len(labels)) for one in lists if turn < len(one)][:K]
    return rng.sample(chosen, K) if last else chosen


def per_class(labels, K, rng):
    return [i for rows in by_class(labels).values() for i in rng.sample(rows, min(K, len(rows)))]


def with_replacement(labels, K, rng):
    found = by_class(labels)
    names = rng.sample([*found], len(found))
    return rng.sample(
        drawn := [rng.choice(found[names[k % len(names)]]) for k in range(K)], len(drawn)
    )


def half(d, factor=None, ddof=1, root=True):
    factor = factor or stats.t.ppf(0.975, len(d) - 1)
    return factor * d.std(ddof=ddof) / (np.sqrt(len(d)) if root else 1)


def ends(a, b, **kwargs):
    d = a - b
    return d.mean(), d.mean() - half(d, **kwargs), d.mean() + half(d, **kwargs)


def unpaired(a, b):
    error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    t = stats.t.ppf(0.975, 2 * len(a) - 2)
    return a.mean() - b.mean(), a.mean() - b.mean() - t * error, a.mean() - b.mean() + t * error


def unpaired_by_scipy(a, b):
    return a.mean() - b.mean(), *stats.ttest_ind(a, b, equal_var=False).confidence_interval()


def stepped(p):
    return np.sort(p) * np.arange(len(p), 0, -1)


def put_back(p, values):
    result = np.empty(len(p))
    result[np.argsort(p)] = values
    return result


def sorts_in_place(p):
    p.sort()
    return np.minimum(np.maximum.accumulate(stepped(p)), 1)


WRONG = {
    "draw_shots": [
        (per_class, "K is the number in total"),
        (with_replacement, "drawn twice"),
        (lambda labels, K, rng: rng.sample(range(len(labels)), K), "Distinct classes first"),
        (
            lambda labels, K, rng: in_turns(labels, K, rng, classes=False),
            "which classes stand among the K",
        ),
        (
            lambda labels, K, rng: in_turns(labels, K, rng, rows=False),
            "which row stands for its class",
        ),
        (lambda labels, K, rng: in_turns(labels, K, rng, last=False), "rounds still show"),
        (
            lambda labels, K, rng: in_turns(labels, K, rng, source=random),
            "take all randomness from `rng`",
        ),
        (
            lambda labels, K, rng: sorted(in_turns(labels, K, rng), key=labels.__getitem__),
            "one fixed order",
        ),
        (lambda labels, K, rng: [labels[i] for i in in_turns(labels, K, rng)], "these are labels"),
        (
            lambda labels, K, rng: sorted(labels, key=len)[:K] if len(labels) > 2 else [0] * K,
            "labels = [",
        ),
    ],
    "paired_interval": [
        (lambda a, b: ends(a, b, factor=1.96), "need Student's t"),
        (lambda a, b: ends(a, b, ddof=0), "say ddof=1"),
        (lambda a, b: ends(a, b, root=False), "square root of n is missing"),
        (unpaired, "two unrelated samples"),
        (unpaired_by_scipy, "two unrelated samples"),
        (lambda a, b: ends(b, a), "wrong way round"),
        (lambda a, b: (float((a - b).mean()), float(half(a - b))), "3 numbers"),
        (lambda a, b: ends(b, a, factor=1.96), "their standard deviation"),
    ],
    "holm": [
        (lambda p: np.minimum(p * len(p), 1), "that is Bonferroni"),
        (lambda p: put_back(p, np.minimum(stepped(p), 1)), "running maximum is missing"),
        (lambda p: p.copy(), "nothing was corrected"),
        (lambda p: np.minimum(np.maximum.accumulate(stepped(p)), 1), "they come back sorted"),
        (
            lambda p: np.minimum(np.maximum.accumulate(stepped(p)), 1)[np.argsort(p)],
            "put back the wrong way",
        ),
        (lambda p: put_back(p, np.maximum.accumulate(stepped(p))), "above 1"),
        (lambda p: stats.false_discovery_control(p), "false discovery rate"),
        (sorts_in_place, "in place"),
        (lambda p: np.sort(p) * np.arange(1, len(p) + 1), "running maximum, at most 1"),
    ],
}


def runs_of(log, method, stage, key):
    return [run[key] for run in log if (run["method"], run["stage"]) == (method, stage)]


def audits(without=(), splits=set, tuned=runs_of, count=set, rest=()):
    """The audit of 10.4, without some of its questions, or with another way to ask one of them."""

    def audit(log, table):
        def of(method, stage, key):
            return runs_of(log, method, stage, key)

        tested = [splits(of(m, "test", "split")) for m in ("ours", "baseline")]
        tried = [len(count(of(m, "tuning", "setting"))) for m in ("ours", "baseline")]
        found = {
            "splits": tested[0] != tested[1],
            "tuned on test": any(
                {*of(m, "test", "split")} & {*of(m, "tuning", "split")} for m in table
            ),
            "effort": tried[0] != tried[1],
            "best of many": any(
                abs(np.mean(of(m, "test", "accuracy")) - table[m]) > 0.01 for m in table
            ),
        }
        return {name for name in found if found[name] and name not in without} | {*rest}

    return audit


WRONG["audit"] = [
    (lambda log, table: set(), "your audit misses"),
    (audits(without=["tuned on test"]), "misses 'tuned on test'"),
    (audits(without=["best of many"]), "misses 'best of many'"),
    (audits(splits=list), "finds 'splits' where there is none"),
    (audits(rest=["effort"]), "Count different settings"),
    (audits(rest=["cheating"]), "none of the four names"),
    (lambda log, table: True, "return a set of names"),
]

"""Uncertainty in words and numbers: intervals of a mean and of one new observation, Holm's correction."""

import math

import numpy as np
import pandas as pd
from scipy import stats


def interval(values):
    """Mean, standard deviation (ddof=1) and the ends of a 95 % interval of the mean, in the unit of the values.

    t interval below 10 values, from 10 on expanded percentile bootstrap (Hesterberg 2015, The American Statistician 69;
    10,000 resamples, fixed seed): plain percentiles of 10 normal values hold the mean in 90 of 100 cases, these in 95.
    One value has a mean and no spread (NaN). ValueError for no values or for one that is not finite.
    """
    x = np.sort(
        np.asarray(values, dtype=float)
    )  # sorted: seeds in another order give the same resamples
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"an interval needs one or more finite numbers, got {list(x)}")
    if len(x) == 1:
        return float(x[0]), math.nan, math.nan, math.nan
    mean, std = float(x.mean()), float(x.std(ddof=1))
    if len(x) < 10:
        return mean, std, *_around(mean, std / math.sqrt(len(x)), len(x))
    resampled = np.random.default_rng(0).choice(x, (10_000, len(x))).mean(axis=1)
    tail = stats.norm.cdf(stats.t.ppf(0.025, len(x) - 1) * math.sqrt(len(x) / (len(x) - 1)))
    return mean, std, *np.quantile(resampled, [tail, 1 - tail]).tolist()


def signed(mean, low, high):
    """A difference with the ends of its interval, as people read it; empty if there is none."""
    if math.isnan(mean):
        return ""
    return f"{mean:+.1f}" if math.isnan(low) else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def prediction_interval(values):
    """Ends of the 95 % t interval for one new observation; NaN from a single value.

    This, not the interval of the mean, judges a published single number: such a number has a spread of its own.
    """
    (mean, std, _, _), n = interval(values), len(values)
    return _around(mean, std * math.sqrt(1 + 1 / n), n)


def _around(mean, error, n):
    half = float(stats.t.ppf(0.975, n - 1)) * error  # NaN for n = 1
    return mean - half, mean + half


def holm(p: pd.Series) -> pd.Series:
    """Holm's adjustment: as if each p were one of all of them; missing ones stay missing."""
    order = p.dropna().sort_values()
    adjusted = order * np.arange(len(order), 0, -1)
    return adjusted.cummax().clip(upper=1).reindex(p.index)

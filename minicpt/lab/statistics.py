"""Uncertainty in words and numbers: intervals of a mean and of one new observation, Holm's correction."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import MiniCPTError

Interval = tuple[float, float, float, float]  # mean, standard deviation, lower and upper end


def interval(values: Sequence[float]) -> Interval:
    """Mean, standard deviation (ddof=1) and the ends of a 95 % interval of the mean, in the unit of the values.

    t interval below 10 values, from 10 on expanded percentile bootstrap (Hesterberg 2015, The American Statistician 69;
    10,000 resamples, fixed seed): plain percentiles of 10 normal values hold the mean in 90 of 100 cases, these in 95.
    One value has a mean and no spread (NaN). `MiniCPTError` for no values or for one that is not finite.
    """
    x = np.sort(np.asarray(values, dtype=float))  # sorted: another order, the same resamples
    n = len(x)
    if not n or not np.isfinite(x).all():
        raise MiniCPTError(
            f"An interval needs one or more finite numbers, got {list(x)}. Compute the cells that are missing."
        )
    mean = float(x.mean())
    if n == 1:
        return float(x[0]), math.nan, math.nan, math.nan
    std = float(x.std(ddof=1))
    if n < 10:
        return mean, std, *_around(mean, std / math.sqrt(n), n)
    resampled = np.random.default_rng(0).choice(x, (10_000, n)).mean(axis=1)
    tail = stats.norm.cdf(stats.t.ppf(0.025, n - 1) * math.sqrt(n / (n - 1)))
    return mean, std, *np.quantile(resampled, [tail, 1 - tail]).tolist()


def prediction_interval(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95 % t interval for one new observation; NaN from a single value.

    This, not the interval of the mean, judges a published single number: such a number has a spread of its own.
    """
    mean, std, _, _ = interval(values)
    return one_more(mean, std, len(values))


def one_more(mean: float, std: float, n: int) -> tuple[float, float]:
    """The same interval from the mean and standard deviation of n values."""
    return _around(mean, std * math.sqrt(1 + 1 / n), n)


def _around(mean: float, error: float, n: int) -> tuple[float, float]:
    half = float(stats.t.ppf(0.975, n - 1)) * error  # NaN for n = 1
    return mean - half, mean + half


def signed(mean: float, low: float, high: float) -> str:
    """A difference with the ends of its interval, as people read it; empty if there is none.

    Without an interval where one seed, or seeds that happen to agree to the last query, show no spread.
    """
    if math.isnan(mean):
        return ""
    if math.isnan(low) or low == high:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def holm(p: pd.Series) -> pd.Series:
    """Holm's adjustment: as if each p were one of all of them; missing ones stay missing."""
    order = p.dropna().sort_values()
    adjusted = order * np.arange(len(order), 0, -1)
    return adjusted.cummax().clip(upper=1).reindex(p.index)

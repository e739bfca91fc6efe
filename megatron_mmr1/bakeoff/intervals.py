"""Means over seeds with 95% intervals, by Student's t."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A value, and the ends of its 95% interval; NaN ends for a single seed."""

    value: float
    low: float
    high: float

    @property
    def is_null(self) -> bool:
        """Whether zero is not excluded."""
        return not (self.low > 0 or self.high < 0)


def mean_interval(values: np.ndarray) -> Interval:
    """Return the mean over seeds; for a comparison pass differences between the same seeds."""
    num = len(values)
    mean = float(values.mean())
    if num < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, num - 1)) * float(values.std(ddof=1)) / math.sqrt(num)
    return Interval(mean, mean - half, mean + half)


def points(interval: Interval, is_signed: bool = False) -> str:
    """Write shares as percent, "41.2 [40.1, 42.3]"; a single seed has no interval."""
    form = "{:+.1f}" if is_signed else "{:.1f}"
    value, low, high = (form.format(100.0 * x) for x in interval)
    return value if math.isnan(interval.low) else f"{value} [{low}, {high}]"


def difference(interval: Interval) -> str:
    """Write a difference in points, and whether it may be nothing."""
    return points(interval, is_signed=True) + " (null)" * interval.is_null

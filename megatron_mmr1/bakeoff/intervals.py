"""Means over seeds with 95% intervals, by Student's t."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean, and the ends of its 95% interval; NaN ends for a single seed."""

    mean: float
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

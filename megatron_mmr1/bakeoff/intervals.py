"""Means over seeds with 95% intervals, by Student's t."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


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
    half = t_quantile(num - 1) * float(values.std(ddof=1)) / math.sqrt(num)
    return Interval(mean, mean - half, mean + half)


def t_quantile(degrees: int, share: float = 0.95) -> float:
    """Return t with P(|T| <= t) = share, to about 1e-4.

    With x = sqrt(degrees) tan(angle) the density is in proportion to cos(angle)^(degrees - 1).
    """
    angle = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    found = np.interp(share, below / below[-1], angle)
    return math.sqrt(degrees) * math.tan(float(found))

"""Distributions as SVG: a histogram of whole numbers."""

from __future__ import annotations

import numpy as np

from megatron_mmr1.observability.plots import nice_ticks, show, svg, text

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 460, 170, 46, 10, 24
_MAX_BARS = 24


def histogram(values: np.ndarray, name: str) -> str:
    """Draw how many values fall in bins of one round width; the last bar holds the longest 1%.

    Args:
        values: whole numbers, at least one.
        name: what they measure.
    """
    step, counts = _binned(values)
    high = float(nice_ticks(0.0, float(counts.max()), 3)[-1])
    width = (_WIDTH - _LEFT - 14) / len(counts)
    floor = _HEIGHT - _BOTTOM

    def to_y(count: float) -> float:
        return floor - count / high * (floor - _TOP)

    parts = []
    for tick in nice_ticks(0.0, float(counts.max()), 3):
        parts.append(f'<path class="rule" d="M{_LEFT} {to_y(tick):.1f}H{_WIDTH - 14}"/>')
        parts.append(text(_LEFT - 7, to_y(tick) + 3.5, show(float(tick)), "end"))
    for i, count in enumerate(counts.tolist()):
        label = f"{name} {_bin_name(i, step, len(counts), int(values.max()))}: {count:,} rows"
        parts.append(
            f'<rect class="bar c0" x="{_LEFT + i * width + 0.8:.1f}" y="{to_y(count):.1f}" '
            f'width="{max(width - 1.6, 1):.1f}" height="{floor - to_y(count):.1f}">'
            f"<title>{label}</title></rect>"
        )
    every = max(len(counts) // 6, 1)
    for i in range(0, len(counts), every):
        parts.append(text(_LEFT + (i + 0.5) * width, _HEIGHT - 7, f"{i * step:,}"))
    return svg(parts, _WIDTH, _HEIGHT)


def quartiles(values: np.ndarray) -> str:
    """Say where the values lie, in words."""
    low, median, high = np.percentile(values, [5, 50, 95])
    return f"median {median:,.0f}, 5% to 95%: {low:,.0f} to {high:,.0f}, highest {values.max():,}"


def _binned(values: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the bins' width, a round number, and how many values each has."""
    top = int(np.percentile(values, 99))
    step = 1
    while top // step >= _MAX_BARS:
        step = _next(step)
    bins = np.minimum(values // step, top // step)
    return step, np.bincount(bins.astype(np.int64))


def _next(step: int) -> int:
    """The next of 1, 2, 5, 10, 20, ..."""
    magnitude = 10 ** (len(str(step)) - 1)
    return {1: 2, 2: 5, 5: 10}[step // magnitude] * magnitude


def _bin_name(i: int, step: int, num_bins: int, highest: int) -> str:
    last = highest if i == num_bins - 1 else (i + 1) * step - 1
    return f"{i * step:,}" if last <= i * step else f"{i * step:,} to {last:,}"

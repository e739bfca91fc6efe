"""Plots as hand-written SVG: sharp, small, no script, and readable in light and dark.

Every function returns one `<svg>` element. Its colours are the classes c0 to c6 of `style.CSS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 460, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 26
MAX_HOVER_POINTS = 400  # a longer line tells its values only in the table: the page stays small


@dataclass(frozen=True, slots=True)
class Series:
    """One named line. `xs` and `ys` have one length; a NaN in `ys` leaves a gap."""

    name: str
    xs: np.ndarray
    ys: np.ndarray
    color: int = 0


def show(value: float, is_percent: bool = False) -> str:
    """Write a number for people: 53.1%, 1,204, 0.0123, 3.1e-5."""
    if not math.isfinite(value):
        return "-"
    if is_percent:
        return f"{value:.1%}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def nice_ticks(low: float, high: float, count: int = 4) -> np.ndarray:
    """Return about `count` round numbers that enclose [low, high]."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    magnitude = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude * count >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return np.arange(first, last + 1) * step


def smooth(ys: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of `window` neighbours (odd; fewer at the ends); a NaN is left out."""
    half = window // 2
    padded = np.pad(ys.astype(float), half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    counts = np.isfinite(windows).sum(axis=1)
    return np.where(counts > 0, np.nansum(windows, axis=1) / np.maximum(counts, 1), np.nan)


def smoothing_window(num_points: int) -> int:
    """Return how many steps the bold line averages; 1 (no smoothing) for a short run."""
    return 1 if num_points < 30 else num_points // 20 * 2 + 1


def line_chart(
    series: Sequence[Series],
    is_percent: bool = False,
    is_log: bool = False,
    from_zero: bool = False,
    should_smooth: bool = True,
    x_name: str = "step",
) -> str:
    """Draw lines over steps, or over what `x_name` says.

    A long noisy series is drawn thin, with its moving average in bold.
    """
    usable = np.concatenate([s.ys[np.isfinite(s.ys)] for s in series])
    usable = usable[usable > 0] if is_log else usable
    xs = np.concatenate([s.xs for s in series])
    ticks = _log_ticks(usable) if is_log else nice_ticks(*_range(usable, from_zero or is_percent))
    x_low, x_high = float(xs.min()), float(max(xs.max(), xs.min() + 1))
    y_low, y_high = float(ticks[0]), float(ticks[-1])

    def to_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def to_y(y: float) -> float:
        scale = math.log if is_log else float
        share = (scale(y) - scale(y_low)) / (scale(y_high) - scale(y_low))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [_y_axis(ticks, to_y, is_percent), _x_axis(x_low, x_high, to_x, x_name)]
    for s in series:
        ys = np.where(s.ys > 0, s.ys, np.nan) if is_log else s.ys
        window = smoothing_window(len(ys)) if should_smooth else 1
        points = [(x, y) for x, y in zip(s.xs, ys, strict=True) if math.isfinite(y)]
        if window > 1:
            parts.append(_path(s.xs, ys, to_x, to_y, f"raw c{s.color}"))
            ys = smooth(ys, window)
        parts.append(_path(s.xs, ys, to_x, to_y, f"line c{s.color}"))
        dot = "point" if len(points) <= 24 else "hover"
        for x, y in points if len(points) <= MAX_HOVER_POINTS else []:
            label = f"{escape(s.name)}, {x_name} {x:.0f}: {show(y, is_percent)}"
            parts.append(
                f'<circle class="{dot} c{s.color}" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3.2">'
                f"<title>{label}</title></circle>"
            )
    return svg(parts, WIDTH, HEIGHT)


def stacked_area(series: Sequence[Series]) -> str:
    """Draw shares (0 to 1) over steps, one on top of the other; all series share their steps."""
    xs = series[0].xs
    x_low, x_high = float(xs.min()), float(max(xs.max(), xs.min() + 1))

    def to_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def to_y(y: float) -> float:
        return HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    parts: list[str] = []
    below = np.zeros(len(xs))
    window = smoothing_window(len(xs))
    for s in series:
        above = below + np.nan_to_num(smooth(s.ys, window))
        outline = [(x, y) for x, y in zip(xs, above, strict=True)]
        outline += [(x, y) for x, y in zip(xs[::-1], below[::-1], strict=True)]
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in outline)
        parts.append(f'<polygon class="area c{s.color}" points="{path}"/>')
        below = above
    parts += [_y_axis(np.linspace(0, 1, 5), to_y, True), _x_axis(x_low, x_high, to_x)]
    return svg(parts, WIDTH, HEIGHT)


def sparkline(ys: np.ndarray) -> str:
    """Draw a line without axes, for a table cell; nothing for fewer than two numbers."""
    finite = ys[np.isfinite(ys)]
    if len(finite) < 2:
        return ""
    low, span = float(finite.min()), float(np.ptp(finite)) or 1.0
    last = len(ys) - 1
    path = _path(
        np.arange(len(ys)),
        ys,
        lambda x: 2 + x / last * 116,
        lambda y: 20 - (y - low) / span * 16,
        "spark c0",
    )
    return f'<svg class="sparkline" viewBox="0 0 120 24" width="120" height="24">{path}</svg>'


def svg(parts: Sequence[str], width: float, height: float) -> str:
    """Wrap elements in an `<svg>` that grows with its card."""
    return f'<svg class="plot" role="img" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'


def text(x: float, y: float, content: str, anchor: str = "middle", kind: str = "tick") -> str:
    """Place an escaped label."""
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" '
        f'text-anchor="{anchor}">{escape(content)}</text>'
    )


def _range(usable: np.ndarray, from_zero: bool) -> tuple[float, float]:
    low, high = (float(usable.min()), float(usable.max())) if len(usable) else (0.0, 1.0)
    return (min(low, 0.0), high or 1.0) if from_zero else (low, high)


def _log_ticks(usable: np.ndarray) -> np.ndarray:
    if not len(usable):
        return np.array([0.1, 1.0])
    low = math.floor(math.log10(usable.min()))
    high = max(math.ceil(math.log10(usable.max())), low + 1)
    return 10.0 ** np.arange(low, high + 1)


def _path(xs, ys, to_x, to_y, kind: str) -> str:
    commands, is_drawing = [], False
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            commands.append(f"{'L' if is_drawing else 'M'}{to_x(x):.1f} {to_y(y):.1f}")
        is_drawing = math.isfinite(y)
    return f'<path class="{kind}" d="{"".join(commands)}"/>'


def _y_axis(ticks: np.ndarray, to_y, is_percent: bool) -> str:
    parts = []
    for tick in ticks:
        y = to_y(tick)
        parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        label = f"{tick * 100:.3g}%" if is_percent else show(float(tick))
        parts.append(text(LEFT - 7, y + 3.5, label, "end"))
    return "".join(parts)


def _x_axis(low: float, high: float, to_x, name: str = "step") -> str:
    ticks = [t for t in nice_ticks(low, high, 5) if low <= t <= high and t == round(t)]
    labels = [text(to_x(t), HEIGHT - 8, f"{t:.0f}") for t in ticks]
    if name == "step":
        return text(LEFT - 7, HEIGHT - 8, name, "end") + "".join(labels)
    return text(WIDTH - RIGHT, HEIGHT - BOTTOM - 6, name, "end") + "".join(labels)

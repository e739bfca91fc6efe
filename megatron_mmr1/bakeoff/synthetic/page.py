"""Stage 1 in HTML and SVG: parts of examples/samplers/index.html, built like report.html."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from megatron_mmr1.bakeoff.intervals import Interval, mean_interval, points
from megatron_mmr1.bakeoff.synthetic import tables
from megatron_mmr1.bakeoff.synthetic.comparison import Comparison
from megatron_mmr1.observability.plots import Series, line_chart, nice_ticks, svg, text
from megatron_mmr1.observability.template import card, legend_item, section

CURVE_ARMS = ("oracle", "posterior (preset)", "uniform", "dapo", "paper_table_6")
_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 620, 236, 20, 19, 6


def html(comparison: Comparison) -> str:
    """Return stage 1: charts, learning curves, tables."""
    pools = list(comparison.values)
    cards = [_interval_card(comparison, pool) for pool in pools]
    curves = [_curve_card(comparison, pool) for pool in pools if not pool.endswith("_blind")]
    parts = [
        f'<div class="grid two">{"".join(cards)}</div>',
        f'<h3 class="between">Learning proxy</h3><div class="grid">{"".join(curves)}</div>',
        *[_table_card(comparison, pool) for pool in pools],
    ]
    style = (
        "<style>.two{grid-template-columns:repeat(auto-fill,minmax(min(520px,100%),1fr))}"
        ".between{margin:24px 0 12px}td{font-variant-numeric:tabular-nums}"
        ".whisker{stroke:var(--c);stroke-width:2}.null{opacity:.5}</style>"
    )
    lead = f"{tables.LAW} {tables.notes(comparison)}"
    return style + section("Stage 1: synthetic prompts with known pass rates", lead, "".join(parts))


def interval_chart(rows: list[tuple[str, Interval, int]], reference: float) -> str:
    """Draw a mean and its interval a row, as bars from zero, with a line at `reference`.

    Args:
        rows: name, shares, colour.
    """
    ticks = nice_ticks(0.0, max(1.0, *(interval.value for _, interval, _ in rows)), 4)
    height = _TOP + _ROW * len(rows) + 24
    bottom = _TOP + _ROW * len(rows)

    def to_x(share: float) -> float:
        return _LEFT + share / ticks[-1] * (_WIDTH - _LEFT - _RIGHT)

    parts = []
    for tick in ticks:
        parts.append(f'<path class="rule" d="M{to_x(tick):.1f} {_TOP}V{bottom}"/>')
        parts.append(text(to_x(tick), bottom + 16, f"{tick:.0%}"))
    for number, (name, interval, color) in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        label = f"{name}: {points(interval)}%"
        parts.append(text(_LEFT - 8, y + 4, name, "end"))
        parts.append(
            f'<rect class="bar c{color}" opacity=".55" x="{_LEFT}" y="{y - 6:.1f}" height="12" '
            f'width="{to_x(interval.value) - _LEFT:.1f}"><title>{escape(label)}</title></rect>'
        )
        if not math.isnan(interval.low):
            low, high = to_x(max(interval.low, 0.0)), to_x(interval.high)
            parts.append(f'<path class="whisker c{color}" d="M{low:.1f} {y:.1f}H{high:.1f}"/>')
    x = to_x(reference)
    parts.append(f'<path class="line c5" stroke-dasharray="3 3" d="M{x:.1f} {_TOP}V{bottom}"/>')
    return svg(parts, _WIDTH, height)


def _interval_card(comparison: Comparison, pool: str) -> str:
    rows = []
    for arm in comparison.values[pool]:
        interval = mean_interval(comparison.mixed_share(pool, arm))
        rows.append((arm, interval, _color(arm)))
    reference = float(comparison.mixed_share(pool, "uniform").mean())
    note = "Mixed training groups for the same number of responses. Dashed: uniform."
    return card(tables.POOL_WORDS[pool], interval_chart(rows, reference), note)


def _color(arm: str) -> int:
    """The baseline grey, the paper's orange, dynamic sampling violet, what was told yellow."""
    if arm in ("oracle", "uniform"):
        return 5
    if arm.startswith(("paper", "released")):
        return 1
    if "dapo" in arm:
        return 3
    return 4 if "told" in arm else 0


def _curve_card(comparison: Comparison, pool: str) -> str:
    series = [
        Series(
            arm,
            np.array(comparison.curves[pool][arm]["rollouts"]) / 1000.0,
            np.array(comparison.curves[pool][arm]["frontiers"]),
            color,
        )
        for arm, color in zip(CURVE_ARMS, (5, 0, 2, 3, 1), strict=True)
    ]
    legend = "".join(legend_item(s.name, s.color, f"{s.ys[-1]:.0%}") for s in series)
    chart = line_chart(series, should_smooth=False, x_name="thousand responses", is_percent=True)
    note = "Mean pass rate of the prompts that were on the frontier at the start."
    return card(tables.POOL_WORDS[pool], chart, note, legend)


def _table_card(comparison: Comparison, pool: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in tables.HEADER)
    body = "".join(
        f"<tr{' class=null' if row.is_null else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row.cells)
        + "</tr>"
        for row in tables.rows(comparison, pool)
    )
    title = escape(tables.POOL_WORDS[pool])
    return (
        f'<details class="card"><summary>Table: {title}</summary>'
        f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div></details>'
    )

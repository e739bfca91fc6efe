"""A record as one HTML page: bars of tokens/s, stacked seconds a phase, scaling, the formula."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from megatron_mmr1.observability.plots import Series, line_chart, nice_ticks, show, svg, text
from megatron_mmr1.observability.template import card, legend_item, page, section
from megatron_mmr1.throughput import summary, tables

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 620, 220, 64, 26, 6
# Of the phases; what is not here is grey.
_COLORS = {
    "rollout": 0, "forward": 1, "backward": 6, "head": 4, "logprobs": 3, "vision": 2,
    "turns": 4, "weight_sync": 2,
}  # fmt: skip


def html(record: dict[str, Any]) -> str:
    """Return the page of a record."""
    measured = [entry for entry in record["points"] if "steps" in entry]
    body = [f"<h1>Throughput</h1><p class=sub>{escape(subtitle(record))}</p>"]
    if measured:
        cards = [
            card("Tokens/s/GPU", _bars(measured, summary.tokens_per_s_per_gpu), _WHISKERS),
            card("Seconds of a step, by phase", _stacked(measured), legend=_legend(measured)),
            *_scaling(measured),
        ]
        body.append(
            section("Measured", tables.DEFINITIONS, f'<div class="grid">{_join(cards)}</div>')
        )
        body.append(_table_card("Layouts", tables.HEADER, [tables.row(e) for e in measured]))
        body.append(_table_card("Seconds: median (min to max)", *tables.phase_rows(measured)))
        formula = escape(measured[0]["formula"])
        source = escape(measured[0]["peak"]["source"])
        body.append(card("Model FLOPs", f"<pre>{formula}</pre>", f"Peak: {source}."))
    if refused := [entry for entry in record["points"] if "error" in entry]:
        rows = [(e["label"], str(e["processes"]), e["error"]) for e in refused]
        body.append(_table_card("Not measured", ("layout", "processes", "why"), rows))
    raw = escape(json.dumps({k: v for k, v in record.items() if k != "points"}, indent=1))
    body.append(
        f'<details class="card"><summary>Machine and options</summary><pre>{raw}</pre></details>'
    )
    style = (
        "<style>.whisker{stroke:var(--ink);stroke-width:1.5;fill:none}pre{overflow:auto}"
        ".card{margin-bottom:16px}"
        ".grid{grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr))}</style>"
    )
    return page("Throughput", style + _join(body))


def subtitle(record: dict[str, Any]) -> str:
    """Say where and how the record was made."""
    machine, options = record["machine"], record["options"]
    lengths = options["fixed"]
    shape = (
        f"prompts of {lengths[0]}, responses of {lengths[1]} tokens" if lengths else "real lengths"
    )
    return (
        f"{record['experiment']}, {shape}; {options['steps']} steps after {options['warmup']} to "
        f"warm up; {machine['device']}, {machine['cpus']} CPUs, load average "
        f"{machine['load_average'][0]:.1f} at the start; commit {machine['commit'] or 'unknown'}"
    )


_WHISKERS = "Bars are medians over the steps; lines reach from the slowest step to the fastest."


def _bars(entries: Sequence[dict[str, Any]], measure: Any) -> str:
    spreads = [measure(entry) for entry in entries]
    parts, to_x = _axis(len(entries), max(spread.high for spread in spreads))
    for number, (entry, spread) in enumerate(zip(entries, spreads, strict=True)):
        y = _TOP + _ROW * (number + 0.5)
        parts.append(text(_LEFT - 8, y + 4, _name(entry), "end"))
        parts.append(_bar(_LEFT, to_x(spread.median), y, 0, show(spread.median)))
        low, high = to_x(spread.low), to_x(spread.high)
        parts.append(f'<path class="whisker" d="M{low:.1f} {y:.1f}H{high:.1f}"/>')
        parts.append(text(high + 6, y + 4, show(spread.median), "start"))
    return svg(parts, _WIDTH, _height(len(entries)))


def _stacked(entries: Sequence[dict[str, Any]]) -> str:
    phases = [summary.phase_seconds(entry) for entry in entries]
    longest = max(sum(spread.median for spread in of.values()) for of in phases)
    parts, to_x = _axis(len(entries), longest)
    for number, (entry, of) in enumerate(zip(entries, phases, strict=True)):
        y, total = _TOP + _ROW * (number + 0.5), 0.0
        parts.append(text(_LEFT - 8, y + 4, _name(entry), "end"))
        for name, spread in of.items():
            label = f"{summary.WORDS.get(name, name)}: {show(spread.median)} s"
            start, total = total, total + spread.median
            parts.append(_bar(to_x(start), to_x(total), y, _COLORS.get(name, 5), label))
        parts.append(text(to_x(total) + 6, y + 4, f"{show(total)} s", "start"))
    return svg(parts, _WIDTH, _height(len(entries)))


def _legend(entries: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(n for entry in entries for n in summary.phase_seconds(entry))
    shown = [name for name in names if name in _COLORS]
    items = [legend_item(summary.WORDS.get(name, name), _COLORS[name]) for name in shown]
    return _join([*items, legend_item("others", 5)])


def _scaling(entries: Sequence[dict[str, Any]]) -> list[str]:
    cards = []
    for kind in ("weak", "strong"):
        of = sorted((e for e in entries if e["kind"] == kind), key=lambda e: e["processes"])
        if len(of) < 2:
            continue
        xs = np.array([entry["processes"] for entry in of], dtype=float)
        ys = np.array(summary.efficiency(of))
        chart = line_chart(
            [Series("tokens/s/GPU", xs, ys)], is_percent=True, should_smooth=False,
            x_name="processes",
        )  # fmt: skip
        words = "the same step on more" if kind == "strong" else "the same share for each"
        cards.append(card(f"{kind.title()} scaling", chart, f"Of the smallest number; {words}."))
    return cards


def _axis(num_rows: int, high: float) -> tuple[list[str], Any]:
    ticks, bottom = nice_ticks(0.0, high, 4), _TOP + _ROW * num_rows

    def to_x(value: float) -> float:
        return _LEFT + value / ticks[-1] * (_WIDTH - _LEFT - _RIGHT)

    parts = []
    for tick in ticks:
        parts.append(f'<path class="rule" d="M{to_x(tick):.1f} {_TOP}V{bottom}"/>')
        parts.append(text(to_x(tick), bottom + 16, show(float(tick))))
    return parts, to_x


def _bar(start: float, end: float, y: float, color: int, label: str) -> str:
    return (
        f'<rect class="bar c{color}" x="{start:.1f}" y="{y - 8:.1f}" height="16" '
        f'width="{max(end - start, 0.0):.1f}"><title>{escape(label)}</title></rect>'
    )


def _name(entry: dict[str, Any]) -> str:
    label = entry["label"]
    return label if len(label) <= 34 else f"{label[:33]}…"


def _height(num_rows: int) -> int:
    return _TOP + _ROW * num_rows + 24


def _table_card(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = _join([f"<th>{escape(name)}</th>" for name in header])
    body = _join(
        ["<tr>" + _join([f"<td>{escape(cell)}</td>" for cell in row]) + "</tr>" for row in rows]
    )
    return card(title, f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')


def _join(parts: Sequence[str]) -> str:
    return "".join(parts)

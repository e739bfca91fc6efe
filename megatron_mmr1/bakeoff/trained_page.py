"""Stage 2 as tables and pictures: parts of the page, and of the README beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from megatron_mmr1.bakeoff.digit_pools import MIXES
from megatron_mmr1.bakeoff.trained import BUDGET, LEARNING_RATES, REPORTED_SEEDS, TUNING_SEEDS
from megatron_mmr1.bakeoff.trained_analysis import Interval, Row
from megatron_mmr1.observability.plots import Series, line_chart
from megatron_mmr1.observability.template import card, legend_item, section

COLUMNS = (
    "arm", "learning rate", "accuracy, own mix", "minus uniform's", "cost ratio",
    "accuracy, frontier", "minus uniform's", "cost ratio", "mixed groups", "gradient norm",
    "coverage", "seeds", "crashed",
)  # fmt: skip


def words(num_finished: int, num_runs: int) -> str:
    """Say how it was done, and how far it is."""
    rates = ", ".join(f"{lr:g}" for lr in LEARNING_RATES)
    return (
        f"Every run may generate {BUDGET:,} responses, whatever for, from the same cold start. "
        f"Each arm's learning rate is the best of {rates} on {len(TUNING_SEEDS)} seeds that aren't "
        f"reported; reported are {len(REPORTED_SEEDS)} others. Intervals are 95%, bootstrap over "
        "seeds (somewhat narrow with six). Cost ratio: the responses to uniform's final accuracy, "
        "over uniform's; below 1 is fewer, inf is not within the budget. "
        f"{num_finished} of {num_runs} runs are finished."
    )


def cells(row: Row) -> list[str]:
    """Return a row of the table as text, in the order of COLUMNS."""
    mix, frontier = "own mix", "frontier"
    return [
        row.arm,
        f"{row.lr:g}",
        _points(row.final[mix]),
        _points(row.gain[mix]),
        str(row.cost[mix]),
        _points(row.final[frontier]),
        _points(row.gain[frontier]),
        str(row.cost[frontier]),
        f"{row.means['groups/mixed_rate']:.0%}",
        f"{row.means['grad_norm']:.2f}",
        f"{row.means['sampler/coverage']:.0%}",
        str(len(row.seeds)),
        str(row.num_crashed),
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Return a table for each pool."""
    parts = []
    for pool in MIXES:
        lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows if row.pool == pool]
        parts.append(f"### {pool} pool: {_mix_words(pool)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def html(rows: Sequence[Row], axis_X: np.ndarray, lead: str) -> str:
    """Return stage 2's section of the page."""
    cards = []
    for pool in MIXES:
        mine = [row for row in rows if row.pool == pool]
        for measure in ("own mix", "frontier"):
            series = [
                Series(row.arm, axis_X / 1000, row.curves_SX[measure].mean(axis=0), color)
                for color, row in enumerate(mine)
            ]
            if not series:
                continue
            legend = "".join(legend_item(s.name, s.color, f"{s.ys[-1]:.1%}") for s in series)
            chart = line_chart(
                series, is_percent=True, should_smooth=False, x_name="thousand responses"
            )
            note = f"Held-out accuracy, mean over seeds: {measure}."
            cards.append(card(f"{pool}: {measure}", chart, note, legend))
        head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row)) + "</tr>"
            for row in mine
        )
        cards.append(
            f'<details class="card wide" open><summary>Table: {pool}, {_mix_words(pool)}</summary>'
            f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div></details>'
        )
    content = f'<div class="grid">{"".join(cards)}</div>'
    return section("Stage 2: the real trainer on the embedded task", lead, content)


def _points(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _mix_words(pool: str) -> str:
    return ", ".join(f"{share:.0%} {name}" for name, share in MIXES[pool].items())

"""Stage 2 as a part of the page, and of the README beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from megatron_mmr1.bakeoff.intervals import Interval, difference, points
from megatron_mmr1.bakeoff.trained.analysis import (
    AXIS_X,
    GAINS,
    MEASURES,
    MIXED,
    Candidate,
    Result,
    Row,
    candidates,
    chosen_learning_rates,
    compare,
)
from megatron_mmr1.bakeoff.trained.pools import HELDOUT, MIXES, NUM_TRAIN
from megatron_mmr1.bakeoff.trained.runs import (
    BUDGET,
    CANDIDATES_LR,
    CANDIDATES_POOL,
    LEARNING_RATES,
    LEVEL_GIVEN,
    REPORTED_SEEDS,
    TUNING_SEEDS,
    reported_runs,
)
from megatron_mmr1.observability.plots import Series, line_chart
from megatron_mmr1.observability.template import card, legend_item, section

TITLE = "Stage 2: the real trainer on the embedded task"
HEADER = (
    *("arm", "learning rate", "accuracy: own mix, %", "minus uniform, points"),
    *("accuracy: frontier, %", "minus uniform, points", MIXED),
    *("gradient norm", "coverage, %", "seeds, crashed"),
)
COST_HEADER = ("arm", *(f"{measure}, {gain:.0%}" for measure in MEASURES for gain in GAINS))
COST_TITLE = "Cost ratio: responses to an accuracy, over uniform's; at this share of uniform's gain"

CANDIDATES_TITLE = (
    f"What the preset `posterior` was chosen from: {CANDIDATES_POOL} pool, learning rate"
    f" {CANDIDATES_LR:g}, tuning seeds"
)
CANDIDATES_HEADER = (
    *("settings", "own mix: second half, %", "at the end, %"),
    *("frontier: second half, %", "at the end, %", "seeds"),
)


def notes(results: Sequence[Result]) -> str:
    """Say how it was done, and how far it is."""
    rates = ", ".join(f"{lr:g}" for lr in LEARNING_RATES)
    reported = set(reported_runs(chosen_learning_rates(results)))
    num_finished = len(reported & {result.run for result in results})
    num_heldout = ", ".join(f"{number} {name}" for name, number in HELDOUT.items())
    return (
        f"Two pools of {NUM_TRAIN:,} prompts, sorted by what the cold start makes of them; every"
        f" run starts from it and may generate {BUDGET:,} responses, whatever for. Each arm's"
        f" learning rate is the best of {rates} (own mix, second half of the budget,"
        f" {len(TUNING_SEEDS)} seeds that aren't reported);"
        f' "{LEVEL_GIVEN}" has that of "posterior". {len(REPORTED_SEEDS)} reported seeds;'
        f" {num_finished} of {len(reported)} reported runs are there. Accuracy is sampled, 4"
        f" answers a prompt, on unseen prompts ({num_heldout}); the own mix weights the classes as"
        " the pool does. 95% intervals by Student's t, differences paired by seed; (null): the"
        " interval includes zero. A crashed run counts as its cold start. Cost ratios are of the"
        " mean curves, their intervals a bootstrap"
        " over seeds (somewhat narrow with six); below 1 is fewer responses, inf is not within the"
        " budget."
    )


def cells(row: Row) -> list[str]:
    """Return a row of the table as text, in the order of HEADER."""
    own, frontier = MEASURES
    is_uniform = row.arm == "uniform"
    return [
        row.arm,
        f"{row.lr:g}",
        points(row.final[own]),
        "-" if is_uniform else difference(row.above_uniform[own]),
        points(row.final[frontier]),
        "-" if is_uniform else difference(row.above_uniform[frontier]),
        f"{row.means[MIXED]:.0f}",
        f"{row.means['grad_norm']:.2f}",
        f"{100 * row.means['sampler/coverage']:.0f}",
        f"{row.num_seeds}, {row.num_crashed}",
    ]


def cost_cells(row: Row) -> list[str]:
    """Return a row of the table of cost ratios, in the order of COST_HEADER."""
    return [row.arm, *(_ratio(row.cost[m, gain]) for m in MEASURES for gain in GAINS)]


def candidate_cells(candidate: Candidate) -> list[str]:
    """Return a row of the table of candidates, in the order of CANDIDATES_HEADER."""
    accuracies = [
        f"{100 * of[m]:.1f}" for m in MEASURES for of in (candidate.late, candidate.final)
    ]
    return [candidate.name, *accuracies, str(candidate.num_seeds)]


def markdown(results: Sequence[Result]) -> str:
    """Return stage 2's part of the README."""
    rows = compare(results)
    parts = [f"## {TITLE}", _COMMANDS, notes(results)]
    for pool in MIXES:
        mine = [row for row in rows if row.pool == pool]
        others = [row for row in mine if row.arm != "uniform"]
        parts += [
            f"### {_title(pool)}",
            _markdown_table(HEADER, [cells(row) for row in mine]),
            f"{COST_TITLE}:",
            _markdown_table(COST_HEADER, [cost_cells(row) for row in others]),
        ]
    chosen = [candidate_cells(candidate) for candidate in candidates(results)]
    parts += [f"### {CANDIDATES_TITLE}", _markdown_table(CANDIDATES_HEADER, chosen)]
    return "\n\n".join(parts) + "\n"


def html(results: Sequence[Result]) -> str:
    """Return stage 2's section of the page."""
    rows = compare(results)
    cards, tables = [], []
    for pool in MIXES:
        mine = [row for row in rows if row.pool == pool]
        if not mine:
            continue
        cards += [_curve_card(pool, measure, mine) for measure in MEASURES]
        others = [row for row in mine if row.arm != "uniform"]
        tables.append(
            f'<details class="card wide" open><summary>Table: {_title(pool)}</summary>'
            f"{_html_table(HEADER, [cells(row) for row in mine])}"
            f'<p class="note">{escape(COST_TITLE)}:</p>'
            f"{_html_table(COST_HEADER, [cost_cells(row) for row in others])}</details>"
        )
    chosen = [candidate_cells(candidate) for candidate in candidates(results)]
    tables.append(
        f'<details class="card wide"><summary>{escape(CANDIDATES_TITLE)}</summary>'
        f"{_html_table(CANDIDATES_HEADER, chosen)}</details>"
    )
    content = f'<div class="grid">{"".join(cards)}</div>{"".join(tables)}'
    return section(TITLE, notes(results), content)


_COMMANDS = (
    "    python tools/compare_samplers.py trained --cold-start outputs/digits_sft/demo/hf\n\n"
    "Hours on two cores; interrupt and start it again at will, or run it twice at once."
)


def _curve_card(pool: str, measure: str, rows: Sequence[Row]) -> str:
    series = [
        Series(row.arm, AXIS_X / 1000, row.curves[measure], color) for color, row in enumerate(rows)
    ]
    legend = "".join(legend_item(s.name, s.color, f"{np.asarray(s.ys)[-1]:.1%}") for s in series)
    chart = line_chart(series, is_percent=True, should_smooth=False, x_name="thousand responses")
    return card(f"{pool}: {measure}", chart, "Held-out accuracy, mean over seeds.", legend)


def _title(pool: str) -> str:
    mix = ", ".join(f"{share:.0%} {name}" for name, share in MIXES[pool].items())
    return f"{pool.capitalize()} pool: {mix}"


def _ratio(interval: Interval) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'

"""The study's result in a folder: study.json, and README.md and index.html made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mmr1.bakeoff.formats.runs import ARMS, EVALUATED_EVERY, NUM_STEPS, read_rows
from megatron_mmr1.bakeoff.intervals import Interval, difference, mean_interval, points
from megatron_mmr1.observability import template
from megatron_mmr1.observability.plots import Series, line_chart

TITLE = "FP8 on the tiny model, emulated on a CPU"
# Of every step; the first is measured on held-out prompts at some steps only.
CURVES = ("eval/accuracy_sampled", "reward/mean", "logprob_diff/mean")
_ERRORS = {
    "logprob/mean": "log-prob error: mean",
    "logprob/p99": "99th percentile",
    "logprob/max": "largest",
    "gradient/relative": "gradient: relative error",
    "gradient/cosine": "cosine",
    "decoder/relative": "of the rounded layers: relative error",
}
_NOTES = f"""
What is emulated, and what is not, is in the docstring of
`megatron_mmr1/backend/fp8_emulation.py`: the inputs of the decoder's linear layers' products are
rounded (E4M3 forward, E5M2 for gradients), with the scalings of the three recipes; everything
else is bfloat16, as on a GPU. The model has 0.9M parameters, 4 layers and a hidden size of 128,
so that the blockwise recipe has one block a row, and it starts from a cold start that is not sure
of its answers: sizes of errors say little of a 7B model. No FP8 was computed on a GPU.

Rollouts come from vLLM in the policy's dtype (float32, else bfloat16), as beside real FP8
training. Each run is {NUM_STEPS} steps of 32 x 8 responses of the digits experiment; arms of a
seed share cold start, prompts and random seeds. Intervals are 95%, over seeds, by Student's t;
"(null)" where zero is inside. With so few seeds they are wide: a difference below them can't be
seen here.

Made by `python tools/study_fp8.py`; raw numbers in `study.json`.
"""


_FORWARD_NOTE = """
The last two rows round one direction alone: they say which of the roundings an error comes from.
Most tokens have a probability near 1 here, so that the gradient rests on a few unlikely ones; that
those are what the forward rounding turns is a guess.
"""


def write(
    out: Path, folder: Path, errors: Mapping[str, Sequence[Mapping[str, float]]], num_seeds: int
) -> None:
    """Write the three files."""
    curves = {
        arm: {
            name: [_values(read_rows(folder, arm, seed), name) for seed in range(num_seeds)]
            for name in CURVES
        }
        for arm in ARMS
    }
    study = {"num_seeds": num_seeds, "errors": errors, "curves": curves}
    (out / "study.json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(markdown(study), encoding="utf-8")
    (out / "index.html").write_text(html(study), encoding="utf-8")


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (step, value) where a metric was measured."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def markdown(study: Mapping[str, Any]) -> str:
    """Write the README."""
    return (
        f"# {TITLE}\n{_NOTES}\n"
        "## Errors at equal weights on equal responses, against float32\n\n"
        "The responses of the first step of each cold start, one value each: a mean would hide "
        "how much they differ.\n\n"
        f"{_table(('format', *_ERRORS.values()), _error_rows(study))}\n"
        f"{_FORWARD_NOTE}\n"
        f"## Learning: {study['num_seeds']} seed{'s' * (study['num_seeds'] > 1)}\n\n"
        f"{_table(_LEARNING, _learning_rows(study))}\n"
        f"{_verdict(study)}\n"
    )


_LEARNING = (
    *("format", "held-out accuracy at the end, %", "minus bfloat16, points"),
    *("mean reward, last 10 steps", "minus bfloat16", "trainer - engine log-prob, mean"),
)


def _error_rows(study: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (arm, *(", ".join(f"{row[name]:.2g}" for row in rows) for name in _ERRORS))
        for arm, rows in study["errors"].items()
    ]


def _learning_rows(study: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for arm in ARMS:
        accuracy, reward = _ends(study, arm, CURVES[0], 1), _ends(study, arm, CURVES[1], 10)
        apart = _ends(study, arm, CURVES[2], NUM_STEPS)
        is_base = arm == "bfloat16"
        base_accuracy = _ends(study, "bfloat16", CURVES[0], 1)
        base_reward = _ends(study, "bfloat16", CURVES[1], 10)
        mean = mean_interval(reward)
        rows.append(
            (
                arm,
                points(mean_interval(accuracy)),
                "-" if is_base else _in_points(mean_interval(accuracy - base_accuracy)),
                _plain(mean, "{:.3f}"),
                "-" if is_base else _plain(mean_interval(reward - base_reward), "{:+.3f}"),
                f"{apart.mean():.2e}",
            )
        )
    return rows


def _in_points(interval: Interval) -> str:
    """A single seed has no interval, and proves nothing."""
    return points(interval, is_signed=True) if np.isnan(interval.low) else difference(interval)


def _plain(interval: Interval, form: str) -> str:
    value, low, high = (form.format(x) for x in interval)
    if np.isnan(interval.low):
        return value
    is_difference = "+" in form
    return f"{value} [{low}, {high}]{' (null)' * (is_difference and interval.is_null)}"


def _ends(study: Mapping[str, Any], arm: str, name: str, last: int) -> np.ndarray:
    """Return each seed's mean over the last values of a curve."""
    curves = study["curves"][arm][name]
    return np.array([np.mean([value for _, value in curve[-last:]]) for curve in curves])


def _verdict(study: Mapping[str, Any]) -> str:
    if study["num_seeds"] < 2:
        return "One seed so far: no interval, and nothing to conclude about learning."
    base = _ends(study, "bfloat16", CURVES[0], 1)
    differing = [
        arm
        for arm, what in ARMS.items()
        if what.recipe and not mean_interval(_ends(study, arm, CURVES[0], 1) - base).is_null
    ]
    if differing:
        return f"Held-out accuracy differs from bfloat16's for: {', '.join(differing)}."
    return (
        "No recipe's held-out accuracy can be told from bfloat16's on these seeds: a null result, "
        "within the intervals."
    )


def html(study: Mapping[str, Any]) -> str:
    """Write the page: the same tables, and the curves."""
    words = {
        "eval/accuracy_sampled": ("Held-out accuracy, sampled", True),
        "reward/mean": ("Mean reward of the step's responses", False),
    }
    cards = ""
    for name, (title, is_percent) in words.items():
        series = [
            Series(arm, xs, ys, color)
            for color, arm in enumerate(ARMS)
            for xs, ys in [_mean_curve(study, arm, name)]
        ]
        legend = "".join(template.legend_item(s.name, s.color) for s in series)
        chart = line_chart(series, is_percent=is_percent, should_smooth=False)
        cards += template.card(title, chart, f"Mean of {study['num_seeds']} seeds.", legend)
    lead = f"Evaluated every {EVALUATED_EVERY} steps. The README beside this page has the numbers."
    body = template.section("Learning", lead, f'<div class="grid">{cards}</div>')
    return template.page(TITLE, f"<h1>{TITLE}</h1>{body}")


def _mean_curve(study: Mapping[str, Any], arm: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    curves = np.array(study["curves"][arm][name])
    return curves[0, :, 0], curves[:, :, 1].mean(axis=0)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

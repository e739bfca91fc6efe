"""The report's view of the sampler: what groups were made of, and how prompt scores moved."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from megatron_mmr1.observability.calibration import reliability_plot
from megatron_mmr1.observability.plots import stacked_area
from megatron_mmr1.observability.report_curves import curve_card
from megatron_mmr1.observability.run_records import RunRecords
from megatron_mmr1.observability.template import card, empty, legend_item
from megatron_mmr1.observability.vps_plots import (
    bin_edges,
    bin_of,
    heat_map,
    histogram,
    share_within_one_bin,
    shown_updates,
    transition_counts,
)


def sampling_cards(run: RunRecords) -> str:
    """Group composition, the sampler's own metrics, VPS histograms and transitions."""
    mixed = run.series("groups/mixed_rate", "share of groups")
    predicted = run.series("sampler/mixed_predicted", "predicted of those drawn", 2)
    curves = [mixed, predicted] if len(predicted.xs) else [mixed]
    cards = [
        curve_card("Mixed groups", curves, run.why_empty(), is_percent=True),
        _composition_card(run),
        _cost_card(run),
        _calibration_card(run),
    ]
    for key in run.keys("sampler/"):
        if key in ("sampler/mixed_predicted", "sampler/mixed_seen"):
            continue  # drawn above
        series = run.series(key)
        if np.isfinite(series.ys).any():
            name = key.removeprefix("sampler/").replace("_", " ").replace("vps", "VPS")
            cards.append(curve_card(f"Sampler: {name}", [series], ""))
    return f'<div class="grid">{"".join(cards)}{_vps_cards(run)}</div>'


def _cost_card(run: RunRecords) -> str:
    """Responses that were generated and not trained on, where there were any."""
    names = {
        "rollout/scoring_responses": "only to score prompts",
        "rollout/discarded_responses": "without variance, discarded",
    }
    series = [run.series(key, name, color) for color, (key, name) in enumerate(names.items())]
    series = [s for s in series if len(s.xs) and s.ys.any()]
    if not series:
        return ""
    return curve_card("Responses that were not trained on", series, "", from_zero=True)


def _calibration_card(run: RunRecords) -> str:
    if run.calibration is None or not run.calibration.any():
        return ""
    note = (
        "Across: predicted chance that a drawn group is mixed, in ten bins. Up: share that was, "
        "with its 95% interval. On the diagonal a prediction means what it says."
    )
    return card("Is the sampler calibrated?", reliability_plot(run.calibration), note)


def _composition_card(run: RunRecords) -> str:
    series = [
        run.series("groups/mixed_rate", "mixed", 0),
        run.series("groups/all_correct_rate", "all correct", 2),
        run.series("groups/all_wrong_rate", "all wrong", 6),
    ]
    if len({tuple(s.xs) for s in series}) != 1 or len(series[0].xs) < 2:
        return ""  # an area needs two steps and all three rates
    legend = "".join(
        legend_item(s.name, s.color, f"{s.ys[-1]:.0%}" if np.isfinite(s.ys[-1]) else "-")
        for s in series
    )
    return card("What groups are made of", stacked_area(series), legend=legend)


def _vps_cards(run: RunRecords) -> str:
    title = "VPS of the training prompts"
    stats = run.prompt_stats
    if not len(stats["step"]):
        words = "No prompt statistics were recorded."
        return card(title, empty(words), kind="wide")
    is_measured = np.isfinite(stats["vps"]) & np.isfinite(stats["pass_rate"])
    if not is_measured.any():
        return card(title, empty("No prompt had been measured at any update."), kind="wide")
    edges = bin_edges(stats["vps"][is_measured])
    updates = shown_updates(stats["step"][is_measured])
    measured = {step: is_measured & (stats["step"] == step) for step in updates}
    return _histograms(stats, measured, edges) + _transitions(stats, measured, edges)


def _histograms(
    stats: dict[str, np.ndarray], measured: dict[int, np.ndarray], edges: np.ndarray
) -> str:
    counts = [np.bincount(bin_of(stats["vps"][rows], edges)) for rows in measured.values()]
    highest = max(float(c.max() / c.sum()) for c in counts)
    plots = []
    for step, rows in measured.items():
        num_prompts = int((stats["step"] == step).sum())
        words = f"<b>Step {step}</b> · {rows.sum():,} of {num_prompts:,} measured"
        plot = histogram(stats["vps"][rows], edges, highest)
        plots.append(f'<div><p class="label">{words}</p>{plot}</div>')
    note = (
        "Across: VPS, in the same 10 bins everywhere. Up: share of the prompts measured by then; a "
        "prompt that was never drawn is left out, because its score is only the prior."
    )
    grid = f'<div class="small-grid">{"".join(plots)}</div>'
    return card("VPS of the training prompts, over updates", grid, note, kind="wide")


def _transitions(
    stats: dict[str, np.ndarray], measured: dict[int, np.ndarray], edges: np.ndarray
) -> str:
    title = "How prompts move between VPS bins"
    scores = {
        step: dict(zip(stats["prompt_id"][rows], stats["vps"][rows], strict=True))
        for step, rows in measured.items()
    }
    plots = []
    for earlier, later in pairwise(scores):
        counts = transition_counts(scores[earlier], scores[later], edges)
        if not counts.any():
            continue
        words = f"<b>Step {earlier} to {later}</b> · {counts.sum():,} prompts"
        stayed = f"{share_within_one_bin(counts):.0%} stayed within one bin"
        plots.append(
            f'<div><p class="label">{words}<br>{stayed}</p>{heat_map(counts, edges)}</div>'
        )
    if not plots:
        words = "Transitions need two updates that measured the same prompts."
        return card(title, empty(words), kind="wide")
    note = (
        "Up: VPS bin at the earlier update. Across: bin at the later one. A cell is the chance, in "
        "percent, of moving there; each row adds up to 100, and a cell below 10 carries no number. "
        "A prompt on the rising diagonal kept its score. Counted: prompts measured at both updates."
    )
    grid = f'<div class="small-grid four">{"".join(plots)}</div>'
    return card(title, grid, note, kind="wide")

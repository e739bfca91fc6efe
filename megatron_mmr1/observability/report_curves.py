"""The report's curves over steps: learning, health, time."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import numpy as np

from megatron_mmr1.observability.plots import (
    Series,
    line_chart,
    show,
)
from megatron_mmr1.observability.run_records import RunRecords
from megatron_mmr1.observability.template import card, empty, legend_item
from megatron_mmr1.observability.timers import PARTS_OF_TRAIN

PHASE_COLORS = {
    "rollout": 0,
    "reward": 3,
    "forward": 1,
    "backward": 6,
    "logprobs": 3,
    "turns": 4,
    "weight_sync": 2,
    "sampler": 4,
    "evaluation": 6,
    "checkpoint": 5,
}


def learning_cards(run: RunRecords) -> str:
    """Reward, held-out accuracy, and accuracy a category before and after."""
    accuracy = [
        run.series("eval/accuracy_sampled", "sampled", 0),
        run.series("eval/accuracy_greedy", "greedy", 1),
    ]
    cards = [
        curve_card(
            "Held-out accuracy",
            accuracy,
            "No held-out evaluation was recorded.",
            is_percent=True,
            should_smooth=False,
        ),
    ]
    reward = run.series("reward/mean", "mean")
    if not len(reward.xs) and len(run.series("loss").xs):
        cards.insert(0, curve_card("Loss", [run.series("loss")], ""))  # a cold start has no reward
    else:
        cards.insert(0, curve_card("Reward", [reward], run.why_empty()))
    rates = [
        run.series("groups/pass_rate", "correct", 0),
        run.series("reward/format_rate", "well formed", 2),
    ]
    if any(len(s.xs) for s in rates):
        cards.append(curve_card("Training responses", rates, "", is_percent=True))
    return f'<div class="grid">{"".join(cards)}{_categories_card(run)}</div>'


def health_cards(run: RunRecords) -> str:
    """Gradient norm and log-probability difference always; the others where recorded."""
    none = run.why_empty()
    difference = [
        run.series("logprob_diff/mean", "mean", 0),
        run.series("logprob_diff/max", "max", 1),
    ]
    cards = [
        curve_card("Gradient norm", [run.series("grad_norm")], none, from_zero=True),
        curve_card(
            "Trainer vs rollout log-prob",
            difference,
            none,
            "Absolute, on the same sampled tokens, in nats; log scale. It should stay flat.",
            is_log=True,
        ),
    ]
    optional = [
        ("Entropy", "entropy/mean", False, "Nats a token. At zero nothing new is tried."),
        ("KL to the reference", "kl/mean", False, "Distance from the model before training."),
        ("Response length", "rollout/response_tokens_mean", False, "Mean tokens a response."),
        ("Truncated responses", "rollout/truncated_rate", True, "Cut at the length limit."),
    ]
    optimizer_steps = run.config_value("algorithm.optimizer_steps_per_batch")
    if optimizer_steps is not None and optimizer_steps > 1:
        clip = ("Clip fraction", "clip_fraction", True, "Tokens whose ratio left the trust region.")
        optional.insert(0, clip)
    for title, key, is_percent, note in optional:
        if len(run.series(key).xs):
            chart = curve_card(
                title, [run.series(key)], none, note, is_percent=is_percent, from_zero=True
            )
            cards.append(chart)
    unjudged = run.series("verdicts/could_not_judge", "responses")
    if np.nansum(unjudged.ys) > 0:
        note = "Responses the verifier could not judge; they have no reward and carry no loss."
        chart = curve_card(
            "Could not judge", [unjudged], "", note, from_zero=True, should_smooth=False
        )
        cards.append(chart)
    return f'<div class="grid">{"".join(cards)}</div>'


def curve_card(
    title: str,
    series: list[Series],
    words: str,
    note: str = "",
    is_percent: bool = False,
    is_log: bool = False,
    from_zero: bool = False,
    should_smooth: bool = True,
) -> str:
    """One titled chart with last values in its legend, or `words` when there is nothing to draw."""
    series = [s for s in series if np.isfinite(s.ys).any()]
    if not series:
        return card(title, empty(words or "Not recorded."))
    legend = "".join(
        legend_item(s.name, s.color, show(_last(s), is_percent))
        if len(series) > 1
        else f"<span>last <b>{show(_last(s), is_percent)}</b></span>"
        for s in series
    )
    chart = line_chart(series, is_percent, is_log, from_zero, should_smooth)
    return card(title, chart, note, legend)


def _last(series: Series) -> float:
    return float(series.ys[np.isfinite(series.ys)][-1])


def _categories_card(run: RunRecords) -> str:
    sampled, greedy = "eval/accuracy_sampled/", "eval/accuracy_greedy/"
    names = {key.removeprefix(p) for p in (sampled, greedy) for key in run.keys(p)}
    if not names:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name) or '(none)'}</td>{_before_after(run.series(sampled + name))}"
        f"{_before_after(run.series(greedy + name), has_track=False)}</tr>"
        for name in sorted(names, key=_natural)
    )
    head = (
        '<tr><th>Category</th><th>Sampled: from 0% to 100%</th><th class="num">before</th>'
        '<th class="num">after</th><th class="num">gain</th><th class="num">greedy before</th>'
        '<th class="num">after</th><th class="num">gain</th></tr>'
    )
    legend = legend_item("first evaluation", 5) + legend_item("last evaluation", 0)
    table = f'<div class="scroll"><table>{head}{rows}</table></div>'
    return card("Held-out accuracy by category", table, legend=legend, kind="wide")


def _before_after(series: Series, has_track: bool = True) -> str:
    ys = series.ys[np.isfinite(series.ys)]
    if not len(ys):
        return ('<td class="range"></td>' if has_track else "") + '<td class="num">-</td>' * 3
    first, last = float(ys[0]), float(ys[-1])
    gain = (last - first) * 100
    sign = "up" if gain > 0 else "down" if gain < 0 else ""
    low, high = sorted((first * 100, last * 100))
    track = (
        f'<td class="range"><div class="track"><span class="gain swatch '
        f'{"c0" if gain >= 0 else "c6"}" style="left:{low:.1f}%;width:{high - low:.1f}%"></span>'
        f'<span class="before" style="left:{first * 100:.1f}%"></span>'
        f'<span class="after" style="left:{last * 100:.1f}%"></span></div></td>'
    )
    numbers = f'<td class="num">{show(first, True)}</td><td class="num">{show(last, True)}</td>'
    return (track if has_track else "") + f'{numbers}<td class="num {sign}">{gain:+.1f}</td>'


def _natural(name: str) -> list[tuple[int, str]]:
    """Order "level 2" before "level 10"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def time_cards(run: RunRecords) -> str:
    """Total time a phase, and generation speed."""
    cards = [card("Time by phase", _phases(run), kind="wide")]
    for title, key in (
        ("Rollout tokens a second", "rollout/tokens_per_s"),
        ("Tokens a second", "tokens_per_s"),
        ("Seconds a step", "time/step_s"),
    ):
        if len(run.series(key).xs):
            cards.append(curve_card(title, [run.series(key)], "", from_zero=True))
    return f'<div class="grid">{"".join(cards)}</div>'


def _rest_of_train(row: dict[str, Any]) -> float:
    """Return what a step's parts leave of its training phase; not every step has all parts."""
    return row["time/train_s"] - sum(row.get(f"time/{name}_s") or 0.0 for name in PARTS_OF_TRAIN)


def _phases(run: RunRecords) -> str:
    seconds = {}
    for key in run.keys("time/"):
        if key != "time/step_s":
            seconds[key.removeprefix("time/").removesuffix("_s")] = run.series(key).ys
    if "train" in seconds:
        del seconds["train"]
        trained = [row for row in run.rows if row.get("time/train_s")]
        seconds["train (rest)"] = np.array([_rest_of_train(row) for row in trained])
    totals = {name: float(np.nansum(ys)) for name, ys in seconds.items()}
    whole = sum(totals.values())
    if whole <= 0:
        return empty("No phase times were recorded.")
    bar, rows = "", ""
    for name, total in sorted(totals.items(), key=lambda item: -item[1]):
        color = PHASE_COLORS.get(name, 5)
        share = total / whole
        title = f"{escape(name)} {share:.1%}"
        bar += f'<span class="swatch c{color}" style="width:{share:.2%}" title="{title}"></span>'
        rows += (
            f"<tr><td>{legend_item(name.replace('_', ' '), color)}</td>"
            f'<td class="num">{share:.1%}</td><td class="num">{total:,.1f}</td>'
            f'<td class="num">{show(float(np.nanmedian(seconds[name])))}</td>'
            f'<td class="num">{len(seconds[name]):,}</td></tr>'
        )
    head = (
        '<tr><th>Phase</th><th class="num">share</th><th class="num">seconds in all</th>'
        '<th class="num">median, s</th><th class="num">times</th></tr>'
    )
    return f'<div class="shares">{bar}</div><div class="scroll"><table>{head}{rows}</table></div>'

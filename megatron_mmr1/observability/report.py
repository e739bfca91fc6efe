"""`report.html`: one run on one page, self-contained, for a person who has not seen the run.

This file owns the page's order and its headline; the parts are in `report_curves`,
`report_sampling` and `report_rollouts`. Whatever comes from a file is escaped before it enters
the page.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from megatron_mmr1.observability.files import replacing
from megatron_mmr1.observability.plots import Series, show, smoothing_window, sparkline
from megatron_mmr1.observability.report_curves import health_cards, learning_cards, time_cards
from megatron_mmr1.observability.report_rollouts import rollout_cards
from megatron_mmr1.observability.report_sampling import sampling_cards
from megatron_mmr1.observability.run_records import RunRecords, read_run
from megatron_mmr1.observability.template import page, section


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` from what the run has recorded so far, and return its path."""
    run = read_run(Path(run_dir))
    title = run.config_value("experiment") or run.run_dir.resolve().name
    body = (
        _header(run, title)
        + section(
            "Is it learning?",
            "Reward on training prompts, and accuracy on held-out problems it never trains on."
            + _how_to_read_curves(run),
            learning_cards(run),
        )
        + section(
            "Is it healthy?",
            "Trouble shows here first: gradients that jump, entropy that collapses, a trainer and "
            "a rollout engine that disagree about the same tokens.",
            health_cards(run),
        )
        + section(
            "Which prompts teach?",
            "Only a mixed group, with right and wrong responses, has something to learn from. VPS, "
            "the variance promotion score, is the sampler's estimate of who will give such groups.",
            sampling_cards(run),
        )
        + section("Where does the time go?", "Wall-clock time of each phase.", time_cards(run))
        + section(
            "What does it say?",
            "The first groups of the last and of the first recorded step, as sampled.",
            rollout_cards(run.run_dir),
        )
        + section("Everything else", "", _metrics_table(run) + _config_details(run))
    )
    path = run.run_dir / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page(title, body), encoding="utf-8", errors="replace")
    return path


def _header(run: RunRecords, title: str) -> str:
    details = [run.run_dir.resolve().name]
    if path := run.config_value("model.path"):
        details.append(f"model {Path(str(path)).name}")
    sizes = [(axis, run.config_value(f"parallel.{axis}_size")) for axis in ("tp", "pp", "cp")]
    details += [f"{axis.upper()} {size}" for axis, size in sizes if size and size != 1]
    tiles = [
        _accuracy_tile(run, "sampled"),
        _accuracy_tile(run, "greedy"),
        _tile("Steps", _steps(run), _step_size(run)),
        _tile("Time", *_duration(run)),
        _tile("Sampler", *_sampler(run)),
    ]
    sub = " · ".join(escape(str(detail)) for detail in details)
    return (
        f'<header><h1>{escape(str(title))}</h1><p class="sub">{sub}</p></header>'
        f'<div class="tiles">{"".join(tiles)}</div>'
    )


def _how_to_read_curves(run: RunRecords) -> str:
    window = smoothing_window(run.num_steps())
    if window == 1:
        return ""
    return f" Noisy curves are drawn twice: thin, each step; bold, the mean of {window} steps."


def _tile(label: str, value: str, sub: str, kind: str = "") -> str:
    return (
        f'<div class="card {kind}"><div class="label">{escape(label)}</div>'
        f'<div class="value">{value}</div><div class="note">{sub}</div></div>'
    )


def _accuracy_tile(run: RunRecords, mode: str) -> str:
    label = f"Held-out accuracy, {mode}"
    accuracy = finite(run.series(f"eval/accuracy_{mode}"))
    if not len(accuracy.xs):
        return _tile(label, "-", "not evaluated", "wider")
    first, last, best = accuracy.ys[0], accuracy.ys[-1], int(accuracy.ys.argmax())
    best_words = f"best {show(accuracy.ys[best], True)} at step {accuracy.xs[best]:.0f}"
    if len(accuracy.xs) == 1:
        words = f"one evaluation, at step {accuracy.xs[0]:.0f}"
        return _tile(label, show(last, True), words, "wider")
    gain = (last - first) * 100
    value = f'<span class="from">{show(first, True)} →</span> {show(last, True)}'
    colored = f'<b class="{"up" if gain >= 0 else "down"}">{gain:+.1f} points</b>'
    steps = f"step {accuracy.xs[0]:.0f} to {accuracy.xs[-1]:.0f}"
    return _tile(label, value, f"{colored} from {steps}, {best_words}", "wider")


def finite(series: Series) -> Series:
    """Leave out the points that are not finite."""
    keep = np.isfinite(series.ys)
    return Series(series.name, series.xs[keep], series.ys[keep], series.color)


def _steps(run: RunRecords) -> str:
    planned = run.config_value("num_steps")
    done = run.num_steps()
    is_partial = isinstance(planned, int) and done < planned
    return f'{done:,}<span class="from"> of {planned:,}</span>' if is_partial else f"{done:,}"


def _step_size(run: RunRecords) -> str:
    prompts = run.config_value("prompts_per_step")
    group = run.config_value("rollout.group_size")
    return escape(f"{prompts} prompts x {group} responses") if prompts and group else ""


def _duration(run: RunRecords) -> tuple[str, str]:
    """Add up time/step_s; a line without it (the evaluation before training) counts its phases."""
    total = 0.0
    for row in run.rows:
        phases = [value or 0.0 for key, value in row.items() if key.startswith("time/")]
        total += row.get("time/step_s") or sum(phases)
    steps = finite(run.series("time/step_s")).ys
    words = f"{show(float(np.median(steps)))} s a step (median)" if len(steps) else "not recorded"
    if total < 60:
        return f"{total:.0f} s", words
    return (f"{total / 60:,.1f} min" if total < 3 * 3600 else f"{total / 3600:,.1f} h"), words


def _sampler(run: RunRecords) -> tuple[str, str]:
    preset, seed = run.config_value("sampler.preset"), run.config_value("seed")
    details = [] if seed is None else [f"seed {seed}"]
    for name, key in (("lambda", "mixture_ratio"), ("score", "score"), ("prior", "prior")):
        value = run.config_value(f"sampler.{key}")
        if value is not None:
            details.append(f"{name} {value}")
    return escape(str(preset or "-")), escape(", ".join(details))


def _metrics_table(run: RunRecords) -> str:
    cells = []
    for key in sorted(run.keys()):
        ys = finite(run.series(key)).ys
        if len(ys):
            numbers = (ys[0], ys[-1], ys.min(), ys.max())
            columns = "".join(f'<td class="num">{show(float(n))}</td>' for n in numbers)
            cells.append(f"<tr><td>{escape(key)}</td><td>{sparkline(ys)}</td>{columns}</tr>")
    names = ("first", "last", "lowest", "highest")
    head = "<th>Metric</th><th></th>" + "".join(f'<th class="num">{name}</th>' for name in names)
    return (
        f'<details class="card"><summary>All {len(cells)} metrics</summary><div class="scroll">'
        f"<table><tr>{head}</tr>{''.join(cells)}</table></div></details>"
    )


def _config_details(run: RunRecords) -> str:
    config = escape(run.config_text) or "This run folder holds no config.yaml."
    return f'<details class="card"><summary>Resolved config</summary><pre>{config}</pre></details>'

"""The comparison with TRL as tables in markdown."""

from __future__ import annotations

import statistics
from typing import Any

from megatron_mmr1.throughput.tables import table
from megatron_mmr1.throughput.trl.compare import OURS

NAMES = {
    "digits": "training step, tiny Qwen2.5-VL with images",
    "larger": "training step, Qwen2 of 8 layers and hidden size 256",
    "whole": "whole step with a vLLM engine in the process, tiny Qwen2.5-VL",
}


def markdown(record: dict[str, Any]) -> str:
    """Return a table of sides and a table of ratios."""
    sides, outcomes, notes = [], [], []
    for name, result in record["results"].items():
        notes += [
            f"- {NAMES[name]}: TRL, {g}: {why}" for g, why in result.get("failures", {}).items()
        ]
        if "turns" not in result:
            continue
        sides += [side_row(name, result, label) for label in result["turns"]]
        outcomes.append(ratio_row(name, result))
    header = ("what", "side", "tokens/s, wall", "tokens/s, CPU", "seconds", "positions a token")
    parts = [
        table(header, sides),
        table(("what", "against", "ratio, wall (min to max)", "ratio, CPU (min to max)"), outcomes),
    ]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def side_row(name: str, result: dict[str, Any], label: str) -> tuple[str, ...]:
    """Return a side's medians over its turns."""
    turns, phase = result["turns"][label], result["phase"]
    seconds = [turn[f"{phase}_s"] for turn in turns]
    wall = statistics.median(turn["tokens"] / turn[f"{phase}_s"] for turn in turns)
    cpu = statistics.median(turn["tokens"] / turn[f"{phase}_cpu_s"] for turn in turns)
    positions = [turn["positions"] / turn["tokens"] for turn in turns if "positions" in turn]
    return (
        NAMES[name],
        label,
        f"{wall:,.0f}",
        f"{cpu:,.0f}",
        f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
        f"{statistics.median(positions):.2f}" if positions else "-",
    )


def ratio_row(name: str, result: dict[str, Any]) -> tuple[str, ...]:
    """Return the ratio to the best of TRL's sides, by CPU seconds."""
    label = best_of_trl(result)
    shown = [
        f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"
        for found in (result["ratios"][label][clock] for clock in ("wall", "cpu"))
    ]
    return NAMES[name], label, *shown


def best_of_trl(result: dict[str, Any]) -> str:
    """Return the TRL side that is fastest by CPU seconds: the ratio to it is the smallest."""
    labels = [label for label in result["turns"] if label != OURS]
    return min(labels, key=lambda label: result["ratios"][label]["cpu"]["median"])

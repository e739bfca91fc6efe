"""A record as text: tables in markdown, for a terminal and for a README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_mmr1.throughput import summary
from megatron_mmr1.throughput.summary import Spread

HEADER = (
    "layout", "processes", "tokens/s/GPU", "min to max", "generated/s/GPU", "MFU, training",
    "MFU, step", "seconds a step", "memory, GiB",
)  # fmt: skip
DEFINITIONS = (
    "Tokens are prompt and response tokens of every sequence that is trained on, over the seconds "
    "of the whole step and the number of processes (one GPU each, or one on a CPU). Generated "
    "tokens are those of the responses, over the seconds of the rollout. MFU counts the model "
    "FLOPs of training, log-prob passes among them: in training over the seconds of the training "
    "phase, in the step over all its seconds; generation's FLOPs are left out of both. Memory is "
    "the most of any process: on a GPU all that is taken of it when a phase begins or ends, on a "
    "CPU what was ever resident. Other numbers are medians over the measured steps; seconds are "
    "means over processes."
)


def markdown(record: dict[str, Any]) -> str:
    """Return all tables of a record."""
    measured = [entry for entry in record["points"] if "steps" in entry]
    refused = [entry for entry in record["points"] if "error" in entry]
    parts = [table(HEADER, [row(entry) for entry in measured])] if measured else []
    if measured:
        parts.append(table(*phase_rows(measured)))
    if scaling := scaling_rows(measured):
        parts.append(table(("scaling", "processes", "tokens/s/GPU", "of the first"), scaling))
    if refused:
        rows = [(e["label"], str(e["processes"]), e["error"]) for e in refused]
        parts.append(table(("not measured", "processes", "why"), rows))
    return "\n\n".join(parts)


def row(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return one entry's numbers, as `HEADER` names them."""
    tokens = summary.tokens_per_s_per_gpu(entry)
    seconds = Spread.of([step["seconds"]["step"] for step in entry["steps"]])
    return (
        entry["label"],
        str(entry["processes"]),
        f"{tokens.median:,.0f}",
        f"{tokens.low:,.0f} to {tokens.high:,.0f}",
        f"{summary.generated_per_s_per_gpu(entry).median:,.0f}",
        f"{summary.train_mfu(entry).median:.1%}",
        f"{summary.step_mfu(entry).median:.1%}",
        f"{seconds.median:.2f}",
        f"{summary.memory_bytes(entry) / 2**30:.2f}",
    )


def phase_rows(measured: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows: a phase each, median (min to max) seconds of every entry."""
    of_entries = [summary.phase_seconds(entry) for entry in measured]
    names = list(dict.fromkeys(name for phases in of_entries for name in phases))
    rows = [
        (
            summary.WORDS.get(name, name),
            *(_seconds(phases[name]) if name in phases else "-" for phases in of_entries),
        )
        for name in names
    ]
    return ("seconds", *(entry["label"] for entry in measured)), rows


def scaling_rows(measured: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return weak and strong scaling, each against its smallest number of processes."""
    rows = []
    for kind in ("weak", "strong"):
        entries = sorted(
            (entry for entry in measured if entry["kind"] == kind), key=lambda e: e["processes"]
        )
        shares = summary.efficiency(entries) if entries else []
        for entry, share in zip(entries, shares, strict=True):
            tokens = summary.tokens_per_s_per_gpu(entry).median
            rows.append((kind, str(entry["processes"]), f"{tokens:,.0f}", f"{share:.0%}"))
    return rows


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})"

"""Gives both sides their turns and compares what they say."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mmr1.throughput.trl.turn import Side

_MODULE = "megatron_mmr1.throughput.trl"
OURS = "ours"
# TRL divides advantages by std + 1e-4 where we have 1e-6, and rewards deviate by about 0.8; float32
# sums come in another order.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Entrant:
    """A side to be measured.

    Attributes:
        label: what tables call it; `OURS` is the one that the others are compared with.
        module: arguments of `python -m`.
    """

    label: str
    module: tuple[str, ...]


def training_entrants(
    case: str, folder: Path, max_tokens: int, batch_sizes: Sequence[int]
) -> list[Entrant]:
    """Ours, packed into micro-batches of `max_tokens`; TRL's, at several sizes of micro-batches."""
    ours = Entrant(OURS, (f"{_MODULE}.ours", case, str(folder), str(max_tokens)))
    return [ours] + [
        Entrant(
            f"TRL, {size} sequences",
            (f"{_MODULE}.theirs", case, str(folder), str(size), "recorded"),
        )
        for size in batch_sizes
    ]


def whole_step_entrants(folder: Path, batch_size: int, generation: str) -> list[Entrant]:
    """Whole steps of the embedded task: generation, rewards, training, weight update."""
    ours = Entrant(OURS, (f"{_MODULE}.ours_whole", str(folder)))
    trl = (f"{_MODULE}.theirs", "digits", str(folder), str(batch_size), generation)
    return [ours, Entrant(f"TRL, {generation}", trl)]


def compare(
    entrants: Sequence[Entrant],
    phase: str,
    repeats: int,
    warmup: int,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Let them take steps in turn; return all measurements and the ratios.

    Args:
        phase: "train" or "step": whose seconds count.
        repeats: measured turns.
        warmup: turns before them.

    Raises:
        RuntimeError: a side ended by itself.
    """
    sides: dict[str, Side] = {}
    found: dict[str, list[dict[str, float]]] = {entrant.label: [] for entrant in entrants}
    try:
        for number, entrant in enumerate(entrants):
            say(f"  loading {entrant.label}")
            sides[entrant.label] = Side(entrant.module, folder / f"side_{number}.log")
        for repeat in range(warmup + repeats):
            for label, side in sides.items():
                measured = side.step()
                found[label].append(measured)
                kind = "warm-up" if repeat < warmup else f"turn {repeat - warmup + 1}/{repeats}"
                seconds, cpu_s = measured[f"{phase}_s"], measured[f"{phase}_cpu_s"]
                say(f"  {kind}: {label}: {seconds:.2f} s, {cpu_s:.2f} s of CPU")
        for side in sides.values():
            side.end()
    finally:
        for side in sides.values():
            side.kill()
    turns = {label: values[warmup:] for label, values in found.items()}
    return {"first": {label: values[0] for label, values in found.items()}, "turns": turns} | {
        "ratios": {
            label: ratios(turns[OURS], values, phase)
            for label, values in turns.items()
            if label != OURS
        }
    }


def ratios(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], phase: str
) -> dict[str, dict[str, float]]:
    """Return our tokens/s over theirs, turn by turn: median, min, max; by wall clock and by CPU."""
    result = {}
    for clock in ("", "cpu_"):
        key = f"{phase}_{clock}s"
        of_turns = [
            (a["tokens"] / a[key]) / (b["tokens"] / b[key])
            for a, b in zip(ours, theirs, strict=True)
        ]
        result["cpu" if clock else "wall"] = {
            "median": statistics.median(of_turns),
            "min": min(of_turns),
            "max": max(of_turns),
        }
    return result


def disagreement(first: dict[str, dict[str, float]]) -> str:
    """Say how the sides' first losses and gradient norms differ by more than `TOLERANCE`, or ""."""
    ours = first[OURS]
    for label, theirs in first.items():
        for name in ("loss", "grad_norm"):
            # A loss at ratio 1 is a mean of advantages, which cancel: relative to their size, 1.
            scale = 1.0 if name == "loss" else ours[name]
            if abs(ours[name] - theirs[name]) > TOLERANCE * scale:
                return f"{name}: {ours[name]:.6g} ours, {theirs[name]:.6g} {label}"
    return ""

"""From a record's steps to the numbers that people read: median, min and max over steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Phases in the order of a step; the rest of "train" and of the step are what these leave.
PHASES = (
    "sampler", "scoring", "rollout", "reward", "exchange", "turns", "logprobs", "vision", "forward",
    "head", "backward", "pipeline", "gradient_sync", "optimizer", "weight_sync",
)  # fmt: skip
_INSIDE_TRAIN = PHASES[PHASES.index("logprobs") : PHASES.index("weight_sync")]
WORDS = {
    "sampler": "VAS",
    "logprobs": "log-probs",
    "exchange": "exchange of groups",
    "turns": "turns on the GPU",
    "pipeline": "pipeline, waiting",
    "gradient_sync": "gradient sync",
    "weight_sync": "weight sync",
    "train_rest": "rest of training",
    "step_rest": "rest of the step",
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and largest of a number over the measured steps."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def tokens_per_s_per_gpu(entry: dict[str, Any]) -> Spread:
    """Return trained tokens (prompt and response) a second of the whole step and a process."""
    return Spread.of(
        [step["tokens"] / step["seconds"]["step"] / entry["processes"] for step in entry["steps"]]
    )


def generated_per_s_per_gpu(entry: dict[str, Any]) -> Spread:
    """Return response tokens a second of the rollout and a process."""
    return Spread.of(
        [
            step["generated_tokens"] / step["seconds"]["rollout"] / entry["processes"]
            for step in entry["steps"]
        ]
    )


def train_mfu(entry: dict[str, Any]) -> Spread:
    """Return model FLOPs, log-prob passes among them, of the training phase's seconds at peak."""
    return _mfu(entry, "train")


def step_mfu(entry: dict[str, Any]) -> Spread:
    """Return the same FLOPs of the whole step's seconds at peak; generation's are not counted."""
    return _mfu(entry, "step")


def memory_bytes(entry: dict[str, Any]) -> int:
    """Return the largest of a process, as memory.StepMemory says it."""
    return max(memory for step in entry["steps"] for memory in step["memory_bytes"])


def phase_seconds(entry: dict[str, Any]) -> dict[str, Spread]:
    """Return seconds a phase, mean over ranks, in the order of a step; they add up to the step."""
    of_steps = [_phases(step["seconds"]) for step in entry["steps"]]
    names = [name for name in (*PHASES, "train_rest", "step_rest") if name in of_steps[0]]
    return {name: Spread.of([phases.get(name, 0.0) for phases in of_steps]) for name in names}


def efficiency(entries: Sequence[dict[str, Any]]) -> list[float]:
    """Return tokens/s/GPU of scaling entries as shares of the first one's."""
    medians = [tokens_per_s_per_gpu(entry).median for entry in entries]
    return [median / medians[0] for median in medians]


def _mfu(entry: dict[str, Any], phase: str) -> Spread:
    peak = entry["peak"]["flops"] * entry["processes"]
    return Spread.of(
        [
            sum(sum(parts.values()) for parts in step["flops"].values())
            / (step["seconds"][phase] * peak)
            for step in entry["steps"]
        ]
    )


def _phases(seconds: dict[str, float]) -> dict[str, float]:
    found = {name: seconds[name] for name in PHASES if name in seconds}
    inside = sum(value for name, value in found.items() if name in _INSIDE_TRAIN)
    found["train_rest"] = seconds["train"] - inside
    outside = sum(value for name, value in found.items() if name not in _INSIDE_TRAIN)
    found["step_rest"] = seconds["step"] - seconds["train"] - (outside - found["train_rest"])
    return found

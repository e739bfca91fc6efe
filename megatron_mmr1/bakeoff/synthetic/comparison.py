"""Stage 1: all arms on all pools over seeds; the numbers as JSON.

Pairing: with a seed, all arms have the same prompts and the same random walk of pass rates.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from megatron_mmr1 import __version__
from megatron_mmr1.bakeoff.intervals import Interval, mean_interval
from megatron_mmr1.bakeoff.synthetic.arms import Arm, arms
from megatron_mmr1.bakeoff.synthetic.pools import POOLS, make_pool
from megatron_mmr1.bakeoff.synthetic.simulation import Outcome, Setting, simulate

MEASURES = (
    *("generated", "scoring", "discarded", "num_steps", "num_groups", "num_mixed"),
    *("pass_rate", "frontier", "coverage", "brier"),
)
CURVES = ("rollouts", "pass_rates", "frontiers")
# Where records say nothing, only what they are used for is of interest.
BLIND_ARMS = (
    *("oracle", "uniform", "posterior (preset)"),
    *("prior global", "prior category (told)"),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The numbers of stage 1.

    Attributes:
        versions: of what made them.
        setting: of all arms.
        seeds: of the columns.
        values: pool -> arm -> measure -> a number a seed.
        curves: pool -> arm -> name -> means over seeds at the points of the learning curve.
    """

    versions: dict[str, str]
    setting: dict[str, object]
    seeds: list[int]
    values: dict[str, dict[str, dict[str, list[float]]]]
    curves: dict[str, dict[str, dict[str, list[float]]]]

    def of(self, pool: str, arm: str, measure: str) -> np.ndarray:
        """Return a measure, float64, a number a seed."""
        return np.array(self.values[pool][arm][measure], np.float64)

    def mixed_share(self, pool: str, arm: str) -> np.ndarray:
        """Return mixed training groups over the oracle's of the same seed; 1 - this is regret."""
        return self.of(pool, arm, "num_mixed") / self.of(pool, "oracle", "num_mixed")

    def above_uniform(self, pool: str, arm: str, measure: str) -> Interval:
        """Return the difference from uniform, paired by seed; "mixed_share" is a measure, too."""
        if measure == "mixed_share":
            difference = self.mixed_share(pool, arm) - self.mixed_share(pool, "uniform")
        else:
            difference = self.of(pool, arm, measure) - self.of(pool, "uniform", measure)
        return mean_interval(difference)

    def save(self, path: Path) -> None:
        """Write JSON; the same numbers give the same bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def compare(
    num_seeds: int,
    setting: Setting | None = None,
    pools: Sequence[str] = POOLS,
    on_done: Callable[[str], None] = lambda words: None,
) -> Comparison:
    """Run every arm on every pool with seeds 0 .. num_seeds - 1."""
    setting = setting or Setting()
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    curves: dict[str, dict[str, dict[str, list[float]]]] = {}
    for pool in pools:
        values[pool], curves[pool] = {}, {}
        for arm in arms():
            if pool.endswith("_blind") and arm.name not in BLIND_ARMS:
                continue
            outcomes = [_simulate(arm, pool, seed, setting) for seed in range(num_seeds)]
            values[pool][arm.name] = {
                name: [_rounded(getattr(outcome, name)) for outcome in outcomes]
                for name in MEASURES
            }
            curves[pool][arm.name] = {
                name: [
                    _rounded(x)
                    for x in np.mean([getattr(outcome, name) for outcome in outcomes], axis=0)
                ]
                for name in CURVES
            }
            on_done(f"{pool}: {arm.name}")
    versions = {
        "megatron_mmr1": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    return Comparison(versions, asdict(setting), list(range(num_seeds)), values, curves)


def _simulate(arm: Arm, pool: str, seed: int, setting: Setting) -> Outcome:
    return simulate(arm, make_pool(pool, seed), seed, setting)


def _rounded(value: float) -> float:
    return round(float(value), 5)

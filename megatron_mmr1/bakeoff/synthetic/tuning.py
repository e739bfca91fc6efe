"""The search for the defaults of the preset "posterior", on seeds that no table reports.

Coordinate by coordinate from values that were set by hand, twice over the keys. What is maximised:
the mean over five settings of two shares of the oracle's, mixed training groups and gain in mean
pass rate. A key leaves its value only for a gain of more than MARGIN.

`floor` is not chosen here: what it guards against, a model of the prompts that is wrong, is not in
the simulation. What it costs is reported instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mmr1.bakeoff.intervals import Interval, mean_interval
from megatron_mmr1.bakeoff.synthetic.arms import Arm, preset
from megatron_mmr1.bakeoff.synthetic.policy import Drift
from megatron_mmr1.bakeoff.synthetic.pools import NUM_PROMPTS, make_pool
from megatron_mmr1.bakeoff.synthetic.simulation import Outcome, Setting, simulate
from megatron_mmr1.config.schema import SamplerConfig

FIRST_TUNING_SEED, FIRST_REPORT_SEED = 1000, 2000
MARGIN = 0.005
_FAST = Drift(own=0.05, transfer=0.005, walk=0.1)
# A pool, and what all arms have alike.
SETTINGS = {
    "skewed": ("skewed", Setting()),
    "balanced": ("balanced", Setting()),
    "beta": ("beta", Setting()),
    "skewed, fast drift": ("skewed", Setting(drift=_FAST)),
    "skewed, two passes": ("skewed", Setting(budget=2 * NUM_PROMPTS * 8)),
}
START: dict[str, Any] = {
    "mixture_ratio": 0.5,
    "power": 2.0,
    "discount": 0.97,
    "prior_discount": 0.9,
    "update_every": 4,
    "score": "mixed",
    "thompson": False,
}
# What each step of the search may set, in this order.
CHOICES: tuple[tuple[dict[str, Any], ...], ...] = (
    tuple({"mixture_ratio": value} for value in (0.5, 0.75, 1.0)),
    tuple({"power": value} for value in (1.0, 2.0, 3.0, 4.0)),
    tuple({"discount": value} for value in (0.9, 0.95, 0.97, 0.99)),
    tuple({"prior_discount": value} for value in (0.8, 0.9, 0.95, 0.99)),
    tuple({"update_every": value} for value in (1, 4, 16)),
    (
        {"score": "mixed", "thompson": False},
        {"score": "mixed", "thompson": True},
        {"score": "calibrated", "thompson": False},
    ),
)
FLOORS = (0.0, 0.05, 0.1)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What the search found.

    Attributes:
        start, chosen: values of the keys that were searched.
        trace: a line a trial, (what was changed, objective).
        gain: of the chosen over the start, on report seeds.
        neighbours: the objective of the chosen with one thing changed, minus its own, on report
            seeds; negative = worse.
    """

    start: dict[str, Any]
    chosen: dict[str, Any]
    trace: list[tuple[str, float]]
    gain: Interval
    neighbours: dict[str, Interval]


def tune(
    num_seeds: int, num_report_seeds: int, on_done: Callable[[str], None] = lambda words: None
) -> Tuned:
    """Search on `num_seeds` seeds, then measure the outcome on others."""
    search = _Objective(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + num_seeds))
    report = _Objective(range(FIRST_REPORT_SEED, FIRST_REPORT_SEED + num_report_seeds))
    base = replace(preset("posterior"), floor=0.05, **START)
    chosen, trace = base, [("start", float(search(base).mean()))]
    for _ in range(2):
        for choices in CHOICES:
            candidates = [(change, replace(chosen, **change)) for change in choices]
            worth = []
            for change, config in candidates:
                worth.append(float(search(config).mean()))
                trace.append((_words(change), worth[-1]))
                on_done(f"{trace[-1][0]}: {trace[-1][1]:.4f}")
            best = int(np.argmax(worth))
            if worth[best] > float(search(chosen).mean()) + MARGIN:
                chosen = candidates[best][1]
    gain = mean_interval(report(chosen) - report(base))
    neighbours = {}
    for change in [c for choices in CHOICES for c in choices] + [{"floor": f} for f in FLOORS]:
        config = replace(chosen, **change)
        if config != chosen:
            neighbours[_words(change)] = mean_interval(report(config) - report(chosen))
            on_done(f"beside the chosen, {_words(change)}")
    return Tuned(START, {key: getattr(chosen, key) for key in START}, trace, gain, neighbours)


def load_tuned(path: Path) -> Tuned:
    """Read JSON of a `Tuned`."""
    found = json.loads(path.read_text(encoding="utf-8"))
    found["trace"] = [(words, worth) for words, worth in found["trace"]]
    found["gain"] = Interval(*found["gain"])
    found["neighbours"] = {name: Interval(*ends) for name, ends in found["neighbours"].items()}
    return Tuned(**found)


class _Objective:
    """The mean over SETTINGS, a number a seed; what was run once is remembered."""

    def __init__(self, seeds: range):
        self.seeds = seeds
        self._known: dict[str, np.ndarray] = {}
        self._oracle = {name: self._outcomes(Arm("oracle", None), name) for name in SETTINGS}

    def __call__(self, config: SamplerConfig) -> np.ndarray:
        if (key := repr(config)) not in self._known:
            arm = Arm("candidate", config)
            shares = [
                [_share(*both) for both in zip(self._outcomes(arm, name), oracle, strict=True)]
                for name, oracle in self._oracle.items()
            ]
            self._known[key] = np.mean(shares, axis=0)
        return self._known[key]

    def _outcomes(self, arm: Arm, name: str) -> list[Outcome]:
        pool, setting = SETTINGS[name]
        return [simulate(arm, make_pool(pool, seed), seed, setting) for seed in self.seeds]


def _share(mine: Outcome, oracle: Outcome) -> float:
    gains = [outcome.pass_rate - outcome.pass_rates[0] for outcome in (mine, oracle)]
    return 0.5 * (mine.num_mixed / oracle.num_mixed + gains[0] / gains[1])


def _words(change: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in change.items())

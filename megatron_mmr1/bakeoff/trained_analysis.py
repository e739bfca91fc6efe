"""What the runs of stage 2 say: choice of the learning rate, curves, intervals.

S seeds, X points of the axis of generated responses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mmr1.bakeoff.digit_pools import MIXES
from megatron_mmr1.bakeoff.trained import ARMS, LEVEL_GIVEN, REPORTED_SEEDS, TUNING_SEEDS, Run

MEASURES = ("own mix", "frontier")  # of held-out accuracy
_ACCURACY = "eval/accuracy_sampled"
NUM_RESAMPLES = 4000
NUM_POINTS = 41


@dataclass(frozen=True, slots=True)
class Result:
    """One run.

    Attributes:
        error: what it crashed with; "" if it didn't.
        responses: generated before each evaluation, [E].
        accuracy: by measure, [E].
        means: over the steps, of metrics that are averaged; coverage is the last one.
    """

    run: Run
    error: str
    responses: np.ndarray
    accuracy: Mapping[str, np.ndarray]
    means: Mapping[str, float]

    @classmethod
    def of_record(cls, record: dict) -> Result:
        """Read what `Bakeoff.make` wrote."""
        run = Run(**record["run"])
        rows = [row for row in record["rows"] if row.get(f"{_ACCURACY}/frontier") is not None]
        steps = [row for row in record["rows"] if row["step"] > 0]

        def mean(name: str) -> float:
            values = [row[name] for row in steps if row.get(name) is not None]
            return float(np.mean(values)) if values else float("nan")

        means = {name: mean(name) for name in ("groups/mixed_rate", "grad_norm", "sampler/brier")}
        means["sampler/coverage"] = steps[-1]["sampler/coverage"] if steps else float("nan")
        return cls(
            run,
            record["error"],
            np.array([row.get("rollout/responses_total", 0.0) for row in rows]),
            {
                "own mix": np.array([_of_mix(row, MIXES[run.pool]) for row in rows], float),
                "frontier": np.array([row[f"{_ACCURACY}/frontier"] for row in rows], float),
            },
            means,
        )

    def final(self, measure: str) -> float:
        """Return the accuracy when the budget was spent; NaN if the run crashed."""
        return float(self.accuracy[measure][-1]) if not self.error else float("nan")

    def curve(self, measure: str, axis_X: np.ndarray) -> np.ndarray:
        """Return the accuracy after so many responses, by straight lines between evaluations."""
        return np.interp(axis_X, self.responses, self.accuracy[measure])


def _of_mix(row: Mapping[str, float], mix: Mapping[str, float]) -> float:
    """Return the accuracy on a pool's own mix of classes."""
    return sum(share * row[f"{_ACCURACY}/{name}"] for name, share in mix.items())


def chosen_learning_rates(results: Sequence[Result]) -> dict[tuple[str, str], float]:
    """Return the best learning rate by (pool, arm): mean final accuracy over the tuning seeds.

    A crashed run counts as no better than its cold start: 0.

    Raises:
        ValueError: tuning runs are missing.
    """
    finals = defaultdict[tuple[str, str, float], list[float]](list)
    for result in results:
        run = result.run
        if run.seed in TUNING_SEEDS:
            value = 0.0 if result.error else result.final(MEASURES[0])
            finals[run.pool, run.arm, run.lr].append(value)
    chosen = {}
    for pool in MIXES:
        for arm in ARMS:
            means = {
                lr: float(np.mean(values))
                for (p, a, lr), values in finals.items()
                if (p, a) == (pool, arm) and len(values) == len(TUNING_SEEDS)
            }
            if not means:
                raise ValueError(f"no learning rate of {arm!r} on {pool!r} has all tuning runs yet")
            chosen[pool, arm] = max(means, key=lambda lr: means[lr])
        chosen[pool, LEVEL_GIVEN] = chosen[pool, "posterior"]
    return chosen


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, or a ratio, with its 95% interval over seeds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(values_S: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean and its percentile bootstrap interval over seeds.

    With six seeds it is somewhat too narrow (about 90% for normal values): read it with that.
    """
    picks = _resamples(len(values_S), seed)
    means = values_S[picks].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values_S.mean()), float(low), float(high))


def responses_to_reach(curve_X: np.ndarray, axis_X: np.ndarray, target: float) -> float:
    """Return the responses after which a curve first reaches `target`; inf if it never does."""
    reached = np.flatnonzero(curve_X >= target)
    if not len(reached):
        return float("inf")
    i = int(reached[0])
    if i == 0:
        return float(axis_X[0])
    share = (target - curve_X[i - 1]) / (curve_X[i] - curve_X[i - 1])
    return float(axis_X[i - 1] + share * (axis_X[i] - axis_X[i - 1]))


def cost_ratio(arm_SX: np.ndarray, uniform_SX: np.ndarray, axis_X: np.ndarray) -> Interval:
    """Return the responses an arm needs to uniform's final accuracy, relative to uniform.

    Of the mean curves; the interval resamples seeds, the same for both. inf: not within the budget.
    """

    def ratio(arm_X: np.ndarray, uniform_X: np.ndarray) -> float:
        target = float(uniform_X[-1])
        return responses_to_reach(arm_X, axis_X, target) / responses_to_reach(
            uniform_X, axis_X, target
        )

    picks = _resamples(len(arm_SX), 0)
    ratios = [ratio(arm_SX[pick].mean(axis=0), uniform_SX[pick].mean(axis=0)) for pick in picks]
    low, high = np.quantile(ratios, [0.025, 0.975], method="nearest")  # inf has no middle
    return Interval(ratio(arm_SX.mean(axis=0), uniform_SX.mean(axis=0)), float(low), float(high))


def _resamples(num_seeds: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))


@dataclass(frozen=True, slots=True)
class Row:
    """One arm on one pool.

    Attributes:
        seeds: that all arms of the pool have finished.
        num_crashed: of its reported runs.
        curves_SX: by measure.
    """

    pool: str
    arm: str
    lr: float
    seeds: tuple[int, ...]
    num_crashed: int
    curves_SX: Mapping[str, np.ndarray]
    final: Mapping[str, Interval]
    gain: Mapping[str, Interval]
    cost: Mapping[str, Interval]
    means: Mapping[str, float]


def compare(results: Sequence[Result], axis_X: np.ndarray) -> list[Row]:
    """Return every pool's arms, uniform first, over the reported seeds that all of them have.

    Args:
        axis_X: numbers of responses, up to the budget.
    """
    chosen = chosen_learning_rates(results)
    rows = []
    for pool in MIXES:
        reported = {
            arm: {
                r.run.seed: r
                for r in results
                if (r.run.pool, r.run.arm, r.run.lr) == (pool, arm, chosen[pool, arm])
                and r.run.seed in REPORTED_SEEDS
            }
            for arm in (*ARMS, LEVEL_GIVEN)
        }
        seeds = [
            seed
            for seed in REPORTED_SEEDS
            if all(seed in of_arm and not of_arm[seed].error for of_arm in reported.values())
        ]
        if not seeds:
            continue
        for arm, of_arm in reported.items():
            mine, uniform = ([by[s] for s in seeds] for by in (of_arm, reported["uniform"]))
            curves, theirs = (
                {m: np.stack([r.curve(m, axis_X) for r in runs]) for m in MEASURES}
                for runs in (mine, uniform)
            )
            finals = {m: np.array([r.final(m) for r in mine]) for m in MEASURES}
            base = {m: np.array([r.final(m) for r in uniform]) for m in MEASURES}
            rows.append(
                Row(
                    pool,
                    arm,
                    chosen[pool, arm],
                    tuple(seeds),
                    sum(bool(r.error) for r in of_arm.values()),
                    curves,
                    {m: bootstrap(finals[m]) for m in MEASURES},
                    {m: bootstrap(finals[m] - base[m]) for m in MEASURES},
                    {m: cost_ratio(curves[m], theirs[m], axis_X) for m in MEASURES},
                    {k: float(np.mean([r.means[k] for r in mine])) for k in mine[0].means},
                )
            )
    return rows

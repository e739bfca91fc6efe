"""What the runs of stage 2 say: choice of the learning rate, curves, intervals.

S seeds, E evaluations of a run, X points of the axis of generated responses.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_mmr1.bakeoff.intervals import Interval, mean_interval
from megatron_mmr1.bakeoff.trained.pools import MIXES
from megatron_mmr1.bakeoff.trained.runs import (
    ARMS,
    BUDGET,
    CANDIDATES,
    CANDIDATES_LR,
    CANDIDATES_POOL,
    GROUP_SIZE,
    LEVEL_GIVEN,
    REPORTED_SEEDS,
    TUNING_SEEDS,
    Run,
)

MEASURES = ("own mix", "frontier")  # of held-out accuracy
# Costs are compared where uniform has made these shares of its gain over the cold start.
GAINS = (0.5, 0.8, 1.0)
AXIS_X = np.linspace(0, BUDGET, 121)
NUM_RESAMPLES = 4000
_ACCURACY = "eval/accuracy_sampled"
_MEANS = ("grad_norm", "sampler/brier")
MIXED = "mixed groups per 1,000 responses"


@dataclass(frozen=True, slots=True)
class Result:
    """One run. One that crashed is worth what its cold start was, all the way.

    Attributes:
        error: what it crashed with; "" if it didn't.
        responses: generated before each evaluation, [E].
        accuracy: by measure, [E].
        means: over the steps, by metric; coverage is the last step's.
    """

    run: Run
    error: str
    responses: Sequence[float]
    accuracy: Mapping[str, Sequence[float]]
    means: Mapping[str, float | None]

    @classmethod
    def of_record(cls, record: dict) -> Result:
        """Read what `Bakeoff.make` wrote."""
        run = Run(**record["run"])
        rows = [row for row in record["rows"] if row.get(f"{_ACCURACY}/frontier") is not None]
        steps = [row for row in record["rows"] if row["step"] > 0]

        def mean(name: str) -> float | None:
            values = [row[name] for row in steps if row.get(name) is not None]
            return round(float(np.mean(values)), 5) if values else None

        means = {name: mean(name) for name in _MEANS}
        means["sampler/coverage"] = steps[-1]["sampler/coverage"] if steps else None
        if steps:
            means[MIXED] = round(1000 * _num_mixed(steps) / steps[-1]["rollout/responses_total"], 3)
        if record["error"]:
            rows = rows[:1]
        return cls(
            run,
            record["error"],
            [row.get("rollout/responses_total", 0.0) for row in rows],
            {
                "own mix": [round(_of_mix(row, MIXES[run.pool]), 5) for row in rows],
                "frontier": [round(row[f"{_ACCURACY}/frontier"], 5) for row in rows],
            },
            means,
        )

    def final(self, measure: str) -> float:
        """Return the accuracy at the end."""
        return self.accuracy[measure][-1]

    def late(self, measure: str) -> float:
        """Return the mean accuracy over the second half of the budget: less noisy than the last."""
        return float(self.curve(measure)[len(AXIS_X) // 2 :].mean())

    def curve(self, measure: str) -> np.ndarray:
        """Return the accuracy at AXIS_X, by straight lines between evaluations."""
        return np.interp(AXIS_X, self.responses, self.accuracy[measure])


def _num_mixed(steps: Sequence[Mapping[str, float]]) -> float:
    """Return how many mixed groups were made for training, those thrown away among them."""
    return sum(r["groups/mixed_rate"] * r["rollout/responses"] for r in steps) / GROUP_SIZE


def _of_mix(row: Mapping[str, float], mix: Mapping[str, float]) -> float:
    """Return the accuracy on a pool's own mix of classes."""
    return sum(share * row[f"{_ACCURACY}/{name}"] for name, share in mix.items())


def save_results(path: Path, results: Iterable[Result]) -> None:
    """Write JSON, a line a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(result)) for result in results]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def load_results(path: Path) -> list[Result]:
    """Read what `save_results` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return [Result(**{**record, "run": Run(**record["run"])}) for record in found]


def chosen_learning_rates(results: Sequence[Result]) -> dict[tuple[str, str], float]:
    """Return the best learning rate by (pool, arm): accuracy on the pool's own mix, mean over the
    second half of the budget and the tuning seeds.

    Raises:
        ValueError: tuning runs are missing.
    """
    late = defaultdict[tuple[str, str, float], list[float]](list)
    for result in results:
        run = result.run
        if run.seed in TUNING_SEEDS:
            late[run.pool, run.arm, run.lr].append(result.late(MEASURES[0]))
    chosen = {}
    for pool in MIXES:
        for arm in ARMS:
            means = {
                lr: float(np.mean(values))
                for (p, a, lr), values in late.items()
                if (p, a) == (pool, arm) and len(values) == len(TUNING_SEEDS)
            }
            if not means:
                raise ValueError(f"no learning rate of {arm!r} on {pool!r} has all tuning runs yet")
            chosen[pool, arm] = max(means, key=lambda lr: means[lr])
        chosen[pool, LEVEL_GIVEN] = chosen[pool, "posterior"]
    return chosen


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings of the posterior, or uniform beside them; means over the tuning seeds.

    Attributes:
        late, final: by measure.
    """

    name: str
    num_seeds: int
    late: Mapping[str, float]
    final: Mapping[str, float]


def candidates(results: Sequence[Result]) -> list[Candidate]:
    """Return what the preset's defaults were chosen from; those that were not run are left out."""
    found = []
    for name in ("uniform", *CANDIDATES):
        mine = [
            result
            for result in results
            if (r := result.run).seed in TUNING_SEEDS
            and (r.pool, r.arm, r.lr) == (CANDIDATES_POOL, name, CANDIDATES_LR)
        ]
        if mine:
            late = {m: float(np.mean([r.late(m) for r in mine])) for m in MEASURES}
            final = {m: float(np.mean([r.final(m) for r in mine])) for m in MEASURES}
            found.append(Candidate(name, len(mine), late, final))
    return found


def responses_to_reach(curve_X: np.ndarray, target: float) -> float:
    """Return the responses after which a curve first reaches `target`; inf if it never does."""
    reached = np.flatnonzero(curve_X >= target)
    if not len(reached):
        return float("inf")
    i = int(reached[0])
    if i == 0:
        return float(AXIS_X[0])
    share = (target - curve_X[i - 1]) / (curve_X[i] - curve_X[i - 1])
    return float(AXIS_X[i - 1] + share * (AXIS_X[i] - AXIS_X[i - 1]))


def cost_ratio(arm_SX: np.ndarray, uniform_SX: np.ndarray, gain: float) -> Interval:
    """Return the responses that an arm needs to reach an accuracy, relative to uniform.

    Of the mean curves. The interval is a percentile bootstrap over seeds, the same ones for both
    arms; with six seeds it is somewhat narrow. inf: not within the budget; NaN: uniform gains
    nothing.

    Args:
        gain: the accuracy is where uniform has made this share of its gain over the cold start.
    """

    def ratio(arm_X: np.ndarray, uniform_X: np.ndarray) -> float:
        if not uniform_X[-1] > uniform_X[0]:
            return float("nan")
        target = float(uniform_X[0] + gain * (uniform_X[-1] - uniform_X[0]))
        return responses_to_reach(arm_X, target) / responses_to_reach(uniform_X, target)

    num_seeds = len(arm_SX)
    picks = np.random.default_rng(0).integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
    ratios = [ratio(arm_SX[pick].mean(axis=0), uniform_SX[pick].mean(axis=0)) for pick in picks]
    low, high = np.quantile(ratios, [0.025, 0.975], method="nearest")  # inf has no middle
    return Interval(ratio(arm_SX.mean(axis=0), uniform_SX.mean(axis=0)), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Row:
    """One arm on one pool.

    Attributes:
        num_seeds: that all arms of the pool have.
        num_crashed: of its reported runs.
        curves: by measure, mean over seeds, [X].
        final, above_uniform: by measure, mean accuracy and paired difference, Student's t.
        cost: by measure and gain.
        means: over seeds.
    """

    pool: str
    arm: str
    lr: float
    num_seeds: int
    num_crashed: int
    curves: Mapping[str, np.ndarray]
    final: Mapping[str, Interval]
    above_uniform: Mapping[str, Interval]
    cost: Mapping[tuple[str, float], Interval]
    means: Mapping[str, float]


def compare(results: Sequence[Result]) -> list[Row]:
    """Return every pool's arms, uniform first, over the reported seeds that all of them have."""
    chosen = chosen_learning_rates(results)
    by_run = {result.run: result for result in results}
    rows = []
    for pool in MIXES:
        found = {
            arm: {
                seed: by_run[run]
                for seed in REPORTED_SEEDS
                if (run := Run(pool, arm, chosen[pool, arm], seed)) in by_run
            }
            for arm in (*ARMS, LEVEL_GIVEN)
        }
        seeds = [
            seed for seed in REPORTED_SEEDS if all(seed in of_arm for of_arm in found.values())
        ]
        if not seeds:
            continue
        base = [found["uniform"][seed] for seed in seeds]
        for of_arm in found.values():
            num_crashed = sum(bool(result.error) for result in of_arm.values())
            mine = [of_arm[seed] for seed in seeds]
            rows.append(_row(mine, base, num_crashed))
    return rows


def _row(mine: Sequence[Result], uniform: Sequence[Result], num_crashed: int) -> Row:
    """Compare an arm's runs with uniform's of the same seeds."""
    run = mine[0].run
    curves, theirs = (
        {m: np.stack([r.curve(m) for r in runs]) for m in MEASURES} for runs in (mine, uniform)
    )
    final, base = (
        {m: np.array([r.final(m) for r in runs]) for m in MEASURES} for runs in (mine, uniform)
    )
    means = {}
    for name in mine[0].means:
        values = [value for r in mine if (value := r.means[name]) is not None]
        means[name] = float(np.mean(values)) if values else float("nan")
    return Row(
        run.pool,
        run.arm,
        run.lr,
        len(mine),
        num_crashed,
        {m: curves[m].mean(axis=0) for m in MEASURES},
        {m: mean_interval(final[m]) for m in MEASURES},
        {m: mean_interval(final[m] - base[m]) for m in MEASURES},
        {(m, gain): cost_ratio(curves[m], theirs[m], gain) for m in MEASURES for gain in GAINS},
        means,
    )

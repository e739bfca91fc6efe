"""The comparison of samplers: equal budgets, an oracle above all, intervals, learning rates."""

import math

import numpy as np
import pytest

from megatron_mmr1.bakeoff import trained, trained_analysis
from megatron_mmr1.bakeoff.arms import arms
from megatron_mmr1.bakeoff.intervals import mean_interval
from megatron_mmr1.bakeoff.pools import make_pool
from megatron_mmr1.bakeoff.simulation import Setting, simulate
from megatron_mmr1.bakeoff.trained import (
    ARMS,
    LEVEL_GIVEN,
    TUNING_SEEDS,
    Run,
    config_of,
    tuning_runs,
)
from megatron_mmr1.bakeoff.trained_analysis import Result, cost_ratio, responses_to_reach

SETTING = Setting(budget=40_000)
SOME = ("oracle", "uniform", "released_code", "posterior (preset)", "dapo")


@pytest.fixture(scope="module")
def outcomes():
    by_name = {arm.name: arm for arm in arms()}
    pool = make_pool("skewed", seed=3)
    return {name: simulate(by_name[name], pool, 3, SETTING) for name in SOME}


def test_every_arm_spends_the_same_budget_whatever_for(outcomes):
    for name, outcome in outcomes.items():
        assert SETTING.budget - 64 * 8 < outcome.generated <= SETTING.budget, name
        trained_on = outcome.num_groups * SETTING.group_size
        assert outcome.generated == trained_on + outcome.scoring + outcome.discarded, name
    assert outcomes["released_code"].scoring > 0 and outcomes["dapo"].discarded > 0
    assert outcomes["uniform"].scoring == outcomes["uniform"].discarded == 0


def test_nothing_beats_the_oracle(outcomes):
    best = outcomes["oracle"].num_mixed
    assert all(outcome.num_mixed <= 1.02 * best for outcome in outcomes.values())
    assert outcomes["posterior (preset)"].num_mixed > 2 * outcomes["uniform"].num_mixed


def test_the_same_seed_gives_the_same_result(outcomes):
    arm = next(arm for arm in arms() if arm.name == "posterior (preset)")
    again = simulate(arm, make_pool("skewed", seed=3), 3, SETTING)
    assert again == outcomes[arm.name]
    other = simulate(arm, make_pool("skewed", seed=4), 4, SETTING)
    assert other != again


def test_an_interval_is_students():
    interval = mean_interval(np.array([1.0, 2.0, 3.0, 4.0]))
    half = 3.1824463 * math.sqrt(5 / 3) / 2  # t of three degrees of freedom
    assert interval.mean == 2.5
    assert interval.low == pytest.approx(2.5 - half) and interval.high == pytest.approx(2.5 + half)
    assert mean_interval(np.array([1.0, -1.0])).is_null
    assert not mean_interval(np.array([1.0, 1.1, 0.9, 1.0])).is_null


def test_responses_to_an_accuracy_are_read_off_the_line():
    axis_X = np.array([0.0, 10.0, 20.0])
    assert responses_to_reach(np.array([0.2, 0.4, 0.6]), axis_X, 0.5) == 15.0
    assert responses_to_reach(np.array([0.2, 0.4, 0.6]), axis_X, 0.1) == 0.0
    assert responses_to_reach(np.array([0.2, 0.4, 0.6]), axis_X, 0.7) == math.inf
    uniform_SX = np.tile([0.2, 0.3, 0.4], (3, 1))
    found = cost_ratio(np.tile([0.2, 0.4, 0.6], (3, 1)), uniform_SX, axis_X)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    never = cost_ratio(np.tile([0.2, 0.2, 0.2], (3, 1)), uniform_SX, axis_X)
    assert never.value == never.high == math.inf


def _result(arm: str, lr: float, seed: int, accuracy: float, error: str = "") -> Result:
    values = np.array([0.1, accuracy])
    return Result(
        Run("skewed", arm, lr, seed),
        error,
        np.array([0.0, 100.0]),
        {"own mix": values, "frontier": values},
        {},
    )


def test_each_arms_learning_rate_is_the_best_of_the_seeds_that_are_not_reported(monkeypatch):
    monkeypatch.setattr(trained_analysis, "MIXES", {"skewed": {}})
    monkeypatch.setattr(trained_analysis, "ARMS", {"uniform": (), "posterior": ()})
    results = [
        _result(arm, lr, seed, accuracy)
        for arm in ("posterior", "uniform")
        for lr, accuracy in ((1e-4, 0.3), (2e-4, 0.4))
        for seed in TUNING_SEEDS
    ]
    results += [_result("uniform", 4e-4, TUNING_SEEDS[0], 0.9)]  # not all seeds yet
    results += [_result("uniform", 1e-4, 0, 0.99)]  # a reported seed chooses nothing
    chosen = trained_analysis.chosen_learning_rates(results)
    arms = ("uniform", "posterior", LEVEL_GIVEN)
    assert chosen == {("skewed", arm): 2e-4 for arm in arms}
    crashed = [_result("uniform", 2e-4, seed, 0.9, "RuntimeError: x") for seed in TUNING_SEEDS]
    chosen = trained_analysis.chosen_learning_rates([*results[:6], *crashed])
    assert chosen[("skewed", "uniform")] == 1e-4


def test_the_runs_of_stage_2_differ_only_in_what_is_compared(tmp_path):
    runs = list(tuning_runs())
    assert len({run.name for run in runs}) == len(runs)
    configs = {run.arm: config_of(run, tmp_path, tmp_path / "hf") for run in runs}
    assert set(configs) == set(ARMS)
    for config in configs.values():
        assert config.max_responses == trained.BUDGET
        assert config.optimizer.schedule == "constant"
    assert configs["uniform"].sampler.mixture_ratio == 0
    assert configs["posterior + dynamic sampling"].sampler.max_refills > 0

"""The comparison of samplers: equal budgets, an oracle above all, intervals, learning rates."""

import dataclasses
import fcntl
import json
import math

import numpy as np
import pytest

from megatron_mmr1.bakeoff import page
from megatron_mmr1.bakeoff.intervals import mean_interval
from megatron_mmr1.bakeoff.synthetic.arms import arms
from megatron_mmr1.bakeoff.synthetic.pools import make_pool
from megatron_mmr1.bakeoff.synthetic.simulation import Setting, simulate
from megatron_mmr1.bakeoff.trained import analysis, runs
from megatron_mmr1.bakeoff.trained.analysis import Result, cost_ratio, responses_to_reach
from megatron_mmr1.bakeoff.trained.pools import MIXES
from megatron_mmr1.bakeoff.trained.runs import (
    ARMS,
    BUDGET,
    CANDIDATES,
    LEVEL_GIVEN,
    REPORTED_SEEDS,
    TUNING_SEEDS,
    Run,
    config_of,
    tuning_runs,
)

SETTING = Setting(budget=40_000)
MEANS = {analysis.MIXED: 60.0, "grad_norm": 1.0, "sampler/coverage": 0.9}
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
    assert interval.value == 2.5
    assert interval.low == pytest.approx(2.5 - half) and interval.high == pytest.approx(2.5 + half)
    assert mean_interval(np.array([1.0, -1.0])).is_null
    assert not mean_interval(np.array([1.0, 1.1, 0.9, 1.0])).is_null


def test_responses_to_an_accuracy_are_read_off_the_line():
    rising_X = 0.2 + 0.4 * analysis.AXIS_X / BUDGET
    assert responses_to_reach(rising_X, 0.5) == pytest.approx(0.75 * BUDGET)
    assert responses_to_reach(rising_X, 0.1) == 0.0
    assert responses_to_reach(rising_X, 0.7) == math.inf
    uniform_SX = np.tile((0.2 + rising_X) / 2, (3, 1))  # from 0.2 to 0.4
    for gain in (0.5, 1.0):
        assert cost_ratio(np.tile(rising_X, (3, 1)), uniform_SX, gain) == pytest.approx([0.5] * 3)
    never = cost_ratio(np.full_like(uniform_SX, 0.2), uniform_SX, 1.0)
    assert never.value == never.high == math.inf


def _result(arm: str, lr: float, seed: int, accuracy: float, error: str = "") -> Result:
    accuracies = {measure: [0.1, accuracy] for measure in analysis.MEASURES}
    return Result(Run("skewed", arm, lr, seed), error, [0.0, BUDGET], accuracies, MEANS)


def test_each_arms_learning_rate_is_the_best_of_the_seeds_that_are_not_reported(monkeypatch):
    monkeypatch.setattr(analysis, "MIXES", {"skewed": {}})
    monkeypatch.setattr(analysis, "ARMS", {"uniform": (), "posterior": ()})
    results = [
        _result(arm, lr, seed, accuracy)
        for arm in ("posterior", "uniform")
        for lr, accuracy in ((1e-4, 0.3), (2e-4, 0.4))
        for seed in TUNING_SEEDS
    ]
    results += [_result("uniform", 4e-4, TUNING_SEEDS[0], 0.9)]  # not all seeds yet
    results += [_result("uniform", 1e-4, 0, 0.99)]  # a reported seed chooses nothing
    chosen = analysis.chosen_learning_rates(results)
    assert chosen == {("skewed", arm): 2e-4 for arm in ("uniform", "posterior", LEVEL_GIVEN)}
    crashed = [_result("uniform", 2e-4, seed, 0.1, "RuntimeError: x") for seed in TUNING_SEEDS]
    chosen = analysis.chosen_learning_rates([*results[:6], *crashed])
    assert chosen[("skewed", "uniform")] == 1e-4


def _all_runs(better: float) -> list[Result]:
    """Tuning and reported runs on the skewed pool; the posterior is so much better."""
    tuning = [_result(arm, 1e-4, seed, 0.4) for arm in ARMS for seed in TUNING_SEEDS]
    reported = [
        _result(arm, 1e-4, seed, 0.4 + 0.01 * seed + better * (arm == "posterior"))
        for arm in (*ARMS, LEVEL_GIVEN)
        for seed in REPORTED_SEEDS
    ]
    return tuning + reported


def test_arms_are_compared_seed_by_seed_and_a_crash_is_counted(monkeypatch):
    monkeypatch.setattr(analysis, "MIXES", {"skewed": {}})
    results = _all_runs(better=0.1)
    rows = {row.arm: row for row in analysis.compare(results)}
    above = rows["posterior"].above_uniform["frontier"]
    assert above == pytest.approx([0.1] * 3)  # the seeds' own differences are gone
    assert rows["posterior"].cost["frontier", 1.0].high < 1
    assert rows[LEVEL_GIVEN].above_uniform["frontier"].is_null
    results.pop()  # the last seed of one arm: compared are those that all have
    rows = {row.arm: row for row in analysis.compare(results)}
    assert {row.num_seeds for row in rows.values()} == {len(REPORTED_SEEDS) - 1}


def test_a_crashed_run_is_worth_its_cold_start():
    rows = [
        {"step": step, "rollout/responses_total": 256.0 * step, "rollout/responses": 256.0}
        | {"groups/mixed_rate": 0.5, "grad_norm": 1.0, "sampler/coverage": 0.1 * step}
        | {f"eval/accuracy_sampled/{name}": 0.1 + 0.1 * step for name in MIXES["skewed"]}
        for step in range(3)
    ]
    run = dataclasses.asdict(Run("skewed", "uniform", 1e-4, 0))
    fine = Result.of_record({"run": run, "error": "", "rows": rows})
    assert fine.final("own mix") == fine.final("frontier") == pytest.approx(0.3)
    assert fine.means[analysis.MIXED] == pytest.approx(1000 * 0.5 / 8)
    crashed = Result.of_record({"run": run, "error": "RuntimeError: x", "rows": rows})
    assert crashed.final("own mix") == pytest.approx(0.1)
    assert (crashed.curve("frontier") == crashed.final("frontier")).all()


def test_both_stages_are_written_from_their_json(monkeypatch, tmp_path):
    monkeypatch.setattr(analysis, "MIXES", {"skewed": {"frontier": 1.0}})
    monkeypatch.setattr(runs, "MIXES", {"skewed": {}})
    results = _all_runs(better=0.1)
    results += [_result(name, 1e-4, seed, 0.4) for name in CANDIDATES for seed in TUNING_SEEDS]
    analysis.save_results(tmp_path / "trained.json", results)
    assert analysis.load_results(tmp_path / "trained.json") == results
    page.write(tmp_path)
    words = (tmp_path / "README.md").read_text()
    assert "Stage 2" in words and "Stage 1" not in words
    assert "| lambda 0.5 | 32.5 | 40.0 |" in words  # the candidates, from their own runs
    assert "+10.0 [+10.0, +10.0] |" in words and "36 of 36" in words
    assert "skewed: frontier" in (tmp_path / "index.html").read_text()


def test_a_run_that_another_process_makes_is_passed_over(tmp_path, monkeypatch):
    made = []
    bakeoff = object.__new__(runs.Bakeoff)  # without its engine
    bakeoff.folder = tmp_path
    monkeypatch.setattr(runs.Bakeoff, "_make", lambda self, run, *rest: made.append(run))
    monkeypatch.setattr(runs.Bakeoff, "_made_of", lambda self, run: {"settings": run.seed})
    first, second = list(tuning_runs())[:2]
    (tmp_path / "runs").mkdir()
    with (tmp_path / "runs" / f"{first.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not bakeoff.make(first)
        assert bakeoff.make(second) and made == [second]
    assert bakeoff.make(first) and made == [second, first]
    runs.result_path(tmp_path, first).parent.mkdir()
    record = runs.result_path(tmp_path, first)
    record.write_text(json.dumps({"made_of": {"settings": first.seed}}))
    assert bakeoff.make(first) and made == [second, first]
    record.write_text(json.dumps({"made_of": {"settings": "others"}}))
    with pytest.raises(ValueError, match="other settings"):
        bakeoff.make(first)


def test_the_runs_of_stage_2_differ_only_in_what_is_compared(tmp_path):
    tuning = list(tuning_runs())
    assert len({run.name for run in tuning}) == len(tuning)
    configs = {run.arm: config_of(run, tmp_path, tmp_path / "hf") for run in tuning}
    assert set(configs) == set(ARMS)
    for config in configs.values():
        assert config.max_responses == BUDGET
        assert config.optimizer.schedule == "constant"
    assert configs["uniform"].sampler.mixture_ratio == 0
    assert configs["posterior + dynamic sampling"].sampler.max_refills > 0

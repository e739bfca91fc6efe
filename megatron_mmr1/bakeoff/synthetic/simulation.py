"""One arm on one synthetic pool until its budget of generated responses is spent.

Owns the loop and the measures. Budget: every response counts alike, whether it is trained on, made
only to score a prompt, or discarded by dynamic sampling. What is left at the end is always 0: the
last draw is cut to what remains.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_mmr1.bakeoff.synthetic.arms import Arm, FlatPrior
from megatron_mmr1.bakeoff.synthetic.policy import Drift, Policy
from megatron_mmr1.bakeoff.synthetic.pools import NUM_PROMPTS, Pool
from megatron_mmr1.sampling.base import Draw, Occurrences, refill_size
from megatron_mmr1.sampling.estimators import Posterior
from megatron_mmr1.sampling.scores import mixed_probability
from megatron_mmr1.sampling.statistics import NUM_COLUMNS, GroupStats
from megatron_mmr1.sampling.vas import PromptPool, VasSampler

NUM_POINTS = 16  # of the learning curve, evenly spaced over the budget


@dataclass(frozen=True, slots=True)
class Setting:
    """What all arms have alike.

    Attributes:
        budget: responses; a multiple of `group_size`. The default is ten passes over the pool, as
            the paper's ten episodes; its 31 steps a pass are about the paper's 29.
    """

    budget: int = 10 * NUM_PROMPTS * 8
    batch_size: int = 64
    group_size: int = 8
    drift: Drift = field(default_factory=Drift)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an arm made of its budget.

    Attributes:
        generated: responses in all; `scoring` and `discarded` of them were not trained on.
        num_steps: training steps; num_groups: groups trained on; num_mixed: those with variance.
        pass_rate, frontier: final mean pass rate of the pool, and of its frontier.
        coverage: share of the prompts that a training step drew.
        brier: expected Brier score of the predicted probability of a mixed group, for a prompt
            drawn uniformly from the pool, mean over the curve's points after the first training
            step; NaN where nothing was predicted. So it can be compared between arms.
        rollouts, pass_rates, frontiers: the learning curve.
    """

    generated: int
    scoring: int
    discarded: int
    num_steps: int
    num_groups: int
    num_mixed: int
    pass_rate: float
    frontier: float
    coverage: float
    brier: float
    rollouts: list[int]
    pass_rates: list[float]
    frontiers: list[float]


class Drawer(Protocol):
    """The part of a sampler that the loop needs."""

    def next_batch(self) -> list[Draw]:
        """Draw for a step."""
        ...

    def ask_for(self, num_prompts: int) -> None:
        """Set the size of the next draw."""
        ...

    def prompts_to_score(self, step: int) -> list[int]:
        """Return the prompts to be scored before a step."""
        ...

    def observe_scoring(self, step: int, stats: GroupStats) -> None:
        """Take in scoring rollouts."""
        ...

    def observe(self, step: int, stats: GroupStats) -> None:
        """Take in a step's rollouts."""
        ...


class Oracle:
    """Knows the current pass rates, and draws the prompts whose groups are most likely mixed."""

    def __init__(self, policy: Policy, setting: Setting):
        self.policy, self.setting = policy, setting

    def next_batch(self) -> list[Draw]:
        """Draw the best prompts, each once."""
        worth_P = self.policy.mixed_P(self.setting.group_size)
        size = self.setting.batch_size
        return Occurrences().number(np.argpartition(-worth_P, size)[:size].tolist())

    def ask_for(self, num_prompts: int) -> None:
        """Never asked: this arm has no refills."""

    def prompts_to_score(self, step: int) -> list[int]:
        """Return none."""
        return []

    def observe_scoring(self, step: int, stats: GroupStats) -> None:
        """Learn nothing."""

    def observe(self, step: int, stats: GroupStats) -> None:
        """Learn nothing."""


def simulate(arm: Arm, pool: Pool, seed: int, setting: Setting) -> Outcome:
    """Spend the budget."""
    return _Run(arm, pool, seed, setting).run()


class _Run:
    def __init__(self, arm: Arm, pool: Pool, seed: int, setting: Setting):
        self.arm, self.pool, self.setting = arm, pool, setting
        self.policy = Policy(pool, setting.drift, seed)
        self.sampler = _build(arm, pool, self.policy, seed, setting)
        self.left = setting.budget
        self.scoring = self.discarded = self.num_steps = self.num_groups = self.num_mixed = 0
        self.is_drawn_P = np.zeros(len(pool.logit_P), bool)
        self.rollouts: list[int] = []
        self.pass_rates: list[float] = []
        self.frontiers: list[float] = []
        self.briers: list[float] = []

    def run(self) -> Outcome:
        """Train until nothing is left."""
        self._record()
        while self.left:
            step = self.num_steps + 1
            self._score(step)
            if self.left:
                kept, stats = self._collect()
                self.policy.train(kept, self.setting.batch_size)
                self.sampler.observe(step, stats)
                self.num_steps = step
                self.num_groups += len(kept.index_K)
                self.num_mixed += int(kept.is_mixed_K.sum())
                self.is_drawn_P[stats.index_K] = True
            self._record()
        measured = [brier for brier in self.briers if not np.isnan(brier)]
        return Outcome(
            self.setting.budget - self.left,
            self.scoring,
            self.discarded,
            self.num_steps,
            self.num_groups,
            self.num_mixed,
            self.pass_rates[-1],
            self.frontiers[-1],
            float(self.is_drawn_P.mean()),
            float(np.mean(measured)) if measured else float("nan"),
            self.rollouts,
            self.pass_rates,
            self.frontiers,
        )

    def _generate(self, index: list[int], num_responses: int) -> GroupStats:
        """Generate as many groups as the budget still has."""
        index = index[: self.left // num_responses]
        self.left -= len(index) * num_responses
        return self.policy.generate(np.array(index, np.int64), num_responses)

    def _score(self, step: int) -> None:
        """As trainers/collect.score_if_due."""
        if (index := self.sampler.prompts_to_score(step)) and self.arm.config:
            before = self.left
            stats = self._generate(index, self.arm.config.scoring_rollouts)
            self.scoring += before - self.left
            self.sampler.observe_scoring(step, stats)

    def _collect(self) -> tuple[GroupStats, GroupStats]:
        """As trainers/collect.collect: the groups to train on, and all of them."""
        size, group_size = self.setting.batch_size, self.setting.group_size
        max_refills = self.arm.config.max_refills if self.arm.config else 0
        rows: list[np.ndarray] = []
        stats = GroupStats.of_rows(np.zeros((0, NUM_COLUMNS)))
        for refill in range(1 + max_refills):
            if refill:
                num_mixed = int(stats.is_mixed_K.sum())
                if num_mixed >= size or self.left < group_size:
                    break
                self.sampler.ask_for(refill_size(num_mixed, len(stats.index_K), size))
            index = [draw.row for draw in self.sampler.next_batch()]
            rows.append(self._generate(index, group_size).to_rows())
            stats = GroupStats.of_rows(np.concatenate(rows))
        # Mixed groups first, then what is missing, each in the order in which they came.
        kept = stats.take(np.argsort(~stats.is_mixed_K, kind="stable")[:size])
        self.discarded += (len(stats.index_K) - len(kept.index_K)) * group_size
        return kept, stats

    def _record(self) -> None:
        """Add the points of the learning curve that have been reached."""
        spent = self.setting.budget - self.left
        while spent * NUM_POINTS >= len(self.rollouts) * self.setting.budget:
            self.rollouts.append(len(self.rollouts) * self.setting.budget // NUM_POINTS)
            self.pass_rates.append(float(self.policy.pass_rate_P.mean()))
            self.frontiers.append(float(self.policy.pass_rate_P[self.pool.is_frontier_P].mean()))
            if self.num_steps:
                self.briers.append(self._brier())

    def _brier(self) -> float:
        true_P = self.policy.mixed_P(self.setting.group_size)
        predicted_P = true_P
        if isinstance(self.sampler, VasSampler):
            estimator, version = self.sampler.estimator, self.sampler.step
            if isinstance(estimator, Posterior):
                predicted_P = estimator.predicted(version, np.arange(len(true_P)))
            else:
                predicted_P = mixed_probability(
                    estimator.pass_rate(version), self.setting.group_size
                )
        return float(np.mean((predicted_P - true_P) ** 2 + true_P * (1.0 - true_P)))


def _build(arm: Arm, pool: Pool, policy: Policy, seed: int, setting: Setting) -> Drawer:
    if arm.config is None:
        return Oracle(policy, setting)
    num_prompts = len(pool.logit_P)
    strata = {"record": pool.records, "category": pool.levels, "global": [""] * num_prompts}
    ids = [f"p{i}" for i in range(num_prompts)]
    sampler = VasSampler(
        PromptPool(ids, pool.levels, strata[arm.config.prior]),
        setting.batch_size,
        arm.config,
        seed,
        setting.group_size,
    )
    if arm.is_flat:
        assert isinstance(sampler.estimator, Posterior)
        sampler.estimator.rates = FlatPrior(
            sampler.estimator.rates.stratum_P, arm.config.discount, arm.config.prior_discount
        )
    return sampler

"""A policy that is nothing but the pass rates of its prompts: which groups come, how it learns.

P prompts, K groups of G responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_mmr1.bakeoff.synthetic.pools import Pool
from megatron_mmr1.sampling.scores import mixed_probability, outcome_variance_score
from megatron_mmr1.sampling.statistics import GroupStats


@dataclass(frozen=True, slots=True)
class Drift:
    """How logits of pass rates move, in logits. The law is `Policy.train`'s.

    Attributes:
        own: for a prompt, for each mixed group of it.
        transfer: for every prompt, in a step all of whose groups are mixed.
        walk: standard deviation of a prompt's own random step.
    """

    own: float = 0.02
    transfer: float = 0.002
    walk: float = 0.05


class Policy:
    """Known pass rates, which training moves. All randomness follows from the seed."""

    def __init__(self, pool: Pool, drift: Drift, seed: int):
        self.pool, self.drift = pool, drift
        self.logit_P = pool.logit_P.copy()
        self.pass_rate_P = 1.0 / (1.0 + np.exp(-self.logit_P))
        # Two streams: every arm has the same walk, however many groups it generates.
        self._walk_rng = np.random.default_rng([seed, 2])
        self._rng = np.random.default_rng([seed, 3])

    def mixed_P(self, group_size: int) -> np.ndarray:
        """Return the probability that a group of each prompt is mixed."""
        return mixed_probability(self.pass_rate_P, group_size)

    def generate(self, index_K: np.ndarray, group_size: int) -> GroupStats:
        """Sample groups.

        Correct responses are binomial. TDS = 0.5 + 0.2 (4p(1 - p) - 0.5) + what is the prompt's own
        (standard deviation 0.1) + the group's (0.1), within [0, 1]: over a pool its correlation
        with p(1 - p) is 0.3 to 0.6.
        """
        pass_rate_K = self.pass_rate_P[index_K]
        num_correct_K = self._rng.binomial(group_size, pass_rate_K)
        diversity_K = (
            0.4
            + 0.8 * outcome_variance_score(pass_rate_K)
            + self.pool.diversity_P[index_K]
            + self._rng.normal(0.0, 0.1, len(index_K))
        )
        return GroupStats(
            index_K,
            num_correct_K,
            np.full(len(index_K), group_size, np.int64),
            diversity_K.clip(0.0, 1.0),
            np.where(self.pool.is_choice_P[index_K], group_size - num_correct_K, 0),
        )

    def train(self, groups: GroupStats, batch_size: int) -> None:
        """Move the logits z by one step on a batch of B groups, M of them mixed, m_i of prompt i.

        z_i += own * m_i + transfer * M / B + walk * normal. A group without variance has no
        gradient: it moves nothing.
        """
        mixed = groups.index_K[groups.is_mixed_K]
        self.logit_P += self.drift.own * np.bincount(mixed, minlength=len(self.logit_P))
        self.logit_P += self.drift.transfer * len(mixed) / batch_size
        self.logit_P += self.drift.walk * self._walk_rng.standard_normal(len(self.logit_P))
        self.pass_rate_P = 1.0 / (1.0 + np.exp(-self.logit_P))

"""What is known of each prompt, and the score that follows: two sources of knowledge.

`Posterior` learns from the training rollouts alone. `Refresh` is the paper's Algorithm 1: extra
rollouts of every prompt, again and again, only to score it. (released_code.py is a third, with the
released code's mistakes.) An estimator does not draw.

P prompts, K groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from megatron_mmr1.config.schema import SamplerConfig
from megatron_mmr1.sampling import calibration, scores
from megatron_mmr1.sampling.calibration import MixedGroupModel, Reliability
from megatron_mmr1.sampling.posterior import PassRates
from megatron_mmr1.sampling.statistics import GroupStats

_BLOCK = 1 << 20  # prompts that are scored at once


class Estimator(ABC):
    """Knowledge of P prompts. A policy version is the number of optimizer batches it has seen."""

    def __init__(self, stratum_P: np.ndarray, config: SamplerConfig, group_size: int):
        num_prompts = len(stratum_P)
        self.config = config
        self.group_size = group_size
        self.tds_P = np.full(num_prompts, np.nan, np.float32)  # of the last group; NaN = none
        self._tds_total, self._num_tds = 0.0, 0

    @abstractmethod
    def observe(self, version: int, stats: GroupStats) -> None:
        """Take in training groups (judged ones only), sampled by policy `version`."""

    @abstractmethod
    def pass_rate(self, version: int, index: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return what is believed of pass rates, float64; NaN where nothing is."""

    @abstractmethod
    def beta(self, version: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the posteriors' parameters, [P] each; None where there is no posterior."""

    @abstractmethod
    def score(self, version: int, index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the scores of some prompts, float64, not negative; higher = drawn more often."""

    def is_refresh_due(self, step: int) -> bool:
        """Whether every prompt must be scored, with rollouts made for it, before `step`."""
        return False

    def observe_scoring(self, version: int, stats: GroupStats) -> None:
        """Take in groups that were made only to score their prompts."""
        raise NotImplementedError(f"{type(self).__name__} asks for no scoring rollouts")

    def all_scores(self, version: int, rng: np.random.Generator) -> np.ndarray:
        """Return every prompt's score, float64 [P], a block of prompts at a time."""
        num_prompts = len(self.tds_P)
        out_P = np.empty(num_prompts)
        for start in range(0, num_prompts, _BLOCK):
            index = np.arange(start, min(start + _BLOCK, num_prompts))
            out_P[index] = self.score(version, index, rng)
        return out_P

    def diversity(self, index: np.ndarray) -> np.ndarray:
        """Return TDS of some prompts, float64; those without a group have the others' mean."""
        usual = self._tds_total / self._num_tds if self._num_tds else 0.5
        tds = self.tds_P[index].astype(np.float64)
        return np.where(np.isnan(tds), usual, tds)

    def _set_diversity(self, index: np.ndarray, diversity: np.ndarray) -> None:
        """Replace TDS of some prompts, and keep the mean of all without going over all."""
        where = np.unique(index)
        before = self.tds_P[where]
        self.tds_P[index] = diversity
        self._num_tds += int(np.isnan(before).sum())
        self._tds_total += float(
            self.tds_P[where].astype(np.float64).sum() - np.nansum(before.astype(np.float64))
        )

    def metrics(self) -> dict[str, float]:
        """Return numbers for the log, keys "sampler/..."."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all of it: arrays [P] under "prompts", the rest beside."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, whose arrays [P] are of this estimator's prompts."""


class Posterior(Estimator):
    """A discounted Beta posterior a prompt, from training rollouts: no rollout is made to score.

    Scores (`config.score`), each to the power `config.power`:
        vps: alpha * E[p(1 - p)] + beta * TDS.
        variance: E[p(1 - p)].
        mixed: the probability that the next group is mixed.
        calibrated: that probability as calibration.py predicts it.
    With `config.thompson`, of a pass rate drawn from the posterior in place of the expectation
    (vps, variance, mixed).
    """

    def __init__(self, stratum_P: np.ndarray, config: SamplerConfig, group_size: int):
        super().__init__(stratum_P, config, group_size)
        self.rates = PassRates(stratum_P, config.discount, config.prior_discount)
        self.model = MixedGroupModel()
        self.reliability = Reliability()

    def observe(self, version: int, stats: GroupStats) -> None:
        """Compare the groups with what was predicted of them, then learn from them."""
        index, is_mixed = stats.index_K, stats.is_mixed_K.astype(np.float64)
        self.reliability.record(self.predicted(version, index), is_mixed)
        if self.config.score == "calibrated" and len(index):
            self.model.learn(self._features(version, index), is_mixed)
        self.rates.observe(index, stats.num_correct_K, stats.num_judged_K, version)
        self._set_diversity(index, stats.diversity_K)

    def mixed(self, version: int, index: np.ndarray) -> np.ndarray:
        """Return the probability of a mixed group under the posteriors."""
        return scores.expected_mixed_probability(*self.rates.beta(version, index), self.group_size)

    def predicted(self, version: int, index: np.ndarray) -> np.ndarray:
        """Return the probability of a mixed group: calibrated where that is the score."""
        if self.config.score == "calibrated":
            return self.model.predict(self._features(version, index))
        return self.mixed(version, index)

    def pass_rate(self, version: int, index: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the posteriors' means."""
        a, b = self.rates.beta(version, index)
        return a / (a + b)

    def beta(self, version: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the posteriors' parameters."""
        return self.rates.beta(version)

    def score(self, version: int, index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return `config.score`, see the class."""
        config, kind = self.config, self.config.score
        if kind == "calibrated":
            return self.predicted(version, index) ** config.power
        a, b = self.rates.beta(version, index)
        if config.thompson:
            pass_rate = rng.beta(a, b)
            variance = scores.outcome_variance_score(pass_rate)
            mixed = scores.mixed_probability(pass_rate, self.group_size)
        else:
            variance = scores.expected_variance(a, b)
            mixed = scores.expected_mixed_probability(a, b, self.group_size)
        if kind == "vps":
            found = scores.variance_promotion_score(
                variance, self.diversity(index), config.alpha, config.beta
            )
        else:
            found = variance if kind == "variance" else mixed
        return np.maximum(found, 0.0) ** config.power

    def _features(self, version: int, index: np.ndarray) -> np.ndarray:
        last = self.rates.version_P[index]
        age = np.where(last < 0, 0, np.maximum(version - last, 0))
        prior_C = scores.expected_mixed_probability(*self.rates.priors(), self.group_size)
        stratum_mixed = prior_C[self.rates.stratum_P[index]]
        return calibration.features(
            self.mixed(version, index), self.diversity(index), age, stratum_mixed
        )

    def metrics(self) -> dict[str, float]:
        """Return predictions beside what came; the fitted weights where they are used."""
        found = dict(self.reliability.last)
        if self.config.score == "calibrated":
            found |= {
                f"sampler/weight_{name}": float(weight)
                for name, weight in zip(calibration.FEATURES, self.model.weights_F, strict=True)
            }
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return posteriors, priors, fit and record of predictions."""
        return {
            **(rates := self.rates.state_dict()),
            "prompts": {"tds": self.tds_P.copy(), **rates["prompts"]},
            "tds": (self._tds_total, self._num_tds),
            "model": self.model.state_dict(),
            "reliability": self.reliability.sums_3B.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.tds_P = state["prompts"]["tds"].copy()
        self._tds_total, self._num_tds = state["tds"]
        self.rates.load_state_dict(state)
        self.model.load_state_dict(state["model"])
        self.reliability.sums_3B = state["reliability"].copy()


class Refresh(Estimator):
    """The paper's Algorithm 1: N rollouts of every prompt before step 1 and every T steps.

    VPS = alpha * p(1 - p) + beta * TDS, both of the last scoring rollouts; training rollouts are
    not used. Departure where the paper is silent: a prompt that no answer could be judged of has
    the mean of the others.
    """

    def __init__(self, stratum_P: np.ndarray, config: SamplerConfig, group_size: int):
        super().__init__(stratum_P, config, group_size)
        self.pass_rate_P = np.full(len(stratum_P), np.nan)
        self._usual_ovs = 0.25

    def is_refresh_due(self, step: int) -> bool:
        """Before step 1, and then every `update_every` steps."""
        return (step - 1) % self.config.update_every == 0

    def observe(self, version: int, stats: GroupStats) -> None:
        """Learn nothing: only scoring rollouts count here."""

    def observe_scoring(self, version: int, stats: GroupStats) -> None:
        """Replace the statistics of the prompts that were scored."""
        self.pass_rate_P[stats.index_K] = stats.num_correct_K / stats.num_judged_K
        self._set_diversity(stats.index_K, stats.diversity_K)
        self._set_usual()

    def _set_usual(self) -> None:
        known_P = self.pass_rate_P[~np.isnan(self.pass_rate_P)]
        if len(known_P):
            self._usual_ovs = float(scores.outcome_variance_score(known_P).mean())

    def pass_rate(self, version: int, index: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the scoring rollouts' share of correct ones."""
        return self.pass_rate_P[index]

    def beta(self, version: int) -> None:
        """Return None: a share is all there is."""

    def score(self, version: int, index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the VPS."""
        variance = scores.outcome_variance_score(self.pass_rate_P[index])
        variance = np.where(np.isnan(variance), self._usual_ovs, variance)
        return scores.variance_promotion_score(
            variance, self.diversity(index), self.config.alpha, self.config.beta
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the last scoring rollouts' statistics."""
        return {
            "prompts": {"tds": self.tds_P.copy(), "pass_rate": self.pass_rate_P.copy()},
            "tds": (self._tds_total, self._num_tds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.tds_P = state["prompts"]["tds"].copy()
        self._tds_total, self._num_tds = state["tds"]
        self.pass_rate_P = state["prompts"]["pass_rate"].copy()
        self._set_usual()

"""Variance-Aware Sampling (arXiv:2509.21268, Alg. 1): the sampler, whatever it knows and scores.

Owns the mixture of the two halves of a batch, when scores are renewed, and the record of draws.
What is known of prompts is estimators.py's.

Departure from the paper, unless `with_replacement`: no prompt occurs twice in a batch. Within a
batch the scored draw is then sequential: each next prompt in proportion to its score among those
not yet taken, and only the first is exactly in proportion.

P prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_mmr1.config.schema import SamplerConfig
from megatron_mmr1.sampling.base import Draw, Occurrences, Sampler
from megatron_mmr1.sampling.estimators import Estimator, Posterior, Refresh
from megatron_mmr1.sampling.passes import UniformPasses
from megatron_mmr1.sampling.released_code import OnePermutation, ReleasedCode
from megatron_mmr1.sampling.scores import (
    effective_share,
    outcome_variance_score,
    variance_promotion_score,
)
from megatron_mmr1.sampling.statistics import GroupStats
from megatron_mmr1.sampling.weight_tree import WeightTree

ESTIMATORS: dict[str, type[Estimator]] = {
    "posterior": Posterior,
    "refresh": Refresh,
    "released_code": ReleasedCode,
}


@dataclass(frozen=True, slots=True)
class PromptPool:
    """What a sampler knows of the data set.

    Attributes:
        ids: unique.
        categories: what the data calls each kind of question; for tables.
        strata: whose prompts share a prior: `config.prior` says what they are.
    """

    ids: Sequence[str]
    categories: Sequence[str]
    strata: Sequence[str]


def num_scored_draws(mixture_ratio: float, batch_size: int) -> int:
    """Return floor(lambda * B), exact in the decimal as written: 0.29 * 100 is 29, not 28."""
    return int(Fraction(str(mixture_ratio)) * batch_size)


class VasSampler(Sampler):
    """floor(lambda * B) prompts in proportion to their scores, the rest from reshuffled passes.

    When fewer prompts than that have a positive score, the uniform half fills the batch; with all
    scores zero the whole batch is uniform. With lambda = 0 it is uniform, and what is known of the
    prompts is only recorded. Scores of all prompts are renewed every `config.update_every` steps
    and at the end of each epoch (as many draws as there are prompts); those of the prompts that
    came back, at once, unless the paper's schedule says otherwise (`refresh`).

    Args:
        batch_size: `prompts_per_step` of all ranks.
        group_size: responses a prompt.
        num_steps: of the run, for a scheduled lambda.

    Raises:
        ValueError: two prompts share an id, or there are fewer prompts than a batch takes.
    """

    def __init__(
        self,
        pool: PromptPool,
        batch_size: int,
        config: SamplerConfig,
        seed: int,
        group_size: int = 1,
        num_steps: int = 1,
    ):
        self.pool, self.config, self.batch_size = pool, config, batch_size
        self._num_steps = num_steps
        num_prompts = len(pool.ids)
        _check_unique(pool.ids)
        if num_prompts < batch_size:
            raise ValueError(
                f"prompts_per_step={batch_size} exceeds the {num_prompts} prompts of data.train"
                f", and a step takes no prompt twice; use at most {num_prompts} or add prompts"
            )
        self.strata, stratum_P = np.unique(np.asarray(pool.strata, np.str_), return_inverse=True)
        self.estimator = ESTIMATORS[config.estimator](stratum_P, config, group_size)
        self.passes: UniformPasses | OnePermutation = (
            OnePermutation(num_prompts, seed)
            if config.estimator == "released_code"
            else UniformPasses(num_prompts, seed)
        )
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.tree = WeightTree(np.ones(num_prompts))
        self.draws_P = np.zeros(num_prompts, np.int32)
        self._num_covered = 0  # prompts that were ever drawn
        self._effective_share = 1.0  # of the weights when all were renewed
        self._mixture_ratio_used = config.mixture_ratio
        self.last_observed_P = np.full(num_prompts, -1, np.int32)
        self.step = 0  # of the last `observe`: also the number of policy versions so far
        self.steps_since_update = 0
        self.num_updates = 0
        self.num_drawn = 0
        self.num_epochs = 0
        self._drawn = Occurrences()  # of the step that is being drawn for
        self._num_wanted = batch_size
        self._is_table_due = False

    def next_batch(self) -> list[Draw]:
        """Draw the scored half, then the uniform half, and shuffle the two.

        Shuffled, since several optimizer steps may cut a batch in its order, and without
        replacement high scores tend to come first. A refill of the same step takes other prompts,
        as long as there are enough.
        """
        num, self._num_wanted = self._num_wanted, self.batch_size
        taken = set[int]() if self.config.with_replacement else self._drawn.drawn
        if len(taken) + num > len(self.pool.ids):
            taken = set()
        self._mixture_ratio_used = self.mixture_ratio
        scored = self._draw_scored(num_scored_draws(self.mixture_ratio, num), taken)
        if not self.config.with_replacement:
            taken |= set(scored)
        batch = scored + self.passes.take(num - len(scored), taken)
        if scored:
            batch = self.rng.permutation(batch).tolist()
        self._num_covered += int(np.sum(self.draws_P[np.unique(batch)] == 0))
        np.add.at(self.draws_P, batch, 1)
        self.num_drawn += len(batch)
        return self._drawn.number(batch)

    def ask_for(self, num_prompts: int) -> None:
        """Set the size of the next draw."""
        self._num_wanted = num_prompts

    @property
    def mixture_ratio(self) -> float:
        """Lambda of the next step: constant, or on its way to `final_mixture_ratio`."""
        first, last = self.config.mixture_ratio, self.config.final_mixture_ratio
        if last is None or self._num_steps < 2:
            return first
        done = min(self.step / (self._num_steps - 1), 1.0)
        return round(first + done * (last - first), 9)

    def _draw_scored(self, num: int, taken: set[int]) -> list[int]:
        """Draw in proportion to the scores; a share `floor` of the draws from all prompts alike."""
        if num == 0:
            return []
        num_floor = int(self.rng.binomial(num, self.config.floor)) if self.config.floor else 0
        drawn = self.tree.draw(
            self.rng.random(num - num_floor),
            with_replacement=self.config.with_replacement,
            excluded=np.fromiter(taken, np.int64, len(taken)),
        ).tolist()
        while num_floor:
            index = int(self.rng.integers(len(self.pool.ids)))
            if self.config.with_replacement or not (index in taken or index in drawn):
                drawn.append(index)
                num_floor -= 1
        return drawn

    def observe(self, step: int, stats: GroupStats) -> None:
        """Take in a step's groups; renew their scores, or all scores if that is due."""
        stats = self._checked(stats)
        self.estimator.observe(self.step, stats)
        self.last_observed_P[stats.index_K] = step
        self.step = step
        self._drawn.clear()
        self.steps_since_update += 1
        num_epochs = self.num_drawn // len(self.pool.ids)
        is_epoch_over, self.num_epochs = num_epochs > self.num_epochs, num_epochs
        if isinstance(self.estimator, Refresh):
            return  # the paper's schedule alone, see `observe_scoring`
        if is_epoch_over or self.steps_since_update >= self.config.update_every:
            self._renew()
        elif len(stats.index_K):
            index = np.unique(stats.index_K)
            self.tree.set(index, self.estimator.score(self.step, index, self.rng))

    def prompts_to_score(self, step: int) -> list[int]:
        """Return every prompt when the paper's schedule has come to that, else none."""
        is_due = self.estimator.is_refresh_due(step)
        return list(range(len(self.pool.ids))) if is_due else []

    def observe_scoring(self, step: int, stats: GroupStats) -> None:
        """Take in scoring rollouts, and renew all scores."""
        self.estimator.observe_scoring(self.step, self._checked(stats))
        self._renew()

    def _renew(self) -> None:
        self.tree.set_all(self.estimator.all_scores(self.step, self.rng))
        self._effective_share = effective_share(self.tree.weights)
        self.steps_since_update = 0
        self.num_updates += 1
        self._is_table_due = True

    def _checked(self, stats: GroupStats) -> GroupStats:
        num_prompts = len(self.pool.ids)
        bad = (stats.index_K < 0) | (stats.index_K >= num_prompts)
        if bad.any():
            raise ValueError(
                f"prompt {stats.index_K[bad][0]} is not among the {num_prompts} of data.train;"
                " observe only groups of prompts that this sampler drew"
            )
        for name in ("num_correct_K", "num_judged_K", "diversity_K"):
            values = getattr(stats, name)
            bad = ~(np.isfinite(values) & (values >= 0))
            if name == "num_correct_K":
                bad |= values > stats.num_judged_K
            if bad.any():
                prompt_id = self.pool.ids[stats.index_K[bad][0]]
                raise ValueError(
                    f"{name}={values[bad][0]} of prompt {prompt_id!r} can't be: counts are 0 or"
                    " more, no more are correct than judged, and diversities are finite"
                )
        return stats.judged()

    def update_table(self) -> dict[str, np.ndarray] | None:
        """Return the rows for prompt_stats.parquet, each [P], if all scores were renewed.

        `weight` is the score in force; `age` the number of steps since the last judged group, -1 =
        never.
        """
        if not self._is_table_due:
            return None
        self._is_table_due = False
        is_visited = self.last_observed_P >= 0
        pass_rate = self.estimator.pass_rate(self.step)
        ovs, tds = outcome_variance_score(pass_rate), self.estimator.tds_P.astype(np.float64)
        nothing = np.full(len(pass_rate), np.nan)
        posterior_a, posterior_b = self.estimator.beta(self.step) or (nothing, nothing)
        return {
            "step": np.full(len(pass_rate), self.step, np.int64),
            "prompt_id": np.asarray(self.pool.ids, np.str_),
            "category": np.asarray(self.pool.categories, np.str_),
            "pass_rate": pass_rate,
            "posterior_a": posterior_a,
            "posterior_b": posterior_b,
            "ovs": ovs,
            "tds": tds,
            "vps": variance_promotion_score(ovs, tds, self.config.alpha, self.config.beta),
            "weight": self.tree.weights.copy(),
            "draws": self.draws_P.astype(np.int64),
            "age": np.where(is_visited, self.step - self.last_observed_P, -1).astype(np.int64),
        }

    def metrics(self) -> dict[str, float]:
        """Return coverage (share of prompts ever drawn), the effective size of the weights when all
        were last renewed, the number of renewals, and lambda of the last draw. Not O(P).
        """
        return {
            "sampler/coverage": self._num_covered / len(self.pool.ids),
            "sampler/ess": self._effective_share,
            "sampler/updates": float(self.num_updates),
            "sampler/mixture_ratio": self._mixture_ratio_used,
            **self.estimator.metrics(),
        }

    def calibration(self) -> np.ndarray | None:
        """Return how predictions of mixed groups did, if any were made."""
        known = self.estimator
        return known.reliability.sums_3B if isinstance(known, Posterior) else None

    def state_dict(self) -> dict[str, Any]:
        """Return all that later draws depend on (generators as JSON: 128-bit integers)."""
        return {
            "ids": list(self.pool.ids),
            "strata": self.strata.tolist(),
            "estimator": self.config.estimator,
            "known": self.estimator.state_dict(),
            "prompts": {
                "weights": self.tree.weights.copy(),
                "draws": self.draws_P.copy(),
                "last_observed": self.last_observed_P.copy(),
            },
            "effective_share": self._effective_share,
            "passes": self.passes.state_dict(),
            "rng": json.dumps(self.rng.bit_generator.state),
            "step": self.step,
            "steps_since_update": self.steps_since_update,
            "num_updates": self.num_updates,
            "num_drawn": self.num_drawn,
            "num_epochs": self.num_epochs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> str:
        """Continue from `state`.

        Prompts are matched by id. With the same ones in the same order the draws go on exactly;
        else those that are new are as if never drawn, those that are gone are forgotten, and the
        uniform half begins a new pass.

        Raises:
            ValueError: `state` is of another estimator.
        """
        if state["estimator"] != self.config.estimator:
            raise ValueError(
                f"sampler.estimator={self.config.estimator!r}, and the checkpoint's is"
                f" {state['estimator']!r}; resume with the same, or start another run"
            )
        notice = ""
        if state["ids"] != list(self.pool.ids):
            state, notice = self._matched(state)
        known = state["known"]
        if state["strata"] != self.strata.tolist() and "moments" in known:
            known = known | {"moments": self._matched_moments(known["moments"], state["strata"])}
        self.estimator.load_state_dict(known)
        self.tree.set_all(state["prompts"]["weights"])
        self._effective_share = state["effective_share"]
        self.draws_P = state["prompts"]["draws"].copy()
        self._num_covered = int(np.sum(self.draws_P > 0))
        self.last_observed_P = state["prompts"]["last_observed"].copy()
        self.rng.bit_generator.state = json.loads(state["rng"])
        for name in ("step", "steps_since_update", "num_updates", "num_drawn", "num_epochs"):
            setattr(self, name, state[name])
        if notice:
            self._renew()
        else:
            self.passes.load_state_dict(state["passes"])
        self._drawn.clear()
        self._is_table_due = False
        return notice

    def _matched(self, state: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Return `state`, of other prompts, for these ones; say how many are new or gone."""
        place = {prompt_id: i for i, prompt_id in enumerate(state["ids"])}
        old_P = np.array([place.get(prompt_id, -1) for prompt_id in self.pool.ids], np.int64)
        is_old_P = old_P >= 0

        def match(fresh: dict[str, np.ndarray], saved: dict[str, np.ndarray]) -> dict[str, Any]:
            matched = {name: values_P.copy() for name, values_P in fresh.items()}
            for name, values_P in matched.items():
                values_P[is_old_P] = saved[name][old_P[is_old_P]]
            return matched

        fresh = self.state_dict()
        known = match(fresh["known"]["prompts"], state["known"]["prompts"])
        tds_P = known["tds"].astype(np.float64)
        total = float(np.nansum(tds_P)), int((~np.isnan(tds_P)).sum())
        num_new, num_gone = int((~is_old_P).sum()), len(place) - int(is_old_P.sum())
        return state | {
            "known": state["known"] | {"prompts": known, "tds": total},
            "prompts": match(fresh["prompts"], state["prompts"]),
        }, (
            f"data.train is not the checkpoint's: {num_new} prompts are new, {num_gone} are gone,"
            f" {int(is_old_P.sum())} were matched by id; the uniform half begins a new pass"
        )

    def _matched_moments(self, moments_3C: np.ndarray, strata: list[str]) -> np.ndarray:
        """Bring strata's moments into this sampler's order; new strata know nothing yet."""
        place = {name: i for i, name in enumerate(strata)}
        matched_3C = np.zeros((3, len(self.strata)))
        for i, name in enumerate(self.strata.tolist()):
            if name in place:
                matched_3C[:, i] = moments_3C[:, place[name]]
        return matched_3C


def _check_unique(ids: Sequence[str]) -> None:
    index_of = {prompt_id: index for index, prompt_id in enumerate(ids)}
    if len(index_of) != len(ids):
        repeated = next(p for i, p in enumerate(ids) if index_of[p] != i)
        raise ValueError(
            f"prompt_id={repeated!r} occurs more than once in data.train; make every id unique"
        )

"""What is known about each prompt: pass rate, OVS, TDS and VPS (arXiv:2509.21268, Alg. 1).

Owns the statistics and when they become scores. Does not draw. P is the number of prompts in the
data set.

Departures from the paper: scores come from training rollouts, not from extra scoring rollouts, so
only the prompts that were drawn are renewed, each `update_every` steps; a prompt that was never
observed has the mean score of the others. As in the paper there is no momentum: an update REPLACES
a prompt's old score. Departures from the released code: OVS uses verdicts (correct or not), never
partial credit; TDS grows with diversity (the released code adds the similarity); nothing is min-max
normalised after combining.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_mmr1.types import PromptStats

_ARRAYS = (
    *("pending_correct", "pending_judged", "pending_groups", "pending_diversity"),
    *("pass_rate", "tds", "vps", "last_observed", "draws"),
)


def outcome_variance_score(pass_rate: np.ndarray) -> np.ndarray:
    """Return OVS = p(1 - p), the paper's scale: at most 0.25, at p = 1/2; higher = drawn more."""
    return pass_rate * (1.0 - pass_rate)


class PromptScores:
    """Statistics and scores of P prompts.

    Attributes:
        pass_rate, tds: float64 [P], as of the last update; NaN for a prompt never observed.
        vps: float64 [P], the score in force, alpha * OVS + beta * TDS; higher = drawn more often.
            Never-observed prompts have the mean of the others, and 1 as long as there are no
            others.
        last_observed: int64 [P], step of the last judged group; -1 = never.
        draws: int64 [P], how often each prompt was drawn.
        pending_*: [P], counts since the last update; not yet in any score.
    """

    def __init__(
        self,
        prompt_ids: Sequence[str],
        categories: Sequence[str],
        alpha: float,
        beta: float,
        update_every: int,
    ):
        self.prompt_ids = list(prompt_ids)
        self.categories = list(categories)
        self.alpha = alpha
        self.beta = beta
        self.update_every = update_every
        self.index_of = {prompt_id: index for index, prompt_id in enumerate(self.prompt_ids)}
        num_prompts = len(self.prompt_ids)
        assert len(self.categories) == num_prompts, "one category a prompt"
        if len(self.index_of) != num_prompts:
            repeated = next(p for i, p in enumerate(self.prompt_ids) if self.index_of[p] != i)
            raise ValueError(
                f"prompt_id={repeated!r} occurs more than once in data.train; make every id unique"
            )
        self.pending_correct = np.zeros(num_prompts, np.int64)
        self.pending_judged = np.zeros(num_prompts, np.int64)
        self.pending_groups = np.zeros(num_prompts, np.int64)
        self.pending_diversity = np.zeros(num_prompts)
        self.pass_rate = np.full(num_prompts, np.nan)
        self.tds = np.full(num_prompts, np.nan)
        self.vps = np.ones(num_prompts)
        self.last_observed = np.full(num_prompts, -1, np.int64)
        self.draws = np.zeros(num_prompts, np.int64)
        self.steps_since_update = 0
        self.num_updates = 0
        self.updated_at: int | None = None  # the last observed step, if it ended in an update

    def observe(self, step: int, stats: Sequence[PromptStats]) -> None:
        """Pool the groups of one step; every `update_every` calls, turn the pool into scores.

        A group with num_judged == 0 taught nothing and is not an observation.

        Raises:
            ValueError: a prompt_id is not in the data set; nothing has been taken in then.
        """
        unknown = [s.prompt_id for s in stats if s.prompt_id not in self.index_of]
        if unknown:
            raise ValueError(
                f"prompt_id={unknown[0]!r} is not among the {len(self.prompt_ids)} prompts of"
                " data.train; observe only groups of prompts that this sampler drew"
            )
        for group in stats:
            if group.num_judged == 0:
                continue
            index = self.index_of[group.prompt_id]
            self.pending_correct[index] += group.num_correct
            self.pending_judged[index] += group.num_judged
            self.pending_groups[index] += 1
            self.pending_diversity[index] += group.diversity
            self.last_observed[index] = step
        self.steps_since_update += 1
        self.updated_at = None
        if self.steps_since_update >= self.update_every:
            self._update()
            self.updated_at = step

    def _update(self) -> None:
        """Replace the scores of the prompts observed since the last update (Alg. 1).

        Several groups of one prompt are pooled: counts are summed, and diversity is the mean over
            groups.
        """
        is_new = self.pending_groups > 0
        self.pass_rate[is_new] = self.pending_correct[is_new] / self.pending_judged[is_new]
        self.tds[is_new] = self.pending_diversity[is_new] / self.pending_groups[is_new]
        is_visited = ~np.isnan(self.pass_rate)
        if is_visited.any():
            scores = self.alpha * outcome_variance_score(self.pass_rate) + self.beta * self.tds
            self.vps = np.where(is_visited, scores, scores[is_visited].mean())
        self.pending_correct[:] = 0
        self.pending_judged[:] = 0
        self.pending_groups[:] = 0
        self.pending_diversity[:] = 0.0
        self.steps_since_update = 0
        self.num_updates += 1

    def update_table(self) -> dict[str, np.ndarray] | None:
        """Return the rows for prompt_stats.parquet, each [P], if the last `observe` made an update.

        `vps` is the score in force; `age` is the number of steps since the last judged group, -1 =
        never.
        """
        if self.updated_at is None:
            return None
        is_visited = ~np.isnan(self.pass_rate)
        return {
            "step": np.full(len(self.prompt_ids), self.updated_at, np.int64),
            "prompt_id": np.array(self.prompt_ids, dtype=np.str_),
            "category": np.array(self.categories, dtype=np.str_),
            "pass_rate": self.pass_rate.copy(),
            "ovs": outcome_variance_score(self.pass_rate),
            "tds": self.tds.copy(),
            "vps": self.vps.copy(),
            "draws": self.draws.copy(),
            "age": np.where(is_visited, self.updated_at - self.last_observed, -1),
        }

    def metrics(self) -> dict[str, float]:
        """Return coverage (share of prompts ever drawn), mean VPS, its effective size, and updates.

        The effective sample size is (sum w)^2 / sum w^2 over the number of prompts: 1 = all alike.
        All-zero scores count as alike, since drawing is uniform then. In a uniform run it is that
        of scores not used.
        """
        squares = float(np.sum(self.vps**2))
        ess = float(np.sum(self.vps)) ** 2 / squares / len(self.vps) if squares > 0 else 1.0
        return {
            "sampler/coverage": float(np.mean(self.draws > 0)),
            "sampler/vps_mean": float(np.mean(self.vps)),
            "sampler/ess": ess,
            "sampler/updates": float(self.num_updates),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything above but the settings, as numbers, strings, lists and dicts."""
        return {
            "prompt_ids": list(self.prompt_ids),
            "steps_since_update": self.steps_since_update,
            "num_updates": self.num_updates,
            **{name: getattr(self, name).tolist() for name in _ARRAYS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: `state` was saved for other prompts, or for the same in another order.
        """
        if state["prompt_ids"] != self.prompt_ids:
            raise ValueError(
                f"data.train has {len(self.prompt_ids)} prompts that are not, in order, the"
                f" {len(state['prompt_ids'])} of the checkpoint; resume with the same data set"
            )
        self.steps_since_update = state["steps_since_update"]
        self.num_updates = state["num_updates"]
        self.updated_at = None
        for name in _ARRAYS:
            setattr(self, name, np.array(state[name], dtype=getattr(self, name).dtype))

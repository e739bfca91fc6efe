"""The sampler of MMR1's released code, mistakes included, to compare with and to reproduce.

Source: the released repository (LengSicong/MMR1). What differs from the paper's Algorithm 1, and
what no other sampler of ours does:

- accuracies, not verdicts, make the OVS: a wrong multiple choice counts 0.1, so that a group
  without a right answer looks as if it had variance;
- with beta > 0, the raw self-BLEU, a similarity, is added in place of a diversity, over responses
  that are padded at the right (`sampler.diversity=padded_self_bleu`, see diversity.py);
- the scores are min-max normalised after they were combined: the lowest has weight 0, and equal
  ones are all 0;
- the uniform half is one permutation that is never shuffled again, and its tail is dropped at each
  wrap.

Not reproduced: `curriculum_momentum`, whose default freezes the weights at their first values, and
the order of saving and refreshing, which loses a refresh on resume.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from megatron_mmr1.sampling.estimators import Refresh
from megatron_mmr1.sampling.statistics import GroupStats

_WRONG_CHOICE = 0.1


class ReleasedCode(Refresh):
    """`Refresh` as the released code has it."""

    def observe_scoring(self, version: int, stats: GroupStats) -> None:
        """Replace the statistics of the prompts that were scored, with partial credit."""
        super().observe_scoring(version, stats)
        credit = stats.num_correct_K + _WRONG_CHOICE * stats.num_wrong_choices_K
        self.pass_rate_P[stats.index_K] = credit / stats.num_judged_K

    def all_scores(self, version: int, rng: np.random.Generator) -> np.ndarray:
        """Return the combined scores, min-max normalised."""
        raw_P = super().all_scores(version, rng)
        lowest, spread = raw_P.min(), np.ptp(raw_P)
        return (raw_P - lowest) / spread if spread > 0 else np.zeros_like(raw_P)


class OnePermutation:
    """The released code's uniform half; has the methods of passes.UniformPasses."""

    def __init__(self, num_prompts: int, seed: int):
        self._num_prompts = num_prompts
        self._begin(seed)

    def _begin(self, seed: int) -> None:
        self._seed, self._cursor = seed, 0
        self._order_P = np.random.Generator(np.random.PCG64(seed)).permutation(self._num_prompts)

    def take(self, num: int, taken: Collection[int] = ()) -> list[int]:
        """Take the next `num`; from the start again where fewer are left. `taken` is not read."""
        if self._cursor + num > len(self._order_P):
            self._cursor = 0
        self._cursor += num
        return self._order_P[self._cursor - num : self._cursor].tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands."""
        return {"seed": self._seed, "cursor": self._cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, of as many prompts, with its seed."""
        self._begin(state["seed"])
        self._cursor = state["cursor"]

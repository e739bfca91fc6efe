"""Uniform sampling: pass after pass over the data set, reshuffled each time.

Also the uniform half of vas.py. The released MMR1 code shuffles once and drops the tail at each
wrap; here every pass has its own order, and a batch may span two passes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_mmr1.config.schema import SamplerConfig
from megatron_mmr1.sampling.base import Sampler
from megatron_mmr1.sampling.scores import PromptScores
from megatron_mmr1.types import PromptStats


class UniformSampler(Sampler):
    """Every prompt once a pass.

    It keeps the same statistics and scores as VAS, and does not use them to draw: a report can then
    compare the two. `config.mixture_ratio` is not read here.

    Raises:
        ValueError: two prompts share an id, or there are fewer prompts than a batch takes.
    """

    def __init__(
        self,
        prompt_ids: Sequence[str],
        categories: Sequence[str],
        batch_size: int,
        config: SamplerConfig,
        seed: int,
    ):
        if len(prompt_ids) < batch_size:
            raise ValueError(
                f"prompts_per_step={batch_size} exceeds the {len(prompt_ids)} prompts of data.train"
                f", and a step takes no prompt twice; use at most {len(prompt_ids)} or add prompts"
            )
        self.batch_size = batch_size
        self.scores = PromptScores(
            prompt_ids, categories, config.alpha, config.beta, config.update_every
        )
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.rest_of_pass = np.empty(0, np.int64)

    def next_batch(self) -> list[int]:
        """Draw the next `batch_size` different prompts of the pass."""
        batch = self._draw_from_pass(self.batch_size, taken=[])
        self.scores.draws[batch] += 1
        return batch

    def _draw_from_pass(self, num: int, taken: list[int]) -> list[int]:
        """Take the next `num` prompts of the pass that are not in this batch yet.

        A prompt already in the batch (in `taken`, or from the tail of the previous pass) is not
        skipped: it keeps its place and comes first in the next batch. Only when nothing else is
        left of a pass does the next one begin; what is left over then is in this very batch.
        """
        drawn: list[int] = []
        while True:
            is_in_batch = np.isin(self.rest_of_pass, [*taken, *drawn])
            picked = self.rest_of_pass[~is_in_batch][: num - len(drawn)]
            self.rest_of_pass = self.rest_of_pass[~np.isin(self.rest_of_pass, picked)]
            drawn += picked.tolist()
            if len(drawn) == num:
                return drawn
            self.rest_of_pass = self.rng.permutation(len(self.scores.prompt_ids))

    def observe(self, step: int, stats: Sequence[PromptStats]) -> None:
        """Take in what the groups of one step taught (see PromptScores.observe)."""
        self.scores.observe(step, stats)

    def update_table(self) -> dict[str, np.ndarray] | None:
        """Return one row a prompt if the last `observe` renewed the scores (see PromptScores)."""
        return self.scores.update_table()

    def metrics(self) -> dict[str, float]:
        """Return coverage, mean VPS, effective size and updates (see PromptScores.metrics)."""
        return self.scores.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Return scores, the rest of the pass, and the generator (JSON: 128-bit integers)."""
        return {
            "scores": self.scores.state_dict(),
            "rest_of_pass": self.rest_of_pass.tolist(),
            "rng": json.dumps(self.rng.bit_generator.state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: `state` was saved for other prompts.
        """
        self.scores.load_state_dict(state["scores"])
        self.rest_of_pass = np.array(state["rest_of_pass"], np.int64)
        self.rng.bit_generator.state = json.loads(state["rng"])

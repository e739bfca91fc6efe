"""The contract of a sampler, and the share of each draw that one rollout engine generates for.

Owns no policy: uniform.py and vas.py do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_mmr1.types import PromptStats


class Sampler(ABC):
    """Draws prompts, and learns from what their rollouts were worth.

    Iterating yields `next_batch()` for ever, so a sampler is the `batch_sampler` of a torch
    DataLoader. Use it with `num_workers=0`: a worker's prefetch would draw before the last step was
    observed.

    Parallelism: no collective runs here. Every rank holds the same sampler with the same seed and
    must be given the same (all-gathered) statistics; then every rank draws the same batch.
    """

    @abstractmethod
    def next_batch(self) -> list[int]:
        """Draw the prompts of one step: `prompts_per_step` different indices into the data set."""

    @abstractmethod
    def observe(self, step: int, stats: Sequence[PromptStats]) -> None:
        """Take in what the groups of one step taught; called once a step, by every rank alike.

        Raises:
            ValueError: a prompt_id is not in the data set; nothing has been taken in then.
        """

    @abstractmethod
    def update_table(self) -> dict[str, np.ndarray] | None:
        """Return one row a prompt if the last `observe` renewed the scores, else None."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that later draws depend on, as numbers, strings, lists and dicts only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`: the later draws are those that the saved sampler would have made.

        Raises:
            ValueError: `state` was saved for other prompts.
        """

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Return numbers for the log, keys "sampler/..."."""

    def prompts_to_score(self, step: int) -> list[int]:
        """Return the prompts that the trainer should generate for, only to score them: here none.

        The paper re-scores every prompt with extra rollouts every T_update steps (Alg. 1). The
        samplers here learn from training rollouts alone, so nothing is ever due.
        """
        return []

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self.next_batch()


class EngineShare:
    """One rollout engine's share of each draw: every `size`-th prompt, from `rank` on.

    Strided, so that all engines' results, dealt round in turn, are in the order of the draw.

    Parallelism: `rank` and `size` are of the engines, whatever ranks train. Shares differ by at
    most one prompt when `size` does not divide the batch.
    """

    def __init__(self, sampler: Sampler, rank: int, size: int):
        self.sampler = sampler
        self.rank = rank
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.sampler:
            yield batch[self.rank :: self.size]

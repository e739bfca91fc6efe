"""The contract of a sampler, and the share of each draw that one rollout engine generates for.

Owns no policy: vas.py does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from megatron_mmr1.sampling.statistics import GroupStats


class Draw(NamedTuple):
    """One prompt of a batch.

    Attributes:
        row: index in the data set.
        occurrence: how often it was drawn for this step before; its requests have other seeds.
    """

    row: int
    occurrence: int


class Sampler(ABC):
    """Draws prompts, and learns from what their rollouts were worth.

    Iterating yields `next_batch()` for ever, so a sampler is the `batch_sampler` of a torch
    DataLoader. Use it with `num_workers=0`: a worker's prefetch would draw before the last step was
    observed.

    Parallelism: no collective runs here. Every rank holds the same sampler with the same seed and
    must be given the same (all-gathered) statistics; then every rank draws the same batch.
    """

    @abstractmethod
    def next_batch(self) -> list[Draw]:
        """Draw `prompts_per_step` prompts, or as many as was asked for.

        Called again before `observe`, it draws for the same step, to refill it.
        """

    @abstractmethod
    def ask_for(self, num_prompts: int) -> None:
        """Set the size of the next draw alone; at most `prompts_per_step`."""

    @abstractmethod
    def observe(self, step: int, stats: GroupStats) -> None:
        """Take in what all groups of one step taught; called once a step, by every rank alike.

        Raises:
            ValueError: a prompt is not in the data set, or a number can't be; nothing has been
                taken in then.
        """

    @abstractmethod
    def prompts_to_score(self, step: int) -> list[int]:
        """Return the prompts that must be sampled before `step`, only to be scored."""

    @abstractmethod
    def observe_scoring(self, step: int, stats: GroupStats) -> None:
        """Take in what the groups of `prompts_to_score(step)` taught."""

    @abstractmethod
    def update_table(self) -> dict[str, np.ndarray] | None:
        """Return one row a prompt if all scores were renewed since the last call, else None."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that later draws depend on: numbers, strings, arrays, lists and dicts."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> str:
        """Continue from `state`: the later draws are those that the saved sampler would have made.

        Returns:
            "", or what is different about the data set: prompts are matched by their ids.
        """

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Return numbers for the log, keys "sampler/..."."""

    def calibration(self) -> np.ndarray | None:
        """Return sums by bin of the predicted chance of a mixed group, float64 [3, bins]: groups,
        predictions, mixed groups; None where nothing is predicted.
        """
        return None

    def __iter__(self) -> Iterator[list[Draw]]:
        while True:
            yield self.next_batch()


def refill_size(num_mixed: int, num_drawn: int, batch_size: int) -> int:
    """Return how many prompts to draw so that a batch has `batch_size` mixed groups.

    As many as are missing, over the rate of mixed ones among those drawn for this step (Laplace's
    rule); never more than a batch.
    """
    rate = (num_mixed + 1) / (num_drawn + 2)
    return min(math.ceil((batch_size - num_mixed) / rate), batch_size)


class EngineShare:
    """One rollout engine's share of each draw: every `size`-th prompt, from `rank` on.

    Strided, so that all engines' results, dealt round in turn, are in the order of the draw.

    Parallelism: `rank` and `size` are of the engines, whatever ranks train. Shares differ by at
    most one prompt when `size` does not divide the batch; of a small refill some may be empty.
    """

    def __init__(self, sampler: Sampler, rank: int, size: int):
        self.sampler = sampler
        self.rank = rank
        self.size = size

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.sampler:
            yield batch[self.rank :: self.size]


class Occurrences:
    """Numbers the draws of a step that are of the same prompt."""

    def __init__(self) -> None:
        self._num: Counter[int] = Counter()

    @property
    def drawn(self) -> set[int]:
        """The prompts that were drawn for this step."""
        return set(self._num)

    def number(self, batch: list[int]) -> list[Draw]:
        """Return the draws of a batch."""
        draws = []
        for row in batch:
            draws.append(Draw(row, self._num[row]))
            self._num[row] += 1
        return draws

    def clear(self) -> None:
        """Begin the next step."""
        self._num.clear()

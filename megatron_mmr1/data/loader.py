"""The loader that joins a data set to the sampler that decides who is drawn.

What it yields are references: pixels are read when a prompt is used, and let go after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_mmr1.types import GroupKey, Prompt

_AHEAD = 2  # prompts that are made while others are in use


class _Prompts(Protocol):
    """What of data.dataset.PromptDataset is needed."""

    prompt_ids: list[str]

    def __getitem__(self, index: int, /) -> Prompt: ...


class PromptView(Iterable[Prompt]):
    """Some prompts of a data set, each made anew when it is iterated over.

    Args:
        draws: (index, occurrence) each, as samplers draw them.
    """

    def __init__(self, dataset: _Prompts, draws: Iterable[tuple[int, int]]) -> None:
        self._dataset, self._draws = dataset, tuple(draws)

    @classmethod
    def of(cls, dataset: _Prompts, indices: Iterable[int]) -> PromptView:
        """Return the prompts of these rows, each once."""
        return cls(dataset, ((index, 0) for index in indices))

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self._draws)

    def __iter__(self) -> Iterator[Prompt]:
        """Make the prompts in order; a thread makes the next ones meanwhile."""
        made: deque[Future[Prompt]] = deque()
        with ThreadPoolExecutor(1) as thread:
            for draw in self._draws:
                made.append(thread.submit(self._make, draw))
                if len(made) > _AHEAD:
                    yield made.popleft().result()
            while made:
                yield made.popleft().result()

    @property
    def indices(self) -> list[int]:
        """The rows of the data set."""
        return [index for index, _ in self._draws]

    @property
    def keys(self) -> list[GroupKey]:
        """The prompts' keys, for which nothing has to be made."""
        return [(self._dataset.prompt_ids[index], occurrence) for index, occurrence in self._draws]

    def _make(self, draw: tuple[int, int]) -> Prompt:
        index, occurrence = draw
        prompt = self._dataset[index]
        return replace(prompt, occurrence=occurrence) if occurrence else prompt


class _Draws(Dataset[tuple[int, int]]):
    """Draws by themselves: what a batch sampler yields is what it is given."""

    def __getitem__(self, draw: tuple[int, int]) -> tuple[int, int]:
        return draw


def build_loader(
    dataset: _Prompts, batch_sampler: Iterable[Sequence[tuple[int, int]]]
) -> DataLoader[Any]:
    """A loader of `PromptView`s: one for each list of draws, (index, occurrence) each.

    No worker processes: they would ask the batch sampler for indices ahead of time, and a draw made
    before the sampler has observed the last step is stale. The loader has its own generator: it
    draws a seed for the workers that it doesn't have, and the global generator must not notice.
    """
    return DataLoader(
        _Draws(),
        batch_sampler=batch_sampler,  # pyright: ignore[reportArgumentType]
        num_workers=0,
        collate_fn=lambda draws: PromptView(dataset, draws),
        generator=torch.Generator(),
    )

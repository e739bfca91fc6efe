"""The loader that joins a data set to the sampler that decides who is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_mmr1.types import Prompt


class _Draws(Dataset[Prompt]):
    """Prompts by (index, occurrence), as samplers draw them."""

    def __init__(self, dataset: Dataset[Prompt]) -> None:
        self._dataset = dataset

    def __getitem__(self, draw: tuple[int, int]) -> Prompt:
        index, occurrence = draw
        prompt = self._dataset[index]
        return replace(prompt, occurrence=occurrence) if occurrence else prompt


def build_loader(
    dataset: Dataset[Prompt], batch_sampler: Iterable[Sequence[tuple[int, int]]]
) -> DataLoader[Any]:
    """A loader of lists: one list of `Prompt` for each list of draws, (index, occurrence) each.

    No worker processes: they would ask the batch sampler for indices ahead of time, and a draw made
    before the sampler has observed the last step is stale. The data set keeps prompts once made.
    The loader has its own generator: it draws a seed for the workers that it doesn't have, and the
    global generator must not notice.
    """
    return DataLoader(
        _Draws(dataset),
        batch_sampler=batch_sampler,  # pyright: ignore[reportArgumentType]
        num_workers=0,
        collate_fn=list,
        generator=torch.Generator(),
    )

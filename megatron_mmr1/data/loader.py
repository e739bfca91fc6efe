"""The loader that joins a data set to the sampler that decides who is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def build_loader(dataset: Dataset[Any], batch_sampler: Iterable[list[int]]) -> DataLoader[Any]:
    """A loader of lists: one list of `Prompt` or `Demonstration` for each list of row numbers.

    No worker processes: they would ask the batch sampler for indices ahead of time, and a draw made
    before the sampler has observed the last step is stale. The data set keeps prompts once made.
    The loader has its own generator: it draws a seed for the workers that it doesn't have, and the
    global generator must not notice.
    """
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,  # pyright: ignore[reportArgumentType]
        num_workers=0,
        collate_fn=list,
        generator=torch.Generator(),
    )

"""Groups between the engines that make them and the ranks that train on them.

Every engine generates for its share of a draw; every rank then learns of all groups and of their
statistics, so that all of them make the same plan and the same draws. Groups have no pixels and no
image files: a rank reads those of the prompts that it trains on from its own data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch.distributed as dist

from megatron_mmr1.backend import parallel
from megatron_mmr1.sampling.statistics import NUM_COLUMNS, GroupStats
from megatron_mmr1.types import ScoredGroup


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """Which engine this rank belongs to: `tp_size` consecutive ranks share one.

    Attributes:
        index: 0 .. num_engines - 1.
        is_leader: the one rank of the engine whose results count (the others' are the same).
    """

    index: int
    num_engines: int
    is_leader: bool

    @classmethod
    def of(cls, tp_size: int) -> EnginePlace:
        """Find this rank's engine."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return cls(rank // tp_size, world_size // tp_size, rank % tp_size == 0)


def all_groups(mine: Sequence[ScoredGroup], place: EnginePlace) -> list[ScoredGroup]:
    """Return every engine's groups in the order of the draw, on every rank.

    Args:
        mine: this engine's groups, in the order of its share (sampling.EngineShare).
    """
    shares = parallel.gather_over_world([list(mine)] if place.is_leader else [])
    return [group for turn in zip_longest(*shares) for group in turn if group is not None]


def all_stats(mine: GroupStats, num_groups: int, place: EnginePlace) -> np.ndarray:
    """Return every engine's statistics in the order of the draw, float64 [num_groups, columns].

    Parallelism: one all-gather of plain numbers over all ranks.

    Args:
        mine: this engine's groups, in the order of its share.
        num_groups: of all engines.
    """
    per_engine = -(-num_groups // place.num_engines)
    rows = np.full((per_engine, NUM_COLUMNS), np.nan)
    rows[: len(mine.index_K)] = mine.to_rows()
    tp_size = dist.get_world_size() // place.num_engines
    of_engines = parallel.gather_array(rows)[::tp_size]  # ranks of an engine have the same
    return of_engines.transpose(1, 0, 2).reshape(-1, NUM_COLUMNS)[:num_groups]

"""Groups between the engines that make them and the ranks that train on them.

Every engine generates for its share of a draw; every rank then learns of all groups, so that all of
them make the same plan, the same statistics and the same draws. Pixels and image files stay where
they are: a rank reads those of the prompts that it trains on from its own data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch.distributed as dist

from megatron_mmr1.backend import parallel
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
    bare = [
        replace(g, group=replace(g.group, prompt=replace(g.group.prompt, pixel_values=None,
                                                         images=())))
        for g in mine
    ]  # fmt: skip
    shares = parallel.gather_over_world([bare] if place.is_leader else [])
    return [group for turn in zip_longest(*shares) for group in turn if group is not None]

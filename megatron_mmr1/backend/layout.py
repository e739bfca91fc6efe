"""Which part of a packed batch this rank computes: context parallelism in zigzag order.

Each sequence is cut into 2 * cp_size equal chunks; rank r holds chunks r and 2 * cp_size - 1 - r,
so that causal attention costs every rank the same. Positions, image tokens and response rows follow
their tokens. Tensor and pipeline parallelism leave this view alone.

T packed tokens, R response rows; `local_` is this rank's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.attention import LocalSequences
from megatron_mmr1.types import PackedBatch, ResponseRows


@dataclass(frozen=True, slots=True)
class LocalView:
    """One micro-batch as this context-parallel rank sees it.

    Attributes:
        token_ids_T, position_ids_3T: of the local tokens.
        sequences: what attention needs.
        visual_position_M, visual_feature_M: local positions of the image tokens held here, and the
            features that they take.
        predicts_R: local positions whose logits predict the response tokens of `rows`.
        row_index_R: which of the batch's rows these are.
        rows: the local rows.
        whole_rows: all rows of the batch.
    """

    token_ids_T: Tensor
    position_ids_3T: Tensor
    sequences: LocalSequences
    visual_position_M: Tensor
    visual_feature_M: Tensor
    predicts_R: Tensor
    row_index_R: Tensor
    rows: ResponseRows
    whole_rows: ResponseRows


def local_view(batch: PackedBatch) -> LocalView:
    """Cut a micro-batch for this rank."""
    rank, size = parallel.cp_group().rank(), parallel.cp_group().size()
    boundaries = batch.boundaries
    target = batch.token_ids_T.device
    held = [zigzag_positions(boundaries, r, size) for r in range(size)]
    mine = held[rank].to(target)
    local_of_packed_T = torch.full_like(batch.token_ids_T, -1)
    local_of_packed_T[mine] = torch.arange(len(mine), device=target)
    visual_M = local_of_packed_T[batch.visual_position_M]
    predicts_R = local_of_packed_T[batch.predicts_R]
    row_index_R = (predicts_R >= 0).nonzero().flatten()
    return LocalView(
        token_ids_T=batch.token_ids_T[mine],
        position_ids_3T=batch.position_ids_3T[:, mine],
        sequences=LocalSequences.of(boundaries, held, rank, target),
        visual_position_M=visual_M[visual_M >= 0],
        visual_feature_M=batch.visual_feature_M[visual_M >= 0],
        predicts_R=predicts_R[row_index_R],
        row_index_R=row_index_R,
        rows=batch.rows.take(row_index_R),
        whole_rows=batch.rows,
    )


def zigzag_positions(boundaries: Sequence[int], rank: int, size: int) -> Tensor:
    """Return the packed positions that a rank holds, int64 [T / size], in its own order."""
    if size == 1:
        return torch.arange(boundaries[-1])
    parts = []
    for start, end in pairwise(boundaries):
        chunk, remainder = divmod(end - start, 2 * size)
        assert remainder == 0, "packing pads every sequence to a multiple of 2 * cp_size"
        for index in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
    return torch.cat(parts)

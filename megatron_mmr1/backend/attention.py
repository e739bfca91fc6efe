"""Core attention over packed sequences, with context parallelism, on any device.

Megatron's own local attention refuses both, and Transformer Engine's needs a GPU. Keys and values
are gathered over the context-parallel group (the backward pass scatters their gradients back) and
torch's fused scaled_dot_product_attention runs on blocks of sequences of similar length.

T tokens of this rank, B sequences of a block, Q queries, K keys, H query heads, L key/value heads
(both of this tensor-parallel rank), E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_mmr1.backend import parallel


@dataclass(frozen=True, slots=True)
class Block:
    """Runs of queries that attend in one call. Rows are padded by repeating their last index.

    Attributes:
        query_index_BQ: int64, positions among this rank's tokens.
        key_index_BK: int64, positions among the gathered keys.
        mask_B1QK: bool, True where a query may look; None when queries and keys are the same
            positions, which plain causal attention serves (its padding lies to the right).
    """

    query_index_BQ: Tensor
    key_index_BK: Tensor
    mask_B1QK: Tensor | None


@dataclass(frozen=True, slots=True)
class VisualRows:
    """The image tokens of this rank (position_M), and which of the step's features they take."""

    position_M: Tensor
    feature_M: Tensor
    features_MD: Tensor


@dataclass
class LocalSequences(PackedSeqParams):
    """How this rank's tokens fall into sequences; made once a micro-batch, read by every layer.

    Megatron sees packed ("thd") sequences without `cu_seqlens`: given those, it would cut rotary
    frequencies by sequence and by context-parallel rank, in every layer again; ours are cut already
    (backend/rotary.py).

    Attributes:
        boundaries: int32, the whole packed sequences' starts (what Transformer Engine takes).
        longest: tokens of the longest sequence.
        blocks: for our own attention.
        context_index_T: where in the blocks' concatenated results each local token's lies.
        visual: image features for layers that take their own; None without.
    """

    qkv_format: str = "thd"  # pyright: ignore[reportIncompatibleVariableOverride]
    boundaries: Tensor | None = None
    longest: int = 0
    blocks: list[Block] = field(default_factory=list)
    context_index_T: Tensor | None = None
    visual: VisualRows | None = None

    @classmethod
    def of(
        cls, boundaries: Sequence[int], held: Sequence[Tensor], rank: int, target: torch.device
    ) -> LocalSequences:
        """Plan the attention of one micro-batch.

        Args:
            boundaries: starts of the packed sequences, and their end.
            held: the packed positions that each context-parallel rank holds.
            rank: this one's place among them.
        """
        size = len(held)
        gathered = torch.empty(boundaries[-1], dtype=torch.long)
        gathered[torch.cat(list(held))] = torch.arange(boundaries[-1])
        runs = []  # first local query, number of queries, first packed key, number of keys
        local = 0
        for start, end in pairwise(boundaries):
            if size == 1:
                runs.append((start, end - start, start, end - start))
                continue
            chunk = (end - start) // (2 * size)
            for index in (rank, 2 * size - 1 - rank):
                runs.append((local, chunk, start, (index + 1) * chunk))
                local += chunk
        blocks, context_index_T = _blocks([run for run in runs if run[1]], gathered, size > 1)
        return cls(
            boundaries=torch.tensor(boundaries, dtype=torch.int32, device=target),
            longest=max(b - a for a, b in pairwise(boundaries)),
            blocks=[_to(block, target) for block in blocks],
            context_index_T=context_index_T.to(target),
        )


class PackedAttention(MegatronModule):
    """Causal grouped-query attention within each packed sequence.

    Parallelism: heads are this tensor-parallel rank's; one all-gather of keys and values over the
    context-parallel group forward, one reduce-scatter of their gradients backward.
    """

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config=config)
        self._cp_group = parallel.cp_group()

    def forward(
        self,
        query_THE: Tensor,
        key_TLE: Tensor,
        value_TLE: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: LocalSequences | None = None,
    ) -> Tensor:
        """Attend; returns [T, H * E] in the query's dtype."""
        assert attention_bias is None and isinstance(packed_seq_params, LocalSequences)
        if self._cp_group.size() > 1:
            both = torch.cat([key_TLE, value_TLE], dim=-1)
            both = gather_from_sequence_parallel_region(both, group=self._cp_group)
            key_TLE, value_TLE = both.chunk(2, dim=-1)
        parts = []
        for block in packed_seq_params.blocks:
            context_BHQE = scaled_dot_product_attention(
                query_THE[block.query_index_BQ].transpose(1, 2),
                key_TLE[block.key_index_BK].transpose(1, 2),
                value_TLE[block.key_index_BK].transpose(1, 2),
                attn_mask=block.mask_B1QK,
                is_causal=block.mask_B1QK is None,
                enable_gqa=query_THE.shape[1] != key_TLE.shape[1],
            )
            parts.append(context_BHQE.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)[packed_seq_params.context_index_T].flatten(1)


def _blocks(
    runs: list[tuple[int, int, int, int]], gathered: Tensor, needs_mask: bool
) -> tuple[list[Block], Tensor]:
    """Put runs of similar length together, longest padding at most a quarter."""
    by_shape: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for run in runs:
        by_shape.setdefault((_rounded(run[1]), _rounded(run[3])), []).append(run)
    num_tokens = sum(run[1] for run in runs)
    context_index_T = torch.empty(num_tokens, dtype=torch.long)
    blocks, offset = [], 0
    for members in by_shape.values():
        first_query, num_queries, first_key, num_keys = torch.tensor(members).T.unsqueeze(-1)
        column_Q = torch.arange(int(num_queries.max()))
        column_K = torch.arange(int(num_keys.max()))
        query_index_BQ = first_query + torch.minimum(column_Q, num_queries - 1)
        key_index_BK = gathered[first_key + torch.minimum(column_K, num_keys - 1)]
        mask_B1QK = None
        if needs_mask:
            last_key_BQ = num_keys - num_queries + column_Q
            mask_B1QK = (column_K <= last_key_BQ.unsqueeze(-1)).unsqueeze(1)
        blocks.append(Block(query_index_BQ, key_index_BK, mask_B1QK))
        is_real_BQ = column_Q < num_queries
        places_BQ = torch.arange(query_index_BQ.numel()).view_as(query_index_BQ)
        context_index_T[query_index_BQ[is_real_BQ]] = offset + places_BQ[is_real_BQ]
        offset += query_index_BQ.numel()
    return blocks, context_index_T


def _rounded(length: int) -> int:
    """Round up to three significant bits, and to 8 at least."""
    step = max(8, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def _to(block: Block, target: torch.device) -> Block:
    mask = block.mask_B1QK
    return Block(
        block.query_index_BQ.to(target),
        block.key_index_BK.to(target),
        None if mask is None else mask.to(target),
    )

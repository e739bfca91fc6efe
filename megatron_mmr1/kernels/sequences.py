"""The responses of a micro-batch as the kernels take them; checked before anything is launched.

S sequences, R response tokens (rows), N rewards, P groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.types import PackedSequences, ResponseRows


def pack_sequences(
    cu_seqlens: Sequence[int],
    num_rows: int,
    *,
    sample: Sequence[int],
    weight: Sequence[float],
    reward_index: Sequence[int],
    group_offsets: Sequence[int],
    rewards_N: Tensor,
) -> PackedSequences:
    """Check S sequences and their groups, on the host, and return them as CPU tensors.

    Args:
        cu_seqlens: [S + 1] from 0 to `num_rows`, ascending; equal neighbours are an empty sequence.
        sample: [S], any names that the caller has for them.
        weight: [S], of each token; 0 leaves a sequence out of the loss.
        reward_index: [S], where in `rewards_N` each has its reward.
        group_offsets: [P + 1] from 0 to N, strictly ascending: groups lie end to end in `rewards_N`
            and may belong to sequences of other data-parallel ranks.
        rewards_N: float32; NaN = could not judge.

    Raises:
        ValueError: names what does not fit, and its value.
    """
    num_sequences, num_rewards = len(sample), len(rewards_N)
    _check_offsets("cu_seqlens", cu_seqlens, num_rows, "the number of rows", may_repeat=True)
    _check_offsets(
        "group_offsets", group_offsets, num_rewards, "the number of rewards", may_repeat=False
    )
    if rewards_N.dtype != torch.float32:
        raise ValueError(f"rewards_N has dtype {rewards_N.dtype}; make it float32")
    for name, values in (
        ("sample", sample),
        ("weight", weight),
        ("reward_index", reward_index),
        ("cu_seqlens", cu_seqlens[1:]),
    ):
        if len(values) != num_sequences:
            raise ValueError(
                f"{name} is for {len(values)} sequences, sample for {num_sequences}; give one each"
            )
    outside = [i for i in reward_index if not 0 <= i < num_rewards]
    if outside:
        raise ValueError(
            f"reward_index={outside[0]} is outside rewards_N, which has {num_rewards}; give the "
            "rewards of every group that a sequence belongs to"
        )
    bad = [w for w in weight if not 0 <= w < float("inf")]
    if bad:
        raise ValueError(f"weight={bad[0]} of a sequence is not a finite number of 0 or more")
    bounds = torch.tensor(list(group_offsets), dtype=torch.int32)
    index = torch.tensor(list(reward_index), dtype=torch.int32)
    first = torch.searchsorted(bounds, index, right=True) - 1
    return PackedSequences(
        offsets_S1=torch.tensor(list(cu_seqlens), dtype=torch.int32),
        sample_S=torch.tensor(list(sample), dtype=torch.long),
        weight_S=torch.tensor(list(weight), dtype=torch.float32),
        reward_S=index,
        group_S2=torch.stack([bounds[first], bounds[first + 1]], dim=1),
        rewards_N=rewards_N,
    )


def _check_offsets(
    name: str, offsets: Sequence[int], end: int, what: str, *, may_repeat: bool
) -> None:
    ascends = all(a < b or (may_repeat and a == b) for a, b in pairwise(offsets))
    if not offsets or offsets[0] != 0 or offsets[-1] != end or not ascends:
        shown = list(offsets) if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
        raise ValueError(f"{name}={shown} does not ascend from 0 to {end}, {what}; make it do so")


def check_rows(rows: ResponseRows, **others: Tensor | None) -> None:
    """Check shapes, dtypes and devices without a look at values, so that no GPU is waited for.

    Args:
        others: float32 [R] tensors of the same rows by name (log-probs, entropies).

    Raises:
        ValueError: names the tensor, what it has, and what it should have.
    """
    num_rows, device = len(rows.target_ids_R), rows.target_ids_R.device
    if rows.target_ids_R.dim() != 1:
        raise ValueError(f"target_ids_R has shape {tuple(rows.target_ids_R.shape)}; make it [R]")
    vectors: dict[str, tuple[Tensor | None, torch.dtype]] = {
        "target_ids_R": (rows.target_ids_R, torch.int64),
        "rollout_logprobs_R": (rows.rollout_logprobs_R, torch.float32),
        "old_logprobs_R": (rows.old_logprobs_R, torch.float32),
        "ref_logprobs_R": (rows.ref_logprobs_R, torch.float32),
        **{name: (tensor, torch.float32) for name, tensor in others.items()},
    }
    for name, (tensor, dtype) in vectors.items():
        if tensor is not None:
            check_vector(name, tensor, dtype, rows.target_ids_R, "target_ids_R")
    sequences = rows.sequences
    num_sequences = len(sequences.sample_S)
    num_rewards = len(sequences.rewards_N)
    for name, shape, dtype in (
        ("offsets_S1", (num_sequences + 1,), torch.int32),
        ("sample_S", (num_sequences,), torch.int64),
        ("weight_S", (num_sequences,), torch.float32),
        ("reward_S", (num_sequences,), torch.int32),
        ("group_S2", (num_sequences, 2), torch.int32),
        ("rewards_N", (num_rewards,), torch.float32),
    ):
        values = getattr(sequences, name)
        if values.shape != shape or values.dtype != dtype:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}; "
                f"{num_sequences} sequences and {num_rewards} rewards ask for {shape} and {dtype}"
            )
        check_place(name, values, device)
    if device.type == "cpu" and int(sequences.offsets_S1[-1]) != num_rows:
        raise ValueError(
            f"offsets_S1 ends at {int(sequences.offsets_S1[-1])}, target_ids_R at {num_rows}; "
            "make them agree"
        )


def check_vector(
    name: str, tensor: Tensor, dtype: torch.dtype, like_R: Tensor, like_name: str
) -> None:
    """Check a vector [R] against another one; float64 may stand for float32.

    Raises:
        ValueError: names the tensor, what it has, and what it should have.
    """
    is_wider = dtype == torch.float32 and tensor.dtype == torch.float64
    if tensor.shape != like_R.shape or not (tensor.dtype == dtype or is_wider):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; {like_name} asks "
            f"for {tuple(like_R.shape)} and {dtype}"
        )
    check_place(name, tensor, like_R.device, like_name)


def check_place(
    name: str, tensor: Tensor, device: torch.device, like_name: str = "target_ids_R"
) -> None:
    """Check where a tensor lies: on the device, and without gaps, as kernels read it.

    Raises:
        ValueError: names the tensor, what it has, and what it should have.
    """
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device}, {like_name} on {device}; move them to one device"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()}, with gaps; pass {name}.contiguous()"
        )


def check_options(rows: ResponseRows, config: AlgorithmConfig) -> None:
    """Check that the loss has what its options need.

    Raises:
        ValueError: names the key, its value and the remedy.
    """
    if config.kl_coefficient and rows.ref_logprobs_R is None:
        raise ValueError(
            f"algorithm.kl_coefficient={config.kl_coefficient} needs ref_logprobs_R; give them or "
            "set it to 0"
        )
    for key in ("dual_clip", "tis_cap", "kl_coefficient", "entropy_coefficient"):
        if not getattr(config, key) >= 0:
            raise ValueError(f"algorithm.{key}={getattr(config, key)} is below 0; use 0 or more")

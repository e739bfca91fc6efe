"""The kernels' functions in Triton: checks, scratch memory and launches.

The path of a GPU, and under TRITON_INTERPRET=1 of the tests on a CPU. `Form` in contract.py says
what each function does. No launch depends on a length that is only known on the device, and no
kernel is compiled anew for another number of rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels import contract
from megatron_mmr1.kernels.contract import Given, SequenceLoss, TokenGrpo, Vocabulary
from megatron_mmr1.kernels.row_kernels import LOG2_E, gradient_kernel, statistics_kernel
from megatron_mmr1.kernels.sequence_kernel import sequence_kernel
from megatron_mmr1.kernels.sequences import check_options, check_rows
from megatron_mmr1.types import ResponseRows

SEQUENCE_BLOCK, SEQUENCE_WARPS = 256, 8
ROW_BLOCK, ROW_WARPS = 4096, 8
GROUP_BLOCK = 32
# Type checkers see the functions that were decorated, not what launches them.
_sequence_kernel: Any = sequence_kernel
_statistics_kernel: Any = statistics_kernel
_gradient_kernel: Any = gradient_kernel


def sequence_loss(
    logprobs_R: Tensor, entropy_R: Tensor, rows: ResponseRows, config: AlgorithmConfig
) -> SequenceLoss:
    """See `Form.sequence_loss`."""
    check_rows(rows, logprobs_R=logprobs_R, entropy_R=entropy_R)
    check_options(rows, config)
    _refuse_float64(logprobs_R=logprobs_R, entropy_R=entropy_R, **_vectors(rows))
    sequences, num_sequences = rows.sequences, len(rows.sequences.sample_S)
    d_logprobs_R = torch.empty_like(logprobs_R)
    d_entropy_R = torch.empty_like(entropy_R) if config.entropy_coefficient else None
    partials = logprobs_R.new_empty(num_sequences, len(contract.SUMS))
    sums = logprobs_R.new_zeros(len(contract.SUMS))
    if num_sequences == 0:
        return SequenceLoss(sums, d_logprobs_R, d_entropy_R)
    _sequence_kernel[(num_sequences,)](
        logprobs_R,
        entropy_R,
        *_vectors(rows).values(),
        sequences.offsets_S1,
        sequences.weight_S,
        sequences.reward_S,
        sequences.group_S2,
        sequences.rewards_N,
        d_logprobs_R,
        d_entropy_R,
        partials,
        sums,
        _arrivals(logprobs_R.device),
        num_sequences,
        *_coefficients(config),
        USES_STD=config.advantage_scale == "std",
        USES_SEQUENCE_RATIO=config.ratio == "sequence",
        USES_TIS=config.tis_cap > 0,
        BLOCK=SEQUENCE_BLOCK,
        BLOCK_G=GROUP_BLOCK,
        num_warps=SEQUENCE_WARPS,
    )
    return SequenceLoss(sums, d_logprobs_R, d_entropy_R)


def logprobs_(
    local_logits: Tensor, targets_R: Tensor, vocabulary: Vocabulary, needs_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """See `Form.logprobs_`."""
    contract.check_logits(local_logits, targets_R, vocabulary)
    _refuse_float64(local_logits=local_logits)
    statistics_4R = _statistics_(local_logits, targets_R, vocabulary, needs_entropy)
    gathered = contract.gather_statistics(statistics_4R, vocabulary.tp_group)
    logprobs_R, entropy_R, _ = contract.combine_statistics(gathered)
    return logprobs_R, entropy_R if needs_entropy else None


def loss_gradient_(
    local_logits: Tensor,
    targets_R: Tensor,
    vocabulary: Vocabulary,
    upstream: Given | TokenGrpo,
) -> tuple[Tensor, Tensor | None]:
    """See `Form.loss_gradient_`."""
    contract.check_logits(local_logits, targets_R, vocabulary)
    contract.check_upstream(upstream, targets_R)
    _refuse_float64(local_logits=local_logits)
    num_rows = len(targets_R)
    needs_entropy = isinstance(upstream, TokenGrpo) or upstream.d_entropy_R is not None
    logprobs_R = local_logits.new_empty(num_rows, dtype=torch.float32)
    entropy_R = torch.empty_like(logprobs_R) if needs_entropy else None
    if num_rows == 0:
        return logprobs_R, entropy_R
    gathered = None
    if vocabulary.tp_group is not None:
        statistics_4R = _statistics_(local_logits, targets_R, vocabulary, needs_entropy)
        gathered = contract.gather_statistics(statistics_4R, vocabulary.tp_group)
    config, vectors, first_row = AlgorithmConfig(), (None,) * 8, 0
    given: tuple[Tensor | None, Tensor | None] = (None, None)
    if isinstance(upstream, TokenGrpo):
        config, rows, first_row = upstream.config, upstream.rows, upstream.start
        _refuse_float64(**_vectors(rows))
        vectors = (
            upstream.sequence_R,
            rows.sequences.weight_S,
            rows.sequences.reward_S,
            rows.sequences.group_S2,
            rows.sequences.rewards_N,
            *_vectors(rows).values(),
        )
        has_entropy = config.entropy_coefficient > 0
    else:
        given = upstream.d_logprobs_R, upstream.d_entropy_R
        has_entropy = upstream.d_entropy_R is not None
    banned = vocabulary.local_banned()
    _gradient_kernel[(num_rows,)](
        local_logits,
        targets_R,
        _on_device(tuple(banned), local_logits.device),
        gathered,
        logprobs_R,
        entropy_R,
        *given,
        *vectors,
        num_rows,
        local_logits.stride(0),
        vocabulary.num_tokens,
        contract.padded(local_logits.shape[1]),
        vocabulary.first,
        len(banned),
        first_row,
        LOG2_E.value / vocabulary.rule.temperature,
        *_coefficients(config),
        NUM_RANKS=1 if gathered is None else len(gathered),
        IS_GRPO=isinstance(upstream, TokenGrpo),
        HAS_ENTROPY=has_entropy,
        USES_STD=config.advantage_scale == "std",
        USES_TIS=config.tis_cap > 0,
        BLOCK=ROW_BLOCK,
        BLOCK_G=GROUP_BLOCK,
        num_warps=ROW_WARPS,
    )
    return logprobs_R, entropy_R


def _statistics_(
    local_logits: Tensor, targets_R: Tensor, vocabulary: Vocabulary, needs_entropy: bool
) -> Tensor:
    num_rows = len(targets_R)
    statistics_4R = local_logits.new_empty(4, num_rows, dtype=torch.float32)
    banned = vocabulary.local_banned()
    if num_rows:
        _statistics_kernel[(num_rows,)](
            local_logits,
            targets_R,
            _on_device(tuple(banned), local_logits.device),
            statistics_4R,
            num_rows,
            local_logits.stride(0),
            vocabulary.num_tokens,
            contract.padded(local_logits.shape[1]),
            vocabulary.first,
            len(banned),
            LOG2_E.value / vocabulary.rule.temperature,
            BLOCK=ROW_BLOCK,
            HAS_SPREAD=needs_entropy,
            num_warps=ROW_WARPS,
        )
    return statistics_4R


def _refuse_float64(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            raise ValueError(f"{name} is float64; use model.kernels='torch', or make it float32")


def _vectors(rows: ResponseRows) -> dict[str, Tensor | None]:
    names = "old_logprobs_R", "rollout_logprobs_R", "ref_logprobs_R"
    return {name: getattr(rows, name) for name in names}


def _coefficients(config: AlgorithmConfig) -> tuple[float, ...]:
    return (
        config.clip_low,
        config.clip_high,
        config.dual_clip or float("inf"),
        config.tis_cap,
        config.kl_coefficient,
        config.entropy_coefficient,
    )


@cache
def _on_device(columns: tuple[int, ...], device: torch.device) -> Tensor:
    """Columns as int32, copied to a device once."""
    return torch.tensor(columns, dtype=torch.int32, device=device)


@cache
def _arrivals(device: torch.device) -> Tensor:
    """The sequence kernel's counter: 0 between launches, which follow each other on one stream."""
    return torch.zeros(1, dtype=torch.int32, device=device)

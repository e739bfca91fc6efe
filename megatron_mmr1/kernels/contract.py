"""What both forms of the kernels take and return.

R response tokens (rows), V vocabulary; `local_` is a tensor-parallel rank's part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels.sequences import (
    check_options,
    check_place,
    check_rows,
    check_vector,
)
from megatron_mmr1.types import ResponseRows

ROW_MULTIPLE = 16  # elements: rows of the logits begin at multiples of it, for 128-bit accesses
ACCESS_BYTES = 16  # of such an access; torch aligns allocations to 64 on a CPU, to 512 on a GPU
# What sequence_loss adds up, in this order; the last one is a maximum. See algorithms.GrpoLoss.
SUMS = (
    "loss",
    "clip_fraction",
    "kl",
    "policy_kl",
    "entropy",
    "tis_truncated",
    "num_nonfinite",
    "num_compared",
    "diff_sum",
    "diff_max",
)
# A row's statistics of a tensor-parallel rank, in this order: the largest scaled logit, the sum of
# exp(scaled - largest), the target's scaled logit (-inf where this rank has it not: a token that no
# rank has is not finite), and the sum of exp(scaled - largest) * (scaled - largest), which the
# entropy needs.
STATISTICS = ("highest", "total", "target", "spread")


@dataclass(frozen=True, slots=True)
class SoftmaxRule:
    """The distribution that tokens are drawn from: the same for engine and trainer."""

    temperature: float
    banned_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature} is not above 0; use 1 for the model's"
            )


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which part of the vocabulary this tensor-parallel rank has, and how it is sampled from.

    Attributes:
        first: global id of the first local column.
        num_tokens: local columns that stand for a token; those behind are padding.
        tp_group: None where the vocabulary is whole.
    """

    rule: SoftmaxRule
    first: int
    num_tokens: int
    tp_group: dist.ProcessGroup | None = None

    def local_banned(self) -> list[int]:
        """Return the banned local columns."""
        ids = (token_id - self.first for token_id in self.rule.banned_token_ids)
        return [column for column in ids if 0 <= column < self.num_tokens]


@dataclass(frozen=True, slots=True)
class Given:
    """Gradients of the loss that are known before the log-probs.

    Attributes:
        d_logprobs_R: float32, of each row's log-prob.
        d_entropy_R: float32, of its entropy; None = 0.
    """

    d_logprobs_R: Tensor
    d_entropy_R: Tensor | None = None

    def take(self, part: slice) -> Given:
        """Return a chunk of the rows."""
        d_entropy_R = self.d_entropy_R
        return Given(self.d_logprobs_R[part], None if d_entropy_R is None else d_entropy_R[part])


@dataclass(frozen=True, slots=True)
class TokenGrpo:
    """GRPO with ratio "token": each row's gradient follows from its own log-prob.

    Attributes:
        sequence_R: int32, `rows.sequence_R`.
        start: the first row of the chunk; `sequence_R` and the vectors of `rows` are whole.
    """

    rows: ResponseRows
    sequence_R: Tensor
    config: AlgorithmConfig
    start: int = 0

    def take(self, part: slice) -> TokenGrpo:
        """Return a chunk of the rows."""
        return TokenGrpo(self.rows, self.sequence_R, self.config, part.start)


@dataclass(frozen=True, slots=True)
class SequenceLoss:
    """GRPO's loss of a micro-batch's rows.

    Attributes:
        sums: float32, in the order of `SUMS`.
        d_logprobs_R, d_entropy_R: float32, gradients of the loss; the second None without a bonus.
    """

    sums: Tensor
    d_logprobs_R: Tensor
    d_entropy_R: Tensor | None


class Form(Protocol):
    """The functions that closed_form.py and triton_form.py both have.

    `local_logits` are [R, local storage columns], each row beginning at a multiple of
    `ROW_MULTIPLE` elements; the functions ending in _ overwrite them.
    """

    def sequence_loss(
        self,
        logprobs_R: Tensor,
        entropy_R: Tensor,
        rows: ResponseRows,
        config: AlgorithmConfig,
    ) -> SequenceLoss:
        """Return advantages, loss, its gradients and metrics of all rows: one launch."""
        ...

    def logprobs_(
        self,
        local_logits: Tensor,
        targets_R: Tensor,
        vocabulary: Vocabulary,
        needs_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs and entropies [R], in nats, float32 (float64 for float64 logits)."""
        ...

    def loss_gradient_(
        self,
        local_logits: Tensor,
        targets_R: Tensor,
        vocabulary: Vocabulary,
        upstream: Given | TokenGrpo,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn logits into the gradient of the loss; return log-probs and entropies as above.

        Entropies are None where `upstream` is given without d entropy. A row whose log-prob is not
        finite (or its entropy, where it has a gradient) gets a gradient of 0, as padding does.
        """
        ...


def check_logits(local_logits: Tensor, targets_R: Tensor, vocabulary: Vocabulary) -> None:
    """Check what both forms ask of logits, before anything is launched.

    Raises:
        ValueError: names the tensor, what it has, and what it should have.
    """
    if local_logits.dim() != 2 or targets_R.shape != local_logits.shape[:1]:
        raise ValueError(
            f"local_logits has shape {tuple(local_logits.shape)}, targets_R "
            f"{tuple(targets_R.shape)}; they must be [R, columns] and [R]"
        )
    if local_logits.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"local_logits has dtype {local_logits.dtype}; use bfloat16 or float32")
    if targets_R.dtype != torch.int64:
        raise ValueError(f"targets_R has dtype {targets_R.dtype}; use int64")
    check_place("targets_R", targets_R, local_logits.device, "local_logits")
    if not 0 <= vocabulary.num_tokens <= local_logits.shape[1]:
        raise ValueError(
            f"num_tokens={vocabulary.num_tokens} is not within the {local_logits.shape[1]} columns "
            "of local_logits"
        )
    row_stride, column_stride = local_logits.stride()
    is_aligned = local_logits.data_ptr() % ACCESS_BYTES == 0
    end = local_logits.storage_offset() + len(local_logits) * row_stride
    is_aligned = is_aligned and end * local_logits.element_size() <= (
        local_logits.untyped_storage().nbytes()
    )
    if column_stride != 1 or row_stride % ROW_MULTIPLE or not is_aligned:
        raise ValueError(
            f"local_logits has strides ({row_stride}, {column_stride}) and begins at byte "
            f"{local_logits.data_ptr()}: rows must begin at multiples of {ROW_MULTIPLE} elements "
            f"and of {ACCESS_BYTES} bytes; allocate them with contract.padded_logits"
        )


def check_upstream(upstream: Given | TokenGrpo, targets_R: Tensor) -> None:
    """Check the loss's gradients, or what they follow from, against the rows of the logits.

    Raises:
        ValueError: names the tensor, what it has, and what it should have.
    """
    if isinstance(upstream, TokenGrpo):
        check_rows(upstream.rows)
        check_options(upstream.rows, upstream.config)
        check_vector(
            *("sequence_R", upstream.sequence_R, torch.int32),
            *(upstream.rows.target_ids_R, "target_ids_R"),
        )
        moves = upstream.rows.old_logprobs_R is not None or upstream.config.tis_cap != 0
        if upstream.config.ratio == "sequence" and moves:
            raise ValueError(
                "algorithm.ratio='sequence' with old_logprobs_R or tis_cap gives a row a gradient "
                "that depends on other chunks; use sequence_loss, and its gradients as given ones"
            )
        num_rows, total = len(targets_R), len(upstream.rows.target_ids_R)
        if not 0 <= upstream.start <= total - num_rows:
            raise ValueError(
                f"start={upstream.start} with {num_rows} rows of logits is not within the {total} "
                "response rows"
            )
        return
    for name, gradient_R in (
        ("d_logprobs_R", upstream.d_logprobs_R),
        ("d_entropy_R", upstream.d_entropy_R),
    ):
        if gradient_R is not None:
            check_vector(name, gradient_R, torch.float32, targets_R, "targets_R")


def padded_logits(num_rows: int, num_columns: int, like: Tensor) -> Tensor:
    """Allocate [rows, columns] in storage whose rows begin at multiples of `ROW_MULTIPLE`."""
    return like.new_empty(num_rows, padded(num_columns))[:, :num_columns]


def padded(num_columns: int) -> int:
    """Round a number of columns up to a multiple of `ROW_MULTIPLE`."""
    return -(-num_columns // ROW_MULTIPLE) * ROW_MULTIPLE


def gather_statistics(statistics_4R: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Bring the ranks' statistics together, [ranks, 4, R]: the softmax's one collective."""
    if tp_group is None:
        return statistics_4R.unsqueeze(0)
    num_ranks, num_rows = tp_group.size(), statistics_4R.shape[1]
    gathered = statistics_4R.new_empty(num_ranks * 4, num_rows)  # end to end: as gloo wants it
    dist.all_gather_into_tensor(gathered, statistics_4R, group=tp_group)
    return gathered.view(num_ranks, 4, num_rows)


def combine_statistics(gathered_K4R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs, entropies and log of the softmax's denominator, each [R], in nats."""
    highest_KR, total_KR, target_KR, spread_KR = gathered_K4R.unbind(1)
    highest_R = highest_KR.amax(0)
    shift_KR = highest_KR - highest_R
    scale_KR = shift_KR.exp()
    total_R = (scale_KR * total_KR).sum(0)
    log_total_R = total_R.log()
    spread_R = (scale_KR * (spread_KR + shift_KR * total_KR)).sum(0)
    log_denominator_R = log_total_R + highest_R
    logprobs_R = target_KR.amax(0) - log_denominator_R
    return logprobs_R, log_total_R - spread_R / total_R, log_denominator_R

"""Batches and logits for the kernels' cases, and what the float64 definition says of them.

R response tokens (rows), S sequences, N rewards.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: it is read with the kernels

import pytest
import torch
from torch import Tensor

from megatron_mmr1.algorithms.advantages import group_advantages
from megatron_mmr1.algorithms.grpo_loss import (
    GrpoLoss,
    grpo_loss,
    loss_counts,
    selective_logprobs,
    token_weights,
)
from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels import closed_form, contract, triton_form
from megatron_mmr1.kernels.contract import Form, SequenceLoss, Vocabulary
from megatron_mmr1.kernels.sequences import pack_sequences
from megatron_mmr1.types import ResponseRows

any_form = pytest.mark.parametrize("form", [closed_form, triton_form], ids=["torch", "triton"])
NAN = math.nan
FIXED_LENGTH = 64
# Float32 logits of some tens carry errors of 1e-6 into the exponent: that much, relative, into a
# probability, and absolute into a log-prob.
FLOAT32 = {"rtol": 1e-5, "atol": 2e-6}
ALL = AlgorithmConfig(
    clip_high=0.28, dual_clip=1.5, tis_cap=1.1, kl_coefficient=0.1, entropy_coefficient=0.02
)
Group = tuple[float, ...]
# A mixed group, one of equal rewards, a singleton, one with an unjudged reward, and one that is
# larger than a block and whose members are, but for two, on other ranks.
GROUPS: tuple[Group, ...] = (
    (1.0, 0.0, 2.0),
    (0.1,) * 6,
    (0.5,),
    (0.3, NAN, 1.3),
    tuple(float(i % 3) for i in range(40)),
)
# (group, member, tokens): among them an empty one, one longer than a block, and first and last
# members of groups.
SEQUENCES = (
    (3, 0, 6),
    (0, 1, 300),
    (4, 39, 5),
    (1, 2, 4),
    (0, 0, 3),
    (4, 0, 0),
    (2, 0, 2),
    (3, 1, 3),
    (0, 2, 4),
)
LEFT_OUT = 8  # the sequence of weight 0


@dataclass(frozen=True)
class Batch:
    """Rows, the log-probs and entropies that the policy gives them, and their groups' rewards."""

    rows: ResponseRows
    logprobs_R: Tensor
    entropy_R: Tensor
    groups: Sequence[Group]

    def with_rows(self, **vectors: Tensor | None) -> Batch:
        return replace(self, rows=replace(self.rows, **vectors))

    def of_policy(self, target_ids_R: Tensor, logprobs_R: Tensor) -> Batch:
        """The same around other log-probs: of a policy that is as far from old, rollout and ref."""
        logprobs_R = logprobs_R.detach().float()
        vectors = {
            name: None if vector is None else vector - self.logprobs_R + logprobs_R
            for name in ("old_logprobs_R", "rollout_logprobs_R", "ref_logprobs_R")
            for vector in [getattr(self.rows, name)]
        }
        batch = self.with_rows(target_ids_R=target_ids_R, **vectors)
        return replace(batch, logprobs_R=logprobs_R)

    def found(self, form: Form, config: AlgorithmConfig) -> SequenceLoss:
        return form.sequence_loss(self.logprobs_R, self.entropy_R, self.rows, config)

    def definition(
        self, logprobs_R: Tensor, entropy_R: Tensor, config: AlgorithmConfig
    ) -> GrpoLoss:
        """The definition in float64 at the rows' float32 inputs; with gradient."""
        rows, sequences = self.rows, self.rows.sequences
        advantages_N = torch.cat(
            [
                group_advantages(torch.tensor([group]).double(), config.advantage_scale).flatten()
                for group in self.groups
            ]
        )
        sequence_R = torch.repeat_interleave(sequences.offsets_S1.diff())
        old_R, ref_R = rows.old_logprobs_R, rows.ref_logprobs_R
        return grpo_loss(
            logprobs_R,
            advantages_N[sequences.reward_S.long()][sequence_R],
            sequences.weight_S.double()[sequence_R],
            config,
            sequence=sequence_R,
            old_logprobs=None if old_R is None else old_R.double(),
            rollout_logprobs=rows.rollout_logprobs_R.double(),
            ref_logprobs=None if ref_R is None else ref_R.double(),
            entropy=entropy_R,
        )

    def expected(self, config: AlgorithmConfig) -> SequenceLoss:
        """The definition's sums and gradients, float64."""
        leaves = [leaf_of(self.logprobs_R), leaf_of(self.entropy_R)]
        result = self.definition(*leaves, config)
        sums = torch.stack([getattr(result, name).detach().double() for name in contract.SUMS])
        if not result.loss.requires_grad:  # no row at all
            return SequenceLoss(sums, *leaves)
        gradients = torch.autograd.grad(result.loss, leaves, materialize_grads=True)
        return SequenceLoss(sums, *gradients)


def make_batch(
    *,
    groups: Sequence[Group] = GROUPS,
    sequences: Sequence[tuple[int, int, int]] = SEQUENCES,
    left_out: Sequence[int] = (LEFT_OUT,),
    aggregation: str = "token_mean",
    has_old: bool = True,
    has_ref: bool = True,
) -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = [length for _, _, length in sequences]
    cu_seqlens = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    offsets = [sum(map(len, groups[:p])) for p in range(len(groups) + 1)]
    num_rows = cu_seqlens[-1]

    def around(centre: Tensor | float, by: float) -> Tensor:
        return centre + by * torch.randn(num_rows, generator=generator)

    lengths_S = torch.tensor(lengths, dtype=torch.long)
    kept_S = torch.ones(len(lengths), dtype=torch.bool)
    kept_S[list(left_out)] = False
    counts = loss_counts(lengths_S, kept_S)
    packed = pack_sequences(
        cu_seqlens,
        num_rows,
        sample=range(len(lengths)),
        weight=token_weights(lengths_S, kept_S, aggregation, *counts, FIXED_LENGTH).tolist(),
        reward_index=[offsets[p] + member for p, member, _ in sequences],
        group_offsets=offsets,
        rewards_N=torch.tensor([r for group in groups for r in group]),
    )
    logprobs_R = around(-2.0, 0.5)
    old_R = around(logprobs_R, 0.3)
    rows = ResponseRows(
        target_ids_R=torch.zeros(num_rows, dtype=torch.long),
        rollout_logprobs_R=around(old_R, 0.2),
        sequences=packed,
        old_logprobs_R=old_R if has_old else None,
        ref_logprobs_R=around(logprobs_R, 0.3) if has_ref else None,
    )
    return Batch(rows, logprobs_R, around(2.0, 0.5), groups)


def assert_close(found: SequenceLoss, expected: SequenceLoss) -> None:
    """Float32 rounds at 6e-8. A log-ratio, a ratio and a product each add a few of these to a
    term; terms are at most the weights, which sum to about 1, times numbers of order 1.
    """
    torch.testing.assert_close(found.sums.double(), expected.sums, rtol=3e-6, atol=1e-6)
    gradients = [(found.d_logprobs_R, expected.d_logprobs_R)]
    if found.d_entropy_R is not None:
        gradients.append((found.d_entropy_R, expected.d_entropy_R))
    for gradient_R, expected_R in gradients:
        scale = expected_R.abs().max().item() if len(expected_R) else 0.0
        torch.testing.assert_close(gradient_R.double(), expected_R, rtol=3e-6, atol=3e-7 * scale)


def make_logits(num_rows: int, num_columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(num_rows, num_columns, generator=generator)).to(dtype)


class Stored:
    """A copy of logits as the kernels take them, in storage that has NaN wherever they are not."""

    def __init__(self, logits: Tensor) -> None:
        num_rows, num_columns = logits.shape
        self._storage = logits.new_full((num_rows + 1, contract.padded(num_columns)), NAN)
        self.logits = self._storage[:num_rows, :num_columns]
        self.logits.copy_(logits)

    def is_intact_behind(self) -> bool:
        """Whether nobody wrote past the last row."""
        return bool(self._storage[len(self.logits) :].isnan().all())


def leaf_of(tensor: Tensor) -> Tensor:
    """A float64 copy to differentiate by."""
    return tensor.detach().double().clone().requires_grad_()


def definition_of_rows(
    logits: Tensor, targets_R: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of logits with padding columns."""
    rule = vocabulary.rule
    return selective_logprobs(
        logits[:, : vocabulary.num_tokens], targets_R, rule.temperature, rule.banned_token_ids
    )

"""The trainer's GRPO loss with nothing but the definition in algorithms/ and autograd.

For one process (no tensor or context parallelism): what the kernels are replayed against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mmr1.algorithms.advantages import group_advantages
from megatron_mmr1.algorithms.grpo_loss import grpo_loss, selective_logprobs
from megatron_mmr1.backend.layout import LocalView
from megatron_mmr1.backend.losses import LossFunction, LossResult, grpo_metrics
from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels.contract import SUMS
from megatron_mmr1.kernels.head import OutputHead
from megatron_mmr1.types import PackedSequences


def definition_grpo(config: AlgorithmConfig) -> LossFunction:
    """Return what `backend.losses.grpo` computes, by the definition."""

    def loss(hidden_RD: Tensor, head: OutputHead, view: LocalView) -> LossResult:
        rows, rule = view.rows, head.vocabulary.rule
        assert head.vocabulary.tp_group is None and len(view.row_index_R) == len(rows.target_ids_R)
        logits_RV = (hidden_RD @ head.local_weight.t())[:, : head.vocabulary.num_tokens]
        logprobs_R, entropy_R = selective_logprobs(
            logits_RV, rows.target_ids_R, rule.temperature, rule.banned_token_ids
        )
        result = grpo_loss(
            logprobs_R,
            advantages(rows.sequences, config)[rows.sequence_R],
            rows.token_weights_R,
            config,
            sequence=rows.sequence_R.long(),
            old_logprobs=rows.old_logprobs_R,
            rollout_logprobs=rows.rollout_logprobs_R,
            ref_logprobs=rows.ref_logprobs_R,
            entropy=entropy_R,
        )
        sums = [getattr(result, name).detach().float() for name in SUMS]
        return grpo_metrics(result.loss, torch.stack(sums), rows, config)

    return loss


def advantages(sequences: PackedSequences, config: AlgorithmConfig) -> Tensor:
    """Return each sequence's advantage [S] from its group's rewards."""
    values = []
    for place, (start, end) in zip(
        sequences.reward_S.tolist(), sequences.group_S2.tolist(), strict=True
    ):
        group_PG = sequences.rewards_N[None, start:end]
        values.append(group_advantages(group_PG, config.advantage_scale)[0, place - start])
    return torch.stack(values) if values else sequences.rewards_N.new_empty(0)

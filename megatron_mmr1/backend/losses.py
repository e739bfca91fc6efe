"""What the policy's train step is asked to minimise:
the maths of algorithms/ applied to a micro-batch's logits.

N sequences, S sequence length, R response tokens (the True entries of response_mask_NS, row by
row), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_mmr1.algorithms.grpo_loss import grpo_loss, selective_logprobs, supervised_loss
from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.types import MicroBatch


@dataclass(frozen=True, slots=True)
class LossResult:
    """A micro-batch's share of the step's loss, and of its metrics.

    Attributes:
        loss: scalar; the step's loss is the plain sum over micro-batches and ranks.
        sums: metrics that add up in the same way.
        maxima: metrics whose largest value counts.
    """

    loss: Tensor
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)


LossFunction = Callable[[Tensor, MicroBatch], LossResult]


@dataclass(frozen=True, slots=True)
class SoftmaxRule:
    """The distribution that tokens are drawn from: the same for engine and trainer."""

    temperature: float
    banned_token_ids: tuple[int, ...]


def response_logprobs(
    logits_RV: Tensor, batch: MicroBatch, rule: SoftmaxRule
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies (nats, fp32, [N, S]) of the response tokens;
    0 elsewhere.
    """
    tokens_R = batch.token_ids_NS[batch.response_mask_NS]
    logprobs_R, entropy_R = selective_logprobs(
        logits_RV, tokens_R, rule.temperature, rule.banned_token_ids
    )
    zeros_NS = torch.zeros(
        batch.token_ids_NS.shape, dtype=logprobs_R.dtype, device=logits_RV.device
    )
    mask_NS = batch.response_mask_NS
    return zeros_NS.masked_scatter(mask_NS, logprobs_R), zeros_NS.masked_scatter(mask_NS, entropy_R)


def grpo(config: AlgorithmConfig, rule: SoftmaxRule) -> LossFunction:
    """Return the GRPO loss of a micro-batch.

    Without `old_logprobs` the current log-probs, detached, stand for them: they are equal when one
    optimizer step consumes the batch, and a second pass would be wasted. `logprob_diff` compares
    the engine's log-probs with these, so both come from the same weights.
    """

    def loss(logits_RV: Tensor, batch: MicroBatch) -> LossResult:
        assert batch.advantages_N is not None and batch.rollout_logprobs_NS is not None
        logprobs_NS, entropy_NS = response_logprobs(logits_RV, batch, rule)
        old_NS = (
            batch.old_logprobs_NS if batch.old_logprobs_NS is not None else logprobs_NS.detach()
        )
        result = grpo_loss(
            logprobs_NS,
            old_NS,
            batch.advantages_N,
            batch.token_weights_NS,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_coefficient=config.kl_coefficient,
            ref_logprobs=batch.ref_logprobs_NS,
        )
        diff_R = (old_NS - batch.rollout_logprobs_NS)[batch.response_mask_NS].abs()
        sums = {
            "loss": result.loss.item(),
            "clip_fraction": float(result.clip_fraction),
            "entropy/mean": float((entropy_NS.detach() * batch.token_weights_NS).sum()),
            "logprob_diff/sum": float(diff_R.double().sum()),
            "tokens/response": float(diff_R.numel()),
            "tokens/nonfinite": float(result.num_nonfinite),
        }
        if batch.old_logprobs_NS is not None:
            sums["policy_kl/mean"] = float(result.policy_kl)
        if batch.ref_logprobs_NS is not None:
            sums["kl/mean"] = float(result.kl)
        return LossResult(result.loss, sums, {"logprob_diff/max": float(diff_R.max())})

    return loss


def supervised(rule: SoftmaxRule) -> LossFunction:
    """Return the cold start's negative log-likelihood of the response tokens."""

    def loss(logits_RV: Tensor, batch: MicroBatch) -> LossResult:
        logprobs_NS, _ = response_logprobs(logits_RV, batch, rule)
        value = supervised_loss(logprobs_NS, batch.token_weights_NS)
        return LossResult(value, {"loss": value.item()})

    return loss


def total(results: Sequence[LossResult]) -> LossResult:
    """Add up this rank's micro-batches
    (the losses themselves are dropped: their graphs are gone).
    """
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for result in results:
        for name, value in result.sums.items():
            sums[name] = sums.get(name, 0.0) + value
        for name, value in result.maxima.items():
            maxima[name] = max(maxima.get(name, value), value)
    return LossResult(torch.zeros(()), sums, maxima)


def mean_of_steps(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Combine a batch's optimizer steps: counts and sums add up, maxima stay,
    everything else is averaged.

    `logprob_diff/sum` over `tokens/response` becomes `logprob_diff/mean`.
    """
    metrics: dict[str, float] = {}
    for name in steps[0]:
        values = [step[name] for step in steps]
        if name.endswith("/max"):
            metrics[name] = max(values)
        elif name.startswith("tokens/") or name.endswith("/sum"):
            metrics[name] = sum(values)
        else:
            metrics[name] = sum(values) / len(values)
    metrics["logprob_diff/mean"] = metrics.pop("logprob_diff/sum") / metrics["tokens/response"]
    return metrics

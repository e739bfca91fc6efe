"""What the policy's train step is asked to minimise:
the maths of algorithms/ applied to a micro-batch's response rows.

R response tokens (of this rank), V vocabulary (of this rank).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_mmr1.algorithms.grpo_loss import grpo_loss, supervised_loss
from megatron_mmr1.backend.vocab_parallel import selective_logprobs
from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.types import ResponseRows


@dataclass(frozen=True, slots=True)
class LossResult:
    """A rank's and micro-batch's share of the step's loss, and of its metrics.

    Attributes:
        loss: scalar; the step's loss is the plain sum over micro-batches and ranks.
        sums: metrics that add up in the same way.
        maxima: metrics whose largest value counts.
    """

    loss: Tensor
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)


LossFunction = Callable[[Tensor, ResponseRows], LossResult]


@dataclass(frozen=True, slots=True)
class SoftmaxRule:
    """The distribution that tokens are drawn from: the same for engine and trainer."""

    temperature: float
    banned_token_ids: tuple[int, ...]

    def logprobs(self, logits_RV: Tensor, rows: ResponseRows) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies (nats, fp32) of the response tokens."""
        return selective_logprobs(
            logits_RV, rows.target_ids_R, self.temperature, self.banned_token_ids
        )


def grpo(config: AlgorithmConfig, rule: SoftmaxRule) -> LossFunction:
    """Return the GRPO loss of a micro-batch.

    Without `old_logprobs` the current log-probs, detached, stand for them: they are equal when one
    optimizer step consumes the batch, and a second pass would be wasted. `logprob_diff` compares
    the engine's log-probs with these, so both come from the same weights.
    """

    def loss(logits_RV: Tensor, rows: ResponseRows) -> LossResult:
        logprobs_R, entropy_R = rule.logprobs(logits_RV, rows)
        old_R = rows.old_logprobs_R if rows.old_logprobs_R is not None else logprobs_R.detach()
        result = grpo_loss(
            logprobs_R,
            old_R,
            rows.advantages_R,
            rows.token_weights_R,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_coefficient=config.kl_coefficient,
            ref_logprobs=rows.ref_logprobs_R,
        )
        diff_R = (old_R - rows.rollout_logprobs_R).abs()
        sums = {
            "loss": result.loss.item(),
            "clip_fraction": float(result.clip_fraction),
            "entropy/mean": float((entropy_R.detach() * rows.token_weights_R).sum()),
            "logprob_diff/sum": float(diff_R.double().sum()),
            "tokens/response": float(diff_R.numel()),
            "tokens/nonfinite": float(result.num_nonfinite),
        }
        if rows.old_logprobs_R is not None:
            sums["policy_kl/mean"] = float(result.policy_kl)
        if rows.ref_logprobs_R is not None:
            sums["kl/mean"] = float(result.kl)
        # A micro-batch may be empty here: context parallelism and balancing leave ranks without
        # rows.
        largest = float(diff_R.max()) if diff_R.numel() else 0.0
        return LossResult(result.loss, sums, {"logprob_diff/max": largest})

    return loss


def supervised(rule: SoftmaxRule) -> LossFunction:
    """Return the cold start's negative log-likelihood of the response tokens."""

    def loss(logits_RV: Tensor, rows: ResponseRows) -> LossResult:
        logprobs_R, _ = rule.logprobs(logits_RV, rows)
        value = supervised_loss(logprobs_R, rows.token_weights_R)
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

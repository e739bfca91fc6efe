"""What the policy's train step is asked to minimise, on a micro-batch's response rows; metrics.

The maths is in kernels/. Here it meets context parallelism, and the metrics get their names.

R response tokens (of this rank), V vocabulary (of this rank), D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.layout import LocalView
from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels.contract import SUMS, Given
from megatron_mmr1.kernels.head import OutputHead, form_of
from megatron_mmr1.types import ResponseRows


@dataclass(frozen=True, slots=True)
class LossResult:
    """A rank's and micro-batch's share of the step's loss, and of its metrics.

    Attributes:
        loss: scalar; the step's loss is the plain sum over micro-batches and ranks.
        sums: metrics that add up in the same way; scalars on the device, read once a step.
        maxima: metrics whose largest value counts; likewise.
    """

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)


# Called with the hidden states [R, D] that predict the view's rows.
LossFunction = Callable[[Tensor, OutputHead, LocalView], LossResult]


def grpo(config: AlgorithmConfig) -> LossFunction:
    """Return the GRPO loss of a micro-batch.

    Without `old_logprobs` the current log-probs stand for them: they are equal when one optimizer
    step consumes the batch, and a second pass would be wasted. `logprob_diff` compares the engine's
    log-probs with these, so both come from the same weights.
    """

    def loss(hidden_RD: Tensor, head: OutputHead, view: LocalView) -> LossResult:
        rows = view.rows
        # A policy that has not moved yet has ratio 1 for every token, and so for every sequence.
        is_on_policy = rows.old_logprobs_R is None and config.tis_cap == 0
        if config.ratio == "token" or is_on_policy:
            value, sums = head.grpo_loss(hidden_RD, rows, config)
        else:
            value, sums = _sequence_ratio_loss(hidden_RD, head, view, config)
        return grpo_metrics(value, sums, rows, config)

    return loss


def grpo_metrics(
    loss: Tensor, sums: Tensor, rows: ResponseRows, config: AlgorithmConfig
) -> LossResult:
    """Give `kernels.contract.SUMS` the metrics' names; those of absent options are left out."""
    found = dict(zip(SUMS, sums.unbind(), strict=True))
    metrics = {
        "loss": found["loss"],
        "clip_fraction": found["clip_fraction"],
        "entropy/mean": found["entropy"],
        "logprob_diff/sum": found["diff_sum"],
        "tokens/compared": found["num_compared"],
        # Filled on the device: a copy from the host would wait for the forward pass.
        "tokens/response": sums.new_full((), len(rows.target_ids_R)),
        "tokens/nonfinite": found["num_nonfinite"],
    }
    if rows.old_logprobs_R is not None:
        metrics["policy_kl/mean"] = found["policy_kl"]
    if rows.ref_logprobs_R is not None:
        metrics["kl/mean"] = found["kl"]
    if config.tis_cap:
        metrics["tis_truncated_fraction"] = found["tis_truncated"]
    return LossResult(loss, metrics, {"logprob_diff/max": found["diff_max"]})


def _sequence_ratio_loss(
    hidden_RD: Tensor, head: OutputHead, view: LocalView, config: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """GRPO's loss with one ratio a sequence: the log-probs first, then loss and gradients.

    Parallelism: context-parallel ranks hold parts of a sequence, so all of them get its log-probs
    (one all-reduce) and compute its loss; the first one reports it.
    """
    logprobs_R, entropy_R = head.logprobs(hidden_RD, view.rows.target_ids_R, needs_entropy=True)
    assert entropy_R is not None
    whole_2R = logprobs_R.new_zeros(2, len(view.whole_rows.target_ids_R))  # one message for both
    whole_2R[:, view.row_index_R] = torch.stack([logprobs_R, entropy_R])
    cp_group = parallel.cp_group()
    if cp_group.size() > 1:
        dist.all_reduce(whole_2R, group=cp_group)
    form = form_of(head.kernels, hidden_RD.device)
    found = form.sequence_loss(whole_2R[0], whole_2R[1], view.whole_rows, config)
    d_entropy_R = found.d_entropy_R
    upstream = Given(
        found.d_logprobs_R[view.row_index_R],
        None if d_entropy_R is None else d_entropy_R[view.row_index_R],
    )
    sums = found.sums if cp_group.rank() == 0 else torch.zeros_like(found.sums)
    loss, _ = head.given_loss(hidden_RD, view.rows.target_ids_R, sums[0], upstream)
    return loss, sums


def supervised() -> LossFunction:
    """Return the cold start's negative log-likelihood of the response tokens."""

    def loss(hidden_RD: Tensor, head: OutputHead, view: LocalView) -> LossResult:
        rows = view.rows
        value, _ = head.given_loss(hidden_RD, rows.target_ids_R, None, Given(-rows.token_weights_R))
        return LossResult(value, {"loss": value.detach()})

    return loss


def total(results: Sequence[LossResult]) -> tuple[dict[str, float], dict[str, float]]:
    """Add up this rank's micro-batches, in float64, and read the sums and maxima off the device."""
    sums = _read([result.sums for result in results], lambda values: values.sum())
    return sums, _read([result.maxima for result in results], lambda values: values.max())


def _read(
    parts: Sequence[dict[str, Tensor]], reduce: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    names = list(parts[0]) if parts else []
    if not names:
        return {}
    reduced = [reduce(torch.stack([part[name] for part in parts]).double()) for name in names]
    return dict(zip(names, torch.stack(reduced).tolist(), strict=True))


def mean_of_steps(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Combine a batch's optimizer steps: counts and sums add up, maxima stay,
    everything else is averaged.

    `logprob_diff/sum` over `tokens/compared` becomes `logprob_diff/mean`; the response tokens that
    could not be compared, since a log-prob of engine or trainer is not finite, `tokens/uncompared`.
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
    num_compared = metrics.pop("tokens/compared")
    metrics["tokens/uncompared"] = metrics["tokens/response"] - num_compared
    metrics["logprob_diff/mean"] = metrics.pop("logprob_diff/sum") / max(num_compared, 1.0)
    return metrics

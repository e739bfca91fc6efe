"""Log-probabilities, token weights and the clipped GRPO loss (arXiv:2402.03300, arXiv:2509.21268).

The definition, without padding tricks or parallelism: no collective runs here. Masking is by
`where` on the INPUTS, never by multiplying, so that whatever stands at a masked position reaches
neither the loss nor a gradient. Losses are sums over tokens in any arrangement: packed or padded.
Legend: N sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # beyond it exp() is of no use to anyone: constant, with zero gradient
TAYLOR_BELOW = 0.125  # below it exp(x) - 1 - x loses its leading digits to cancellation
TAYLOR_ORDER = 11  # the next term is below 1e-17 of the sum: enough for float64


def selective_logprobs(
    logits_NSV: Tensor, token_ids_NS: Tensor, temperature: float, banned_token_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-probability of each given token, and the entropy, as the engine sampled.

    Equation: softmax(logits / temperature) over the token ids that are not banned. A banned token
    itself has log-probability -inf (the loss counts it as non-finite).

    Args:
        logits_NSV: any float dtype, any leading shape; float64 is kept, everything else becomes
            float32.
        token_ids_NS: int64, the leading shape of the logits.
        temperature: > 0, the one of the rollouts.
        banned_token_ids: ids that the engine never samples.

    Returns:
        logprobs_NS and entropy_NS, in nats, float32 or float64; both carry gradients.
    """
    dtype = torch.float64 if logits_NSV.dtype == torch.float64 else torch.float32
    scaled_NSV = logits_NSV.to(dtype) / temperature
    if banned_token_ids:
        banned = torch.tensor(list(banned_token_ids), device=logits_NSV.device)
        scaled_NSV = scaled_NSV.index_fill(-1, banned, -torch.inf)
    all_logprobs_NSV = scaled_NSV.log_softmax(dim=-1)
    logprobs_NS = all_logprobs_NSV.gather(-1, token_ids_NS.unsqueeze(-1)).squeeze(-1)
    # An impossible token adds 0 to the entropy, not 0 * -inf.
    finite_NSV = all_logprobs_NSV.masked_fill(all_logprobs_NSV == -torch.inf, 0.0)
    entropy_NS = -(all_logprobs_NSV.exp() * finite_NSV).sum(dim=-1)
    return logprobs_NS, entropy_NS


def loss_counts(lengths_N: Tensor, kept_N: Tensor) -> tuple[int, int]:
    """Count the (tokens, sequences) that `token_weights` divides by.

    Counted are the response tokens of kept sequences, and the kept sequences that have any. For a
    step's denominators give the sequences of all micro-batches and data-parallel ranks.
    """
    num_tokens_N = torch.where(kept_N, lengths_N, 0)
    return int(num_tokens_N.sum()), int((num_tokens_N > 0).sum())


def token_weights(
    lengths_N: Tensor,
    kept_N: Tensor,
    aggregation: str,
    num_tokens: int,
    num_sequences: int,
) -> Tensor:
    """The share of the loss that each token of a sequence has.

    A step's loss is the plain sum of weight * token loss. The denominators are global, so that the
    sum does not depend on the split. With "token_mean" a weight is one over `num_tokens`: the
    number of judged response tokens in the optimizer step's global batch. With "sequence_mean" it
    is one over (the sequence's own number of response tokens, times `num_sequences`: the number of
    judged, non-empty sequences in the optimizer step's global batch). Global = over all
    micro-batches and all data-parallel ranks, as `loss_counts` counts them; ranks then add
    gradients, they do not average them. A token that turns out non-finite stays in the denominator.

    Args:
        lengths_N: int64, response tokens of each sequence.
        kept_N: bool, False for a sequence that could not be judged: weight 0, and not counted.

    Returns:
        float32 [N]; all zero when nothing is kept.

    Raises:
        ValueError: unknown aggregation.
    """
    if aggregation == "token_mean":
        denominator_N = torch.full_like(lengths_N, num_tokens)
    elif aggregation == "sequence_mean":
        denominator_N = lengths_N * num_sequences
    else:
        raise ValueError(
            f"algorithm.aggregation={aggregation!r} is unknown; use token_mean or sequence_mean"
        )
    weight_N = denominator_N.clamp(min=1).to(torch.float64).reciprocal().to(torch.float32)
    return torch.where(kept_N, weight_N, 0.0)


@dataclass(frozen=True, slots=True)
class GrpoLoss:
    """The loss of some sequences and its detached metrics; all are plain sums and add over splits.

    Attributes:
        loss: scalar with gradient, sum of weight * token loss.
        clip_fraction: sum of the weights of the tokens where clipping replaced the objective.
        kl: weighted sum of k3 against the reference, in nats; 0 without a reference.
        policy_kl: weighted sum of k3 of the policy now against `old_logprobs`, in nats.
        num_nonfinite: int64, tokens of positive weight with a non-finite input; each has zero loss
            and zero gradient, and the trainer stops when there is any.
    """

    loss: Tensor
    clip_fraction: Tensor
    kl: Tensor
    policy_kl: Tensor
    num_nonfinite: Tensor


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float = 0.0,
    ref_logprobs: Tensor | None = None,
) -> GrpoLoss:
    """Clipped policy-gradient loss with an optional k3 penalty towards a reference policy.

    Equation (arXiv:2402.03300, eq. 3; clip range split as in DAPO, arXiv:2503.14476), a token:
        -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
            + kl_coefficient * k3(ref_logprobs - logprobs)
    with ratio = exp(logprobs - old_logprobs), the log-ratio clamped to +-20 with zero gradient
    outside. The denominator is in `token_weights`.

    Args:
        logprobs: float32 or float64, with gradient; one a token, in any shape.
        old_logprobs, ref_logprobs: of that shape, constants; their gradients are cut.
        advantages: each token's, its sequence's; of that shape, or one that broadcasts to it.
        token_weights: of that shape, from `token_weights`; a token of weight 0 may hold anything.

    Raises:
        ValueError: a KL coefficient without a reference.
    """
    if kl_coefficient != 0.0 and ref_logprobs is None:
        raise ValueError(
            f"algorithm.kl_coefficient={kl_coefficient} needs reference log-probabilities;"
            " pass them or set it to 0"
        )
    constants = [old_logprobs.detach(), advantages.detach()]
    if ref_logprobs is not None:
        constants.append(ref_logprobs.detach())
    is_weighted = token_weights != 0
    is_finite = logprobs.detach().isfinite()
    for constant in constants:
        is_finite = is_finite & constant.isfinite()
    is_used = is_weighted & is_finite

    def used(values: Tensor) -> Tensor:
        return torch.where(is_used, values, 0.0)

    weights = used(token_weights)
    advantages = used(constants[1])
    log_ratio = used(logprobs) - used(constants[0])
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    token_loss = -torch.minimum(ratio * advantages, clipped * advantages)
    is_clipped = (clipped * advantages < ratio * advantages).detach()
    kl = torch.zeros_like(token_loss)
    if ref_logprobs is not None:
        kl = k3(used(constants[2]) - used(logprobs))
        token_loss = token_loss + kl_coefficient * kl
    return GrpoLoss(
        loss=(weights * token_loss).sum(),
        clip_fraction=torch.where(is_clipped, weights, 0.0).sum(),
        kl=(weights * kl.detach()).sum(),
        policy_kl=(weights * k3(log_ratio.detach())).sum(),
        num_nonfinite=(is_weighted & ~is_finite).sum(),
    )


def k3(log_ratio: Tensor) -> Tensor:
    """Low-variance KL estimate exp(x) - 1 - x >= 0, verl's low_var_kl.

    Source: Schulman, "Approximating KL Divergence" (2020), estimator k3.
    With x = ref - logprobs on tokens of the policy it estimates KL(policy || reference). x is
    clamped to +-20 with zero gradient outside; below 1/8 the Taylor series replaces the cancelling
    difference.
    """
    x = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    series = torch.ones_like(x)
    for order in range(TAYLOR_ORDER, 2, -1):  # x^2/2 * (1 + x/3 * (1 + x/4 * (...)))
        series = 1.0 + x / order * series
    return torch.where(x.abs() < TAYLOR_BELOW, 0.5 * x.square() * series, x.expm1() - x)


def supervised_loss(logprobs: Tensor, token_weights: Tensor) -> Tensor:
    """Weighted negative log-likelihood, -sum(weight * logprob); the denominator is in the weights.

    A token of weight 0 may hold anything; a non-finite one of positive weight makes the loss
    non-finite.
    """
    return -(token_weights * torch.where(token_weights != 0, logprobs, 0.0)).sum()

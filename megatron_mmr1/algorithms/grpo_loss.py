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

from megatron_mmr1.config.schema import AlgorithmConfig

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
    fixed_length: int,
) -> Tensor:
    """The share of the loss that each token of a sequence has.

    A step's loss is the plain sum of weight * token loss. The denominators are global, so that the
    sum does not depend on the split. A weight is one over
    - "token_mean": `num_tokens`, the judged response tokens in the optimizer step's global batch;
    - "sequence_mean": the sequence's own number of response tokens, times `num_sequences`, the
      judged, non-empty sequences in the optimizer step's global batch;
    - "fixed_length": `fixed_length` times `num_sequences` (Dr.GRPO, arXiv:2503.20783: no response
      is favoured for its length).
    Global = over all micro-batches and all data-parallel ranks, as `loss_counts` counts them; ranks
    then add gradients, they do not average them. A token that turns out non-finite stays in the
    denominator.

    Args:
        lengths_N: int64, response tokens of each sequence.
        kept_N: bool, False for a sequence that could not be judged: weight 0, and not counted.
        fixed_length: tokens, the limit on a response's length; for "fixed_length" only.

    Returns:
        float32 [N]; all zero when nothing is kept.

    Raises:
        ValueError: unknown aggregation.
    """
    if aggregation == "token_mean":
        denominator_N = torch.full_like(lengths_N, num_tokens)
    elif aggregation == "sequence_mean":
        denominator_N = lengths_N * num_sequences
    elif aggregation == "fixed_length":
        denominator_N = torch.full_like(lengths_N, fixed_length * num_sequences)
    else:
        raise ValueError(
            f"algorithm.aggregation={aggregation!r} is unknown; use token_mean, sequence_mean or "
            "fixed_length"
        )
    weight_N = denominator_N.clamp(min=1).to(torch.float64).reciprocal().to(torch.float32)
    return torch.where(kept_N, weight_N, 0.0)


@dataclass(frozen=True, slots=True)
class GrpoLoss:
    """The loss of some sequences and its detached metrics.

    All but `diff_max` are plain sums and add over splits; a "weighted sum" is over the finite
    tokens of positive weight, of weight * value.

    Attributes:
        loss: scalar with gradient, weighted sum of the token losses.
        clip_fraction: sum of the weights of the tokens where a clip replaced the objective.
        kl: weighted sum of k3 against the reference, in nats; 0 without a reference.
        policy_kl: weighted sum of k3 of the policy now against `old_logprobs`, in nats.
        entropy: weighted sum, in nats; 0 when not given.
        tis_truncated: sum of the weights of the tokens whose trainer/rollout ratio was capped.
        num_nonfinite: tokens of positive weight with a non-finite input; each has zero loss and
            zero gradient, and the trainer stops when there is any.
        num_compared: tokens of any weight whose `old_logprobs` and `rollout_logprobs` are finite.
        diff_sum, diff_max: of |old_logprobs - rollout_logprobs| over these.
    """

    loss: Tensor
    clip_fraction: Tensor
    kl: Tensor
    policy_kl: Tensor
    entropy: Tensor
    tis_truncated: Tensor
    num_nonfinite: Tensor
    num_compared: Tensor
    diff_sum: Tensor
    diff_max: Tensor


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    config: AlgorithmConfig,
    *,
    sequence: Tensor,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> GrpoLoss:
    """Clipped policy-gradient loss with its options, as the sum over tokens of weight *

        -tis * objective(ratio, A) + kl_coefficient * k3(ref - logprobs)
            - entropy_coefficient * entropy

    - ratio = exp(x), x = logprobs - old_logprobs clamped to +-20 with zero gradient outside
      (GRPO, arXiv:2402.03300, eq. 3). With ratio "sequence" x is, for all tokens of a sequence, the
      mean of theirs (GSPO, arXiv:2507.18071, eq. 7), over its finite tokens.
    - objective = min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), the range split as
      in DAPO (arXiv:2503.14476); where A < 0 and dual_clip > 0 it is at least dual_clip * A
      (arXiv:1912.09729, eq. 5).
    - tis = min(exp(old_logprobs - rollout_logprobs), tis_cap), a constant: how much likelier the
      trainer's softmax makes a token than the engine's did (truncated importance sampling, as in
      verl and TRL); 1 when tis_cap is 0. It does not scale the KL and entropy terms.
    - Without `old_logprobs` the present ones stand for them, as constants: what they are when one
      optimizer step consumes the batch.

    The denominator is in `token_weights`. A token of positive weight is non-finite when any input
    that is given for it is: advantage, log-probs of any kind (the engine's only with tis_cap),
    entropy (only with a coefficient).

    Args:
        logprobs: float32 or float64, with gradient; one a token, in any shape.
        advantages: each token's, its sequence's; of that shape, or one that broadcasts to it.
        token_weights: of that shape, from `token_weights`; a token of weight 0 may hold anything.
        sequence: int64, of that shape: which sequence a token belongs to; the numbers are names.
        old_logprobs, rollout_logprobs, ref_logprobs: of that shape, constants.
        entropy: of that shape, with gradient.

    Raises:
        ValueError: an option needs an input that is not given.
    """
    _check_given("kl_coefficient", config.kl_coefficient, "ref_logprobs", ref_logprobs)
    _check_given("tis_cap", config.tis_cap, "rollout_logprobs", rollout_logprobs)
    _check_given("entropy_coefficient", config.entropy_coefficient, "entropy", entropy)
    advantages = advantages.detach().expand_as(logprobs)
    old = (logprobs if old_logprobs is None else old_logprobs).detach()
    is_weighted = token_weights != 0
    is_finite = logprobs.detach().isfinite() & advantages.isfinite() & old.isfinite()
    if ref_logprobs is not None:
        is_finite = is_finite & ref_logprobs.isfinite()
    if config.tis_cap and rollout_logprobs is not None:
        is_finite = is_finite & rollout_logprobs.isfinite()
    if config.entropy_coefficient and entropy is not None:
        is_finite = is_finite & entropy.detach().isfinite()
    is_used = is_weighted & is_finite

    def used(values: Tensor) -> Tensor:
        return torch.where(is_used, values, 0.0)

    weights, advantages = used(token_weights), used(advantages)
    token_log_ratio = log_ratio = used(logprobs) - used(old)
    if config.ratio == "sequence":
        log_ratio = _mean_of_sequence(log_ratio, is_used, sequence)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    bounded = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    objective = torch.minimum(ratio * advantages, bounded * advantages)
    if config.dual_clip:
        least = config.dual_clip * advantages
        objective = torch.where(advantages < 0, torch.maximum(objective, least), objective)
    is_clipped = objective.detach() != (ratio * advantages).detach()
    tis = torch.ones_like(weights)
    if config.tis_cap and rollout_logprobs is not None:
        gap = used(old) - used(rollout_logprobs.detach())
        tis = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    token_loss = -(tis.clamp(max=config.tis_cap) if config.tis_cap else tis) * objective
    kl = torch.zeros_like(token_loss)
    if ref_logprobs is not None:
        kl = k3(used(ref_logprobs.detach()) - used(logprobs))
        token_loss = token_loss + config.kl_coefficient * kl
    spread = torch.zeros_like(token_loss)
    if entropy is not None:
        spread = torch.where(is_used & entropy.detach().isfinite(), entropy, 0.0)
        token_loss = token_loss - config.entropy_coefficient * spread
    rollout = torch.full_like(old, torch.nan) if rollout_logprobs is None else rollout_logprobs
    is_compared = old.isfinite() & rollout.isfinite()
    diff = torch.where(is_compared, old - rollout, 0.0).abs()
    return GrpoLoss(
        loss=(weights * token_loss).sum(),
        clip_fraction=torch.where(is_clipped, weights, 0.0).sum(),
        kl=(weights * kl.detach()).sum(),
        policy_kl=(weights * k3(token_log_ratio.detach())).sum(),
        entropy=(weights * spread.detach()).sum(),
        tis_truncated=torch.where(tis > (config.tis_cap or torch.inf), weights, 0.0).sum(),
        num_nonfinite=(is_weighted & ~is_finite).sum(),
        num_compared=is_compared.sum(),
        diff_sum=diff.double().sum(),
        diff_max=diff.max() if diff.numel() else diff.sum(),
    )


def _check_given(key: str, value: float, name: str, tensor: Tensor | None) -> None:
    if value and tensor is None:
        raise ValueError(f"algorithm.{key}={value} needs {name}; pass them or set it to 0")


def _mean_of_sequence(values: Tensor, is_used: Tensor, sequence: Tensor) -> Tensor:
    """Each token's mean over the used tokens of its sequence; values are 0 where not used."""
    _, index = sequence.unique(return_inverse=True)
    zeros = values.new_zeros(int(index.max()) + 1 if index.numel() else 0)
    total = zeros.index_add(0, index.flatten(), values.flatten())
    count = zeros.index_add(0, index.flatten(), is_used.flatten().to(values.dtype))
    return (total / count.clamp(min=1))[index]


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

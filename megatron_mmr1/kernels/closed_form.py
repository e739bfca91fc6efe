"""The kernels' functions in torch: closed-form gradients, in place, without a log-softmax kept.

The path of a machine without a GPU. `Form` in contract.py says what each function does, and
algorithms/grpo_loss.py what it equals.

S sequences, R response tokens (rows), N rewards, V local columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels import contract
from megatron_mmr1.kernels.contract import Given, SequenceLoss, TokenGrpo, Vocabulary
from megatron_mmr1.kernels.sequences import check_options, check_rows
from megatron_mmr1.types import PackedSequences, ResponseRows

_MAX_LOG_RATIO = 20.0
_TAYLOR_BELOW, _TAYLOR_ORDER = 0.5, 14
_ADVANTAGE_EPS = 1e-6
_LOWEST = -1e30  # in place of -inf where nothing is above it, so that differences stay finite
_NOTHING = -1e4  # a logarithm whose exp is 0, and that times 0 is 0
_BLOCK_LOGITS = 2 << 20  # whose exponentials are held at once


def sequence_loss(
    logprobs_R: Tensor, entropy_R: Tensor, rows: ResponseRows, config: AlgorithmConfig
) -> SequenceLoss:
    """See `Form.sequence_loss`."""
    check_rows(rows, logprobs_R=logprobs_R, entropy_R=entropy_R)
    check_options(rows, config)
    sequence_R = rows.sequence_R.long()
    terms = _token_terms(logprobs_R, entropy_R, rows, sequence_R, config)
    weights_R, used_R = terms.weights_R, terms.is_used_R
    old_R = logprobs_R if rows.old_logprobs_R is None else rows.old_logprobs_R
    is_compared_R = old_R.isfinite() & rows.rollout_logprobs_R.isfinite()
    diff_R = torch.where(is_compared_R, old_R - rows.rollout_logprobs_R, 0.0).abs()
    is_spread_R = used_R & entropy_R.isfinite()
    sums = torch.stack(
        [
            (weights_R * terms.loss_R).sum(),
            torch.where(terms.is_clipped_R, weights_R, 0.0).sum(),
            (weights_R * terms.kl_R).sum(),
            (weights_R * _k3(terms.log_ratio_R)).sum(),
            torch.where(is_spread_R, weights_R * entropy_R, 0.0).sum(),
            torch.where(terms.is_truncated_R, weights_R, 0.0).sum(),
            (terms.is_weighted_R & ~used_R).sum(),
            is_compared_R.sum(),
            diff_R.sum(),
            diff_R.max() if len(diff_R) else diff_R.sum(),
        ]
    )
    return SequenceLoss(sums, terms.d_logprobs_R, terms.d_entropy_R)


def logprobs_(
    local_logits: Tensor, targets_R: Tensor, vocabulary: Vocabulary, needs_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """See `Form.logprobs_`."""
    contract.check_logits(local_logits, targets_R, vocabulary)
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
    needs_entropy = isinstance(upstream, TokenGrpo) or upstream.d_entropy_R is not None
    statistics_4R = _statistics_(local_logits, targets_R, vocabulary, needs_entropy)
    gathered = contract.gather_statistics(statistics_4R, vocabulary.tp_group)
    logprobs_R, entropy_R, log_denominator_R = contract.combine_statistics(gathered)
    if isinstance(upstream, TokenGrpo):
        part = slice(upstream.start, upstream.start + len(targets_R))
        sequence_R = upstream.sequence_R[part].long()
        rows = _vectors(upstream.rows, part)
        terms = _token_terms(logprobs_R, entropy_R, rows, sequence_R, upstream.config)
        upstream = Given(terms.d_logprobs_R, terms.d_entropy_R)
    is_live_R = logprobs_R.isfinite()
    if upstream.d_entropy_R is not None:
        is_live_R = is_live_R & entropy_R.isfinite()
    d_logprobs_R = torch.where(is_live_R, upstream.d_logprobs_R, 0.0)
    d_entropy_R = None
    if upstream.d_entropy_R is not None:
        d_entropy_R = torch.where(is_live_R, upstream.d_entropy_R, 0.0)
    temperature = vocabulary.rule.temperature
    for part in _blocks(local_logits):
        local_logits[part] = _softmax_gradient(
            local_logits[part].to(logprobs_R.dtype) / temperature,
            log_denominator_R[part],
            entropy_R[part],
            d_logprobs_R[part],
            None if d_entropy_R is None else d_entropy_R[part],
        ).div_(temperature)
    is_here_R, column_R = _target_columns(targets_R, vocabulary)
    index = (is_here_R & is_live_R).nonzero().flatten()
    # In one go, from the log-prob: g - g p would lose the small difference to the logits' dtype.
    at_target = -d_logprobs_R * logprobs_R.expm1()
    if d_entropy_R is not None:
        at_target = at_target - d_entropy_R * logprobs_R.exp() * (logprobs_R + entropy_R)
    at_target = (at_target / temperature).to(local_logits.dtype)
    local_logits[index, column_R[index]] = at_target[index]
    return logprobs_R, entropy_R if needs_entropy else None


def _softmax_gradient(
    scaled_RV: Tensor,
    log_denominator_R: Tensor,
    entropy_R: Tensor,
    d_logprobs_R: Tensor,
    d_entropy_R: Tensor | None,
) -> Tensor:
    """Gradient of scaled logits, but for the target's own: -p (g + h (log p + H)).

    Rows without any gradient are 0 whatever their logits hold.
    """
    is_dead_R = d_logprobs_R == 0
    if d_entropy_R is not None:
        is_dead_R = is_dead_R & (d_entropy_R == 0)
    all_logprobs_RV = scaled_RV.sub_(log_denominator_R.unsqueeze(1))
    if d_entropy_R is None:
        gradient_RV = all_logprobs_RV.exp_().mul_(-d_logprobs_R.unsqueeze(1))
    else:
        finite_RV = all_logprobs_RV.clamp(min=_NOTHING)  # p = 0 there, and 0 * -inf is NaN
        factor_RV = finite_RV.add_(entropy_R.unsqueeze(1)).mul_(d_entropy_R.unsqueeze(1))
        factor_RV.add_(d_logprobs_R.unsqueeze(1))
        gradient_RV = all_logprobs_RV.exp_().mul_(factor_RV).neg_()
    return gradient_RV.masked_fill_(is_dead_R.unsqueeze(1), 0.0)


def _statistics_(
    local_logits: Tensor, targets_R: Tensor, vocabulary: Vocabulary, needs_entropy: bool
) -> Tensor:
    """Ban columns in place; return `STATISTICS`, [4, R], the last of them 0 if not needed."""
    dtype = torch.float64 if local_logits.dtype == torch.float64 else torch.float32
    local_logits[:, vocabulary.num_tokens :] = -torch.inf
    banned = vocabulary.local_banned()
    if banned:
        local_logits[:, banned] = -torch.inf
    temperature = vocabulary.rule.temperature
    statistics_4R = local_logits.new_zeros(4, len(targets_R), dtype=dtype)
    for part in _blocks(local_logits):
        scaled_RV = local_logits[part].to(dtype) / temperature
        highest_R = scaled_RV.amax(1).clamp(min=_LOWEST)
        below_RV = scaled_RV.sub_(highest_R.unsqueeze(1))
        exp_RV = below_RV.exp()
        statistics_4R[0, part] = highest_R
        statistics_4R[1, part] = exp_RV.sum(1)
        if needs_entropy:
            statistics_4R[3, part] = exp_RV.mul_(below_RV.clamp_(min=_NOTHING)).sum(1)
    is_here_R, column_R = _target_columns(targets_R, vocabulary)
    target_R = local_logits.gather(1, column_R.unsqueeze(1)).squeeze(1).to(dtype) / temperature
    statistics_4R[2] = torch.where(is_here_R, target_R, -torch.inf)
    return statistics_4R


def _blocks(local_logits: Tensor) -> Iterator[slice]:
    num_rows, num_columns = local_logits.shape
    size = max(1, _BLOCK_LOGITS // max(num_columns, 1))
    return (slice(start, start + size) for start in range(0, num_rows, size))


def _target_columns(targets_R: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Return whether this rank has each target, and its local column (0 where it has not)."""
    column_R = targets_R - vocabulary.first
    is_here_R = (column_R >= 0) & (column_R < vocabulary.num_tokens)
    return is_here_R, torch.where(is_here_R, column_R, 0)


@dataclass(frozen=True, slots=True)
class _TokenTerms:
    """Each token's share; values of tokens that are not used are 0."""

    is_weighted_R: Tensor
    is_used_R: Tensor
    weights_R: Tensor
    log_ratio_R: Tensor
    loss_R: Tensor
    kl_R: Tensor
    is_clipped_R: Tensor
    is_truncated_R: Tensor
    d_logprobs_R: Tensor
    d_entropy_R: Tensor | None


def _token_terms(
    logprobs_R: Tensor,
    entropy_R: Tensor,
    rows: ResponseRows,
    sequence_R: Tensor,
    config: AlgorithmConfig,
) -> _TokenTerms:
    """The equation of algorithms.grpo_loss.grpo_loss and its derivative, written out."""
    sequences, dtype = rows.sequences, logprobs_R.dtype
    weights_R = sequences.weight_S[sequence_R]
    advantages_R = _advantages(sequences, config).to(dtype)[sequence_R]
    old_R = logprobs_R if rows.old_logprobs_R is None else rows.old_logprobs_R
    is_weighted_R = weights_R != 0
    is_finite_R = logprobs_R.isfinite() & advantages_R.isfinite() & old_R.isfinite()
    if rows.ref_logprobs_R is not None:
        is_finite_R = is_finite_R & rows.ref_logprobs_R.isfinite()
    if config.tis_cap:
        is_finite_R = is_finite_R & rows.rollout_logprobs_R.isfinite()
    if config.entropy_coefficient:
        is_finite_R = is_finite_R & entropy_R.isfinite()
    is_used_R = is_weighted_R & is_finite_R

    def used(values_R: Tensor) -> Tensor:
        return torch.where(is_used_R, values_R, 0.0)

    weights_R, advantages_R = used(weights_R), used(advantages_R)
    log_ratio_R = used(logprobs_R - old_R)
    tis_R = torch.ones_like(log_ratio_R)
    is_truncated_R = torch.zeros_like(is_used_R)
    if config.tis_cap:
        gap_R = used(old_R - rows.rollout_logprobs_R)
        tis_R = gap_R.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
        is_truncated_R = is_used_R & (tis_R > config.tis_cap)
        tis_R = tis_R.clamp(max=config.tis_cap)
    shared_R, slope_R = log_ratio_R, tis_R
    if config.ratio == "sequence":
        num_S = len(sequences.weight_S)
        count_R = _sequence_sum(is_used_R.to(dtype), sequence_R, num_S).clamp(min=1)
        shared_R = _sequence_sum(log_ratio_R, sequence_R, num_S) / count_R
        slope_R = _sequence_sum(used(tis_R), sequence_R, num_S) / count_R
    ratio_R = shared_R.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    gain_R = ratio_R * advantages_R
    bounded_R = ratio_R.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective_R = torch.minimum(gain_R, bounded_R * advantages_R)
    if config.dual_clip:
        least_R = torch.where(advantages_R < 0, config.dual_clip * advantages_R, -torch.inf)
        objective_R = torch.maximum(objective_R, least_R)
    is_clipped_R = objective_R != gain_R
    loss_R = -tis_R * objective_R
    is_moving_R = ~is_clipped_R & (shared_R.abs() <= _MAX_LOG_RATIO)
    d_logprobs_R = torch.where(is_moving_R, -slope_R * gain_R, 0.0)
    kl_R = torch.zeros_like(loss_R)
    if rows.ref_logprobs_R is not None:
        x_R = used(rows.ref_logprobs_R - logprobs_R)
        kl_R = _k3(x_R)
        loss_R = loss_R + config.kl_coefficient * kl_R
        d_kl_R = torch.where(x_R.abs() <= _MAX_LOG_RATIO, -x_R.expm1(), 0.0)
        d_logprobs_R = d_logprobs_R + config.kl_coefficient * d_kl_R
    d_entropy_R = None
    if config.entropy_coefficient:
        loss_R = loss_R - config.entropy_coefficient * used(entropy_R)
        d_entropy_R = -config.entropy_coefficient * weights_R.to(dtype)
    return _TokenTerms(
        is_weighted_R,
        is_used_R,
        weights_R,
        log_ratio_R,
        loss_R,
        kl_R,
        is_clipped_R,
        is_truncated_R,
        used(weights_R * d_logprobs_R),
        d_entropy_R,
    )


def _advantages(sequences: PackedSequences, config: AlgorithmConfig) -> Tensor:
    """Each sequence's advantage [S], as algorithms.advantages.group_advantages defines it."""
    rewards_N = sequences.rewards_N
    if not len(rewards_N):
        return rewards_N  # no rewards, no sequences
    index_N = torch.arange(len(rewards_N), device=rewards_N.device)
    start_S1, end_S1 = sequences.group_S2[:, :1], sequences.group_S2[:, 1:]
    in_group_SN = (index_N >= start_S1) & (index_N < end_S1) & ~rewards_N.isnan()
    count_S = in_group_SN.sum(1)
    rewards_SN = torch.where(in_group_SN, rewards_N, 0.0)
    mean_S = rewards_SN.sum(1) / count_S.clamp(min=1)
    centred_SN = torch.where(in_group_SN, rewards_N - mean_S.unsqueeze(1), 0.0)
    variance_S = centred_SN.square().sum(1) / (count_S - 1).clamp(min=1)
    highest_S = torch.where(in_group_SN, rewards_N, -torch.inf).amax(1)
    lowest_S = torch.where(in_group_SN, rewards_N, torch.inf).amin(1)
    own_S = rewards_N[sequences.reward_S.long()]
    advantages_S = own_S - mean_S
    if config.advantage_scale == "std":
        advantages_S = advantages_S / (variance_S.sqrt() + _ADVANTAGE_EPS)
    return torch.where((highest_S > lowest_S) & ~own_S.isnan(), advantages_S, 0.0)


def _sequence_sum(values_R: Tensor, sequence_R: Tensor, num_sequences: int) -> Tensor:
    """Each row's sum over its sequence."""
    total_S = values_R.new_zeros(num_sequences).index_add_(0, sequence_R, values_R)
    return total_S[sequence_R]


def _k3(x_R: Tensor) -> Tensor:
    """exp(x) - 1 - x, clamped and without cancellation; see algorithms.grpo_loss.k3."""
    x_R = x_R.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    series_R = torch.ones_like(x_R)
    for order in range(_TAYLOR_ORDER, 2, -1):
        series_R = 1 + x_R / order * series_R
    series_R = 0.5 * x_R.square() * series_R
    return torch.where(x_R.abs() < _TAYLOR_BELOW, series_R, x_R.expm1() - x_R)


def _vectors(rows: ResponseRows, part: slice) -> ResponseRows:
    """The vectors of some rows; their sequences stay whole."""
    old_R, ref_R = rows.old_logprobs_R, rows.ref_logprobs_R
    return replace(
        rows,
        target_ids_R=rows.target_ids_R[part],
        rollout_logprobs_R=rows.rollout_logprobs_R[part],
        old_logprobs_R=None if old_R is None else old_R[part],
        ref_logprobs_R=None if ref_R is None else ref_R[part],
    )

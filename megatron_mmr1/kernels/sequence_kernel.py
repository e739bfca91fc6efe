"""GRPO's loss of packed sequences in one launch: advantages, loss, d loss / d log-prob, metrics.

One program a sequence. Each recomputes its group's mean and std from the rewards of all groups, so
that no program waits for another and a group may span data-parallel ranks. The program that
finishes last adds up the partial sums in the order of the sequences: the same bits every time.

S sequences, R response tokens, N rewards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_mmr1.kernels.token_terms import (
    capped_tis,
    group_advantage,
    is_finite,
    k3,
    kl_term,
    policy_term,
    token_inputs,
)

NUM_SUMS = tl.constexpr(10)  # contract.SUMS; the last one is a maximum
SUM_COLUMNS = tl.constexpr(16)
SUM_ROWS = tl.constexpr(64)


# Vectors may be views of others: one compilation, wherever in memory they begin.
@triton.jit(
    do_not_specialize=["num_sequences"],
    do_not_specialize_on_alignment=["logprobs_R", "entropy_R", "old_R", "rollout_R", "ref_R"],
)
def sequence_kernel(
    logprobs_R,
    entropy_R,
    old_R,
    rollout_R,
    ref_R,
    offsets_S1,
    weight_S,
    reward_S,
    group_S2,
    rewards_N,
    d_logprobs_R,
    d_entropy_R,
    partials,
    sums,
    num_finished,
    num_sequences,
    clip_low,
    clip_high,
    dual_clip,
    tis_cap,
    kl_coefficient,
    entropy_coefficient,
    USES_STD: tl.constexpr,
    USES_SEQUENCE_RATIO: tl.constexpr,
    USES_TIS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """See triton_form.sequence_loss; `old_R`, `ref_R`, `d_entropy_R` may be None.

    `partials` is scratch [S, NUM_SUMS]; `num_finished` an int32 that is 0 before and after.
    """
    USES_ENTROPY: tl.constexpr = d_entropy_R is not None  # pyright: ignore
    s = tl.program_id(0)
    start = tl.load(offsets_S1 + s)
    end = tl.load(offsets_S1 + s + 1)
    weight = tl.load(weight_S + s)
    advantage = group_advantage(
        rewards_N,
        tl.load(reward_S + s),
        tl.load(group_S2 + 2 * s),
        tl.load(group_S2 + 2 * s + 1),
        USES_STD,
        BLOCK_G,
    )
    place = tl.arange(0, BLOCK)

    mean_log_ratio = 0.0
    mean_tis = 1.0
    if USES_SEQUENCE_RATIO:
        log_ratios = tl.zeros([BLOCK], tl.float32)
        weights_tis = tl.zeros([BLOCK], tl.float32)
        counts = tl.zeros([BLOCK], tl.float32)
        for first in range(start, end, BLOCK):
            index = first + place
            mask = index < end
            logprob = tl.load(logprobs_R + index, mask=mask, other=0.0)
            entropy = tl.load(entropy_R + index, mask=mask, other=0.0)
            old, rollout, _, is_used, _ = token_inputs(
                index, mask, logprob, entropy, weight, advantage,
                old_R, rollout_R, ref_R, USES_TIS, USES_ENTROPY,
            )  # fmt: skip
            tis, _ = capped_tis(old, rollout, tis_cap, is_used, USES_TIS)
            log_ratios += tl.where(is_used, logprob - old, 0.0)
            weights_tis += tl.where(is_used, tis, 0.0)
            counts += tl.where(is_used, 1.0, 0.0)
        count = tl.maximum(tl.sum(counts), 1.0)
        mean_log_ratio = tl.sum(log_ratios) / count
        mean_tis = tl.sum(weights_tis) / count

    loss_sum = tl.zeros([BLOCK], tl.float32)
    clip_sum = tl.zeros([BLOCK], tl.float32)
    kl_sum = tl.zeros([BLOCK], tl.float32)
    policy_kl_sum = tl.zeros([BLOCK], tl.float32)
    entropy_sum = tl.zeros([BLOCK], tl.float32)
    truncated_sum = tl.zeros([BLOCK], tl.float32)
    nonfinite_sum = tl.zeros([BLOCK], tl.float32)
    compared_sum = tl.zeros([BLOCK], tl.float32)
    diff_sum = tl.zeros([BLOCK], tl.float32)
    diff_max = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        index = first + place
        mask = index < end
        logprob = tl.load(logprobs_R + index, mask=mask, other=0.0)
        entropy = tl.load(entropy_R + index, mask=mask, other=0.0)
        old, rollout, ref, is_used, is_nonfinite = token_inputs(
            index, mask, logprob, entropy, weight, advantage,
            old_R, rollout_R, ref_R, USES_TIS, USES_ENTROPY,
        )  # fmt: skip
        tis, is_truncated = capped_tis(old, rollout, tis_cap, is_used, USES_TIS)
        log_ratio = tl.where(is_used, logprob - old, 0.0)
        shared = log_ratio
        slope = tis
        if USES_SEQUENCE_RATIO:
            shared = tl.broadcast_to(mean_log_ratio, [BLOCK])
            slope = tl.broadcast_to(mean_tis, [BLOCK])
        loss, slope, is_clipped = policy_term(
            shared, tis, slope, advantage, clip_low, clip_high, dual_clip
        )
        if ref_R is not None:
            kl, kl_slope = kl_term(logprob, ref, is_used)
            loss += kl_coefficient * kl
            slope += kl_coefficient * kl_slope
            kl_sum += tl.where(is_used, weight * kl, 0.0)
        if USES_ENTROPY:
            loss -= entropy_coefficient * entropy
            d_entropy = tl.where(is_used, -entropy_coefficient * weight, 0.0)
            tl.store(d_entropy_R + index, d_entropy, mask=mask)
        tl.store(d_logprobs_R + index, tl.where(is_used, weight * slope, 0.0), mask=mask)
        loss_sum += tl.where(is_used, weight * loss, 0.0)
        clip_sum += tl.where(is_used & is_clipped, weight, 0.0)
        policy_kl_sum += tl.where(is_used, weight * k3(log_ratio), 0.0)
        entropy_sum += tl.where(is_used & is_finite(entropy), weight * entropy, 0.0)
        truncated_sum += tl.where(is_truncated, weight, 0.0)
        nonfinite_sum += tl.where(is_nonfinite, 1.0, 0.0)
        is_compared = mask & is_finite(old) & is_finite(rollout)
        compared_sum += tl.where(is_compared, 1.0, 0.0)
        diff = tl.where(is_compared, tl.abs(old - rollout), 0.0)
        diff_sum += diff
        diff_max = tl.maximum(diff_max, diff)

    row = partials + s * NUM_SUMS
    tl.store(row, tl.sum(loss_sum))
    tl.store(row + 1, tl.sum(clip_sum))
    tl.store(row + 2, tl.sum(kl_sum))
    tl.store(row + 3, tl.sum(policy_kl_sum))
    tl.store(row + 4, tl.sum(entropy_sum))
    tl.store(row + 5, tl.sum(truncated_sum))
    tl.store(row + 6, tl.sum(nonfinite_sum))
    tl.store(row + 7, tl.sum(compared_sum))
    tl.store(row + 8, tl.sum(diff_sum))
    tl.store(row + 9, tl.max(diff_max))

    # All stores of this program come before its arrival, which releases them to the last program.
    tl.debug_barrier()
    if tl.atomic_add(num_finished, 1, sem="acq_rel", scope="gpu") == num_sequences - 1:
        tl.debug_barrier()
        column = tl.arange(0, SUM_COLUMNS)[None, :]
        total = tl.zeros([SUM_COLUMNS], tl.float32)
        highest = tl.zeros([SUM_COLUMNS], tl.float32)
        for first in range(0, num_sequences, SUM_ROWS):
            sequence = first + tl.arange(0, SUM_ROWS)[:, None]
            mask = (sequence < num_sequences) & (column < NUM_SUMS)
            # Past the L1 cache, which other programs' stores don't reach.
            part = tl.load(
                partials + sequence * NUM_SUMS + column, mask=mask, other=0.0, cache_modifier=".cg"
            )
            total += tl.sum(part, axis=0)
            highest = tl.maximum(highest, tl.max(part, axis=0))
        column = tl.arange(0, SUM_COLUMNS)
        result = tl.where(column == NUM_SUMS - 1, highest, total)
        tl.store(sums + column, result, mask=column < NUM_SUMS)
        tl.store(num_finished, 0)

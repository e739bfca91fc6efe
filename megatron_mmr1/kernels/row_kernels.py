"""Softmax over a cut vocabulary, a program a row of logits: statistics, and the gradient in place.

A tile is [BLOCK / 8, 8]: a thread holds runs of 8 neighbours, which it loads and stores in 128-bit
accesses and adds up by itself; threads meet once, after the loop. Exponentials are to base 2. Only
the last tile knows where the tokens end (`num_tokens`) and the storage (`num_columns`, a multiple
of 16: so that its accesses are as wide). The target's column gets its gradient in one scalar store
behind a barrier, in place of a comparison for every column.

R response tokens (rows), K tensor-parallel ranks; columns are this rank's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_mmr1.kernels.token_terms import (
    capped_tis,
    group_advantage,
    is_finite,
    kl_term,
    policy_term,
    token_inputs,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # below every logit, and finite also when scaled
NOTHING = tl.constexpr(-1e4)  # a logarithm whose exp is 0, and that times 0 is 0
WIDTH = tl.constexpr(8)


@triton.jit
def _columns(BLOCK: tl.constexpr):
    return tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _ban(row, banned, num_banned):
    """Make banned columns -inf, before any thread reads the row."""
    for i in range(num_banned):
        tl.store(row + tl.load(banned + i), -float("inf"))
    tl.debug_barrier()


@triton.jit
def _accumulate(x, highest, total, spread, scale, HAS_SPREAD: tl.constexpr):
    """Take a tile into each thread's running maximum and sums."""
    new = tl.maximum(highest, tl.max(x, axis=1))
    below = x * scale - (new * scale)[:, None]
    term = tl.exp2(below)
    shift = (highest - new) * scale
    factor = tl.exp2(shift)
    if HAS_SPREAD:
        spread = (spread + shift * total) * factor
        spread += tl.sum(term * tl.maximum(below, NOTHING), axis=1)
    total = total * factor + tl.sum(term, axis=1)
    return new, total, spread


@triton.jit
def _row_statistics(
    row, num_tokens, num_columns, scale, BLOCK: tl.constexpr, HAS_SPREAD: tl.constexpr
):
    """One row's largest logit, sum of 2^(scaled - largest), and the same times its logarithm.

    `scale` is log2(e) / temperature.
    """
    columns = _columns(BLOCK)
    highest = tl.full([BLOCK // WIDTH], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // WIDTH], tl.float32)
    spread = tl.zeros([BLOCK // WIDTH], tl.float32)
    whole = num_tokens // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = tl.load(row + start + columns).to(tl.float32)
        highest, total, spread = _accumulate(x, highest, total, spread, scale, HAS_SPREAD)
    if whole < num_tokens:
        here = whole + columns
        x = tl.load(row + here, mask=here < num_columns, other=-float("inf")).to(tl.float32)
        x = tl.where(here < num_tokens, x, -float("inf"))
        highest, total, spread = _accumulate(x, highest, total, spread, scale, HAS_SPREAD)
    top = tl.max(highest)
    shift = (highest - top) * scale
    factor = tl.exp2(shift)
    if HAS_SPREAD:
        spread = tl.sum((spread + tl.maximum(shift, NOTHING) * total) * factor) * LN_2
    else:
        spread = 0.0
    return top, tl.sum(total * factor), spread


@triton.jit
def _target_column(target, first, num_tokens):
    """The target's local column, and whether this rank has it."""
    column = target - first
    return column, (column >= 0) & (column < num_tokens)


@triton.jit(
    do_not_specialize=["num_rows", "num_banned"], do_not_specialize_on_alignment=["targets_R"]
)
def statistics_kernel(
    logits,
    targets_R,
    banned,
    statistics,
    num_rows,
    row_stride,
    num_tokens,
    num_columns,
    first,
    num_banned,
    scale,
    BLOCK: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
):
    """Write a rank's `contract.STATISTICS`, [4, R], in nats; banned columns become -inf.

    The last one is 0 without HAS_SPREAD.
    """
    r = tl.program_id(0)
    row = logits + r.to(tl.int64) * row_stride
    _ban(row, banned, num_banned)
    column, is_here = _target_column(tl.load(targets_R + r), first, num_tokens)
    target = tl.load(row + column, mask=is_here, other=-float("inf"))
    target = target.to(tl.float32) * (scale * LN_2)
    highest, total, spread = _row_statistics(row, num_tokens, num_columns, scale, BLOCK, HAS_SPREAD)
    tl.store(statistics + r, highest * (scale * LN_2))
    tl.store(statistics + num_rows + r, total)
    tl.store(statistics + 2 * num_rows + r, target)
    tl.store(statistics + 3 * num_rows + r, spread)


@triton.jit
def _combine(gathered, r, num_rows, NUM_RANKS: tl.constexpr):
    """Bring the ranks' statistics of one row together; the largest one is 0 away from itself."""
    highest = LOWEST
    for k in tl.static_range(NUM_RANKS):  # pyright: ignore
        highest = tl.maximum(highest, tl.load(gathered + (4 * k) * num_rows + r))
    total = 0.0
    target = -float("inf")
    spread = 0.0
    for k in tl.static_range(NUM_RANKS):  # pyright: ignore
        shift = tl.load(gathered + (4 * k) * num_rows + r) - highest
        factor = tl.exp(shift)
        part = tl.load(gathered + (4 * k + 1) * num_rows + r)
        total += factor * part
        target = tl.maximum(target, tl.load(gathered + (4 * k + 2) * num_rows + r))
        spread += factor * (tl.load(gathered + (4 * k + 3) * num_rows + r) + shift * part)
    return highest, total, target, spread


@triton.jit
def _grpo_upstream(
    r,
    logprob,
    entropy,
    row_index,
    sequence_R,
    weight_S,
    reward_S,
    group_S2,
    rewards_N,
    old_R,
    rollout_R,
    ref_R,
    clip_low,
    clip_high,
    dual_clip,
    tis_cap,
    kl_coefficient,
    entropy_coefficient,
    USES_STD: tl.constexpr,
    USES_TIS: tl.constexpr,
    USES_ENTROPY: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Gradients of GRPO's loss (ratio "token") by one row's log-prob and entropy."""
    s = tl.load(sequence_R + row_index)
    weight = tl.load(weight_S + s)
    advantage = group_advantage(
        rewards_N,
        tl.load(reward_S + s),
        tl.load(group_S2 + 2 * s),
        tl.load(group_S2 + 2 * s + 1),
        USES_STD,
        BLOCK_G,
    )
    old, rollout, ref, is_used, _ = token_inputs(
        row_index, r >= 0, logprob, entropy, weight, advantage,
        old_R, rollout_R, ref_R, USES_TIS, USES_ENTROPY,
    )  # fmt: skip
    tis, _ = capped_tis(old, rollout, tis_cap, is_used, USES_TIS)
    log_ratio = tl.where(is_used, logprob - old, 0.0)
    _, slope, _ = policy_term(log_ratio, tis, tis, advantage, clip_low, clip_high, dual_clip)
    if ref_R is not None:
        _, kl_slope = kl_term(logprob, ref, is_used)
        slope += kl_coefficient * kl_slope
    d_logprob = tl.where(is_used, weight * slope, 0.0)
    d_entropy = tl.where(is_used, -entropy_coefficient * weight, 0.0)
    return d_logprob, d_entropy


@triton.jit
def _gradient(x, scale, log2_denominator, a, b, HAS_ENTROPY: tl.constexpr):
    """p * (a + b * log2 p): what a tile's logits become, but for the target's."""
    log2_p = x * scale - log2_denominator
    p = tl.exp2(log2_p)
    if HAS_ENTROPY:
        return p * (a + b * tl.maximum(log2_p, NOTHING))
    return p * a


@triton.jit(
    do_not_specialize=["num_rows", "num_banned", "first_row"],
    do_not_specialize_on_alignment=[
        *("targets_R", "given_logprobs_R", "given_entropy_R", "sequence_R"),
        *("old_R", "rollout_R", "ref_R"),
    ],
)
def gradient_kernel(
    logits,
    targets_R,
    banned,
    gathered,
    logprobs_R,
    entropy_R,
    given_logprobs_R,
    given_entropy_R,
    sequence_R,
    weight_S,
    reward_S,
    group_S2,
    rewards_N,
    old_R,
    rollout_R,
    ref_R,
    num_rows,
    row_stride,
    num_tokens,
    num_columns,
    first,
    num_banned,
    first_row,
    scale,
    clip_low,
    clip_high,
    dual_clip,
    tis_cap,
    kl_coefficient,
    entropy_coefficient,
    NUM_RANKS: tl.constexpr,
    IS_GRPO: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    USES_STD: tl.constexpr,
    USES_TIS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Turn a row of logits into the gradient of the loss; write its log-prob and entropy.

    `entropy_R` may be None: then the entropy is not computed, and HAS_ENTROPY (it has a gradient)
    is False.

    With `gathered` None the row's statistics are made here: a single launch where the vocabulary is
    whole. The loss's gradient by log-prob and entropy is given, or is GRPO's (`IS_GRPO`). The
    vectors of GRPO's rows are whole; this chunk begins at `first_row` of them.
    """
    r = tl.program_id(0)
    row = logits + r.to(tl.int64) * row_stride
    column, is_here = _target_column(tl.load(targets_R + r), first, num_tokens)  # pyright: ignore
    if gathered is None:
        _ban(row, banned, num_banned)
        # Read by all threads, so before the barrier of the first reduction: they write later.
        target = tl.load(row + column, mask=is_here, other=-float("inf"))
        target = target.to(tl.float32) * (scale * LN_2)
        top, total, spread = _row_statistics(
            row, num_tokens, num_columns, scale, BLOCK, entropy_R is not None
        )
        highest = top * (scale * LN_2)
    else:
        highest, total, target, spread = _combine(gathered, r, num_rows, NUM_RANKS)  # pyright: ignore
    log_total = tl.log(total)
    logprob = target - (log_total + highest)
    entropy = log_total - spread / total
    tl.store(logprobs_R + r, logprob)
    if entropy_R is not None:
        tl.store(entropy_R + r, entropy)

    d_entropy = 0.0
    if IS_GRPO:
        d_logprob, d_entropy = _grpo_upstream(
            r, logprob, entropy, first_row + r, sequence_R, weight_S, reward_S, group_S2, rewards_N,
            old_R, rollout_R, ref_R, clip_low, clip_high, dual_clip, tis_cap, kl_coefficient,
            entropy_coefficient, USES_STD, USES_TIS, HAS_ENTROPY, BLOCK_G,
        )  # fmt: skip
    else:
        d_logprob = tl.load(given_logprobs_R + r)
        if HAS_ENTROPY:
            d_entropy = tl.load(given_entropy_R + r)
    is_live = is_finite(logprob) & ((d_logprob != 0.0) | (d_entropy != 0.0))
    if HAS_ENTROPY:
        is_live = is_live & is_finite(entropy)

    columns = _columns(BLOCK)
    whole = num_tokens // BLOCK * BLOCK
    if is_live:
        unit = scale * LN_2  # one over the temperature
        log2_denominator = (log_total + highest) * LOG2_E
        a = -(d_logprob + d_entropy * entropy) * unit
        b = -d_entropy * LN_2 * unit
        for start in range(0, whole, BLOCK):
            x = tl.load(row + start + columns).to(tl.float32)
            y = _gradient(x, scale, log2_denominator, a, b, HAS_ENTROPY)
            tl.store(row + start + columns, y.to(logits.dtype.element_ty))
        for start in range(whole, num_columns, BLOCK):
            here = start + columns
            x = tl.load(row + here, mask=here < num_columns, other=0.0).to(tl.float32)
            y = _gradient(x, scale, log2_denominator, a, b, HAS_ENTROPY)
            y = tl.where(here < num_tokens, y, 0.0)
            tl.store(row + here, y.to(logits.dtype.element_ty), mask=here < num_columns)
        # In one go, from the log-prob: g - g p would lose the small difference to the dtype.
        p = tl.exp(logprob)
        y = d_logprob * (1.0 - p) - d_entropy * p * (logprob + entropy)
        tl.debug_barrier()
        tl.store(row + column, (y * unit).to(logits.dtype.element_ty), mask=is_here)
    else:
        zeros = tl.zeros([BLOCK // WIDTH, WIDTH], tl.float32).to(logits.dtype.element_ty)
        for start in range(0, num_columns, BLOCK):
            here = start + columns
            tl.store(row + here, zeros, mask=here < num_columns)

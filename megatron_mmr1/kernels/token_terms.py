"""Device functions that the kernels share: a group's advantage, and one token's loss and gradient.

Elementwise over whatever shape a kernel holds tokens in: a block of a sequence, or one row. The
equations are those of algorithms/; closed_form.py has the same in torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_LOG_RATIO = tl.constexpr(20.0)
TAYLOR_BELOW = tl.constexpr(0.5)
ADVANTAGE_EPS = tl.constexpr(1e-6)


@triton.jit
def is_finite(x):
    """Neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def bounded_exp(x):
    """exp of x clamped to +-20."""
    return tl.exp(tl.minimum(tl.maximum(x, -MAX_LOG_RATIO), MAX_LOG_RATIO))


@triton.jit
def k3(x):
    """exp(x) - 1 - x, clamped; by its series near 0, where the difference cancels."""
    x = tl.minimum(tl.maximum(x, -MAX_LOG_RATIO), MAX_LOG_RATIO)
    series = 1.0 + x * (1.0 / 9.0)
    series = 1.0 + x * (1.0 / 8.0) * series
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    return tl.where(tl.abs(x) < TAYLOR_BELOW, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def group_advantage(
    rewards_N,
    own_index,
    group_start,
    group_end,
    USES_STD: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The advantage of one reward in its group; every program recomputes its group's statistics.

    Two passes over the group: no cancellation in the variance. Equal rewards give exactly 0.
    """
    own = tl.load(rewards_N + own_index)
    place = tl.arange(0, BLOCK_G)
    total = 0.0
    count = 0.0
    highest = -float("inf")
    lowest = float("inf")
    for start in range(group_start, group_end, BLOCK_G):
        here = start + place
        reward = tl.load(rewards_N + here, mask=here < group_end, other=float("nan"))
        is_judged = reward == reward
        total += tl.sum(tl.where(is_judged, reward, 0.0))
        count += tl.sum(tl.where(is_judged, 1.0, 0.0))
        highest = tl.maximum(highest, tl.max(tl.where(is_judged, reward, -float("inf"))))
        lowest = tl.minimum(lowest, tl.min(tl.where(is_judged, reward, float("inf"))))
    mean = total / tl.maximum(count, 1.0)
    advantage = own - mean
    if USES_STD:
        squares = 0.0
        for start in range(group_start, group_end, BLOCK_G):
            here = start + place
            reward = tl.load(rewards_N + here, mask=here < group_end, other=float("nan"))
            centred = tl.where(reward == reward, reward - mean, 0.0)
            squares += tl.sum(centred * centred)
        advantage = advantage / (tl.sqrt(squares / tl.maximum(count - 1.0, 1.0)) + ADVANTAGE_EPS)
    return tl.where((highest > lowest) & (own == own), advantage, 0.0)


@triton.jit
def token_inputs(
    index,
    mask,
    logprob,
    entropy,
    weight,
    advantage,
    old_R,
    rollout_R,
    ref_R,
    USES_TIS: tl.constexpr,
    USES_ENTROPY: tl.constexpr,
):
    """Load a token's constants and say whether it counts.

    Returns: old, rollout, ref (each the log-prob itself where there is none); whether the token is
    used; and whether it would be, were its inputs finite.
    """
    old = logprob
    if old_R is not None:
        old = tl.load(old_R + index, mask=mask, other=0.0)
    rollout = tl.load(rollout_R + index, mask=mask, other=0.0)
    ref = logprob
    if ref_R is not None:
        ref = tl.load(ref_R + index, mask=mask, other=0.0)
    # One number for all tokens so far; as blocks, since the interpreter spreads no scalar booleans.
    advantage = tl.where(mask, advantage, 0.0)
    weight = tl.where(mask, weight, 0.0)
    finite = is_finite(logprob) & is_finite(old) & is_finite(ref) & is_finite(advantage)
    if USES_TIS:
        finite = finite & is_finite(rollout)
    if USES_ENTROPY:
        finite = finite & is_finite(entropy)
    is_weighted = weight != 0.0
    return old, rollout, ref, finite & is_weighted, is_weighted & (finite == 0)


@triton.jit
def capped_tis(old, rollout, tis_cap, is_used, USES_TIS: tl.constexpr):
    """The trainer/rollout ratio below its cap, and whether it was above; 1 without a cap."""
    tis = tl.where(is_used, 1.0, 1.0)
    is_truncated = is_used & False
    if USES_TIS:
        tis = bounded_exp(tl.where(is_used, old - rollout, 0.0))
        is_truncated = is_used & (tis > tis_cap)
        tis = tl.minimum(tis, tis_cap)
    return tis, is_truncated


@triton.jit
def policy_term(shared, tis, slope, advantage, clip_low, clip_high, dual_clip):
    """The clipped objective's share of a token's loss, d loss / d log-prob, and whether it clips.

    `shared` is the log-ratio: a token's own, or its sequence's mean; `slope` what d shared / d
    log-prob makes of the weights `tis` of all tokens that share it. `dual_clip` is inf when off.
    """
    ratio = bounded_exp(shared)
    gain = ratio * advantage
    bounded = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    objective = tl.minimum(gain, bounded * advantage)
    least = tl.where(advantage < 0.0, dual_clip * advantage, -float("inf"))
    objective = tl.maximum(objective, least)
    is_clipped = objective != gain
    is_moving = (objective == gain) & (tl.abs(shared) <= MAX_LOG_RATIO)
    return -tis * objective, tl.where(is_moving, -slope * gain, 0.0), is_clipped


@triton.jit
def kl_term(logprob, ref, is_used):
    """k3 towards the reference, and d k3 / d log-prob."""
    x = tl.where(is_used, ref - logprob, 0.0)
    slope = tl.where(tl.abs(x) <= MAX_LOG_RATIO, 1.0 - tl.exp(x), 0.0)
    return k3(x), slope

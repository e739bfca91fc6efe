"""Group-relative advantages of GRPO (arXiv:2402.03300, section 4.1.2; used by arXiv:2509.21268).

Legend: P prompts, G responses a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards_PG: Tensor, scale: str = "std", eps: float = 1e-6) -> Tensor:
    """Centre each group's rewards and, with scale "std", divide by their standard deviation.

    Equation: A = (r - mean) / (std + eps), mean and std over the judged rewards of the group; std
    divides by the number of judged rewards less one (ddof = 1, torch.std's default, as in verl and
    EasyR1 and hence in the released MMR1 code). With scale "none" A = r - mean, as Dr.GRPO has it
    (arXiv:2503.20783).

    A NaN reward (the verifier could not judge) leaves the statistics and has advantage 0. A group
    whose judged rewards are all equal has advantage exactly 0, by max == min: in float32 the mean
    of equal numbers may miss them by an ulp, which the division by a tiny std turns into an
    advantage of up to 0.95. A group with fewer than two judged rewards has advantage 0.

    Args:
        rewards_PG: float32 or float64; NaN = could not judge.
        scale: "std" or "none".

    Returns:
        [P, G] of the same dtype, finite for finite rewards, without gradient.

    Raises:
        ValueError: unknown scale.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"algorithm.advantage_scale={scale!r} is unknown; use std or none")
    rewards_PG = rewards_PG.detach()
    is_judged_PG = ~rewards_PG.isnan()
    num_judged_P1 = is_judged_PG.sum(dim=1, keepdim=True)
    total_P1 = torch.where(is_judged_PG, rewards_PG, 0.0).sum(dim=1, keepdim=True)
    mean_P1 = total_P1 / num_judged_P1.clamp(min=1)
    centred_PG = torch.where(is_judged_PG, rewards_PG - mean_P1, 0.0)  # two passes: no cancellation
    variance_P1 = centred_PG.square().sum(dim=1, keepdim=True) / (num_judged_P1 - 1).clamp(min=1)
    divisor_P1 = variance_P1.sqrt() + eps if scale == "std" else torch.ones_like(variance_P1)
    highest_P1 = torch.where(is_judged_PG, rewards_PG, -torch.inf).amax(dim=1, keepdim=True)
    lowest_P1 = torch.where(is_judged_PG, rewards_PG, torch.inf).amin(dim=1, keepdim=True)
    is_mixed_P1 = highest_P1 > lowest_P1  # False with fewer than two judged rewards
    return torch.where(is_mixed_P1, centred_PG / divisor_P1, 0.0)

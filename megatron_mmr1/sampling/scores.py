"""What a prompt is worth to the next step: scores of pass rates and diversities.

Pure functions of arrays; higher = drawn more often. Pass rates are known (the paper's scoring
rollouts) or Beta posteriors (posterior.py).

Source: arXiv:2509.21268, section 3 and Alg. 1, for OVS and VPS. With two rewards, GRPO divides a
group's gradient by its standard deviation, so that the variance's size cancels and what counts is
whether the group is mixed at all: 1 - p^G - (1 - p)^G. That is not in the paper.
"""

from __future__ import annotations

import numpy as np


def outcome_variance_score(pass_rate: np.ndarray) -> np.ndarray:
    """Return OVS = p(1 - p), the paper's scale: at most 0.25, at p = 1/2."""
    return pass_rate * (1.0 - pass_rate)


def expected_variance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return E[p(1 - p)] under Beta(a, b)."""
    return a * b / ((a + b) * (a + b + 1.0))


def mixed_probability(pass_rate: np.ndarray, group_size: int) -> np.ndarray:
    """Return the probability that G responses are neither all correct nor all wrong."""
    return 1.0 - pass_rate**group_size - (1.0 - pass_rate) ** group_size


def expected_mixed_probability(a: np.ndarray, b: np.ndarray, group_size: int) -> np.ndarray:
    """Return 1 - E[p^G] - E[(1 - p)^G] under Beta(a, b).

    E[p^G] = prod over i < G of (a + i) / (a + b + i), the moments of a Beta.
    """
    all_correct, all_wrong = np.ones(np.shape(a)), np.ones(np.shape(a))
    for i in range(group_size):
        all_correct *= (a + i) / (a + b + i)
        all_wrong *= (b + i) / (a + b + i)
    return np.maximum(1.0 - all_correct - all_wrong, 0.0)  # rounding may leave less than nothing


def variance_promotion_score(
    variance: np.ndarray, diversity: np.ndarray, alpha: float, beta: float
) -> np.ndarray:
    """Return VPS = alpha * OVS + beta * TDS (arXiv:2509.21268, Alg. 1)."""
    return alpha * variance + beta * diversity


def effective_share(weights: np.ndarray) -> float:
    """Return Kish's effective sample size (sum w)^2 / sum w^2 over the number of weights.

    1 = all alike. All zeros count as alike, since drawing is uniform then.
    """
    squares = float(np.dot(weights, weights))
    return float(weights.sum()) ** 2 / squares / len(weights) if squares > 0 else 1.0

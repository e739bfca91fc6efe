"""Calibrated VPS: how much each sign of a mixed group counts, fitted to the groups that came.

The paper weighs OVS and TDS by hand (0.8 and 0.2). Here a logistic regression on "was the next
group mixed?" finds the weights of what is known of a prompt, while the run goes on, and forgets
slowly, since the policy moves. Owns the fit and the record of how good its predictions were.

K groups, F features.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FEATURES = ("bias", "ovs", "tds", "staleness", "stratum")
# Before any group: believe the posterior, and nothing else.
_START = np.array([0.0, 1.0, 0.0, 0.0, 0.0])
_CERTAINTY = np.array([4.0, 8.0, 4.0, 8.0, 8.0])  # of the start, in units of information
_FORGET = 0.99  # a step
_MAX_LOG_ODDS = 8.0
NUM_BINS = 10


def log_odds(probability: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)), within +-8."""
    with np.errstate(divide="ignore"):
        odds = np.log(probability) - np.log1p(-probability)
    return odds.clip(-_MAX_LOG_ODDS, _MAX_LOG_ODDS)


def features(
    mixed: np.ndarray, diversity: np.ndarray, age: np.ndarray, stratum_mixed: np.ndarray
) -> np.ndarray:
    """Return float64 [K, F], in the order of FEATURES.

    Args:
        mixed: probability of a mixed group under the prompt's posterior. Its log-odds stand for the
            OVS: with weight 1 and nothing else the prediction is the posterior's own.
        diversity: the last TDS, in [0, 1]; what is usual where there is none.
        age: policy versions since the last group; 0 where there is none.
        stratum_mixed: probability of a mixed group under the prior of the prompt's stratum.
    """
    return np.stack(
        [
            np.ones_like(mixed),
            log_odds(mixed),
            diversity - 0.5,
            np.log1p(age) / 4.0,  # about 1 after 50 versions
            log_odds(stratum_mixed),
        ],
        axis=-1,
    )


class MixedGroupModel:
    """Bayesian logistic regression, one Newton step a batch.

    Attributes:
        weights_F: float64, in the order of FEATURES.
    """

    def __init__(self) -> None:
        self.weights_F = _START.copy()
        self.information_FF = np.diag(_CERTAINTY)

    def predict(self, features_KF: np.ndarray) -> np.ndarray:
        """Return the probability that the next group is mixed, float64 [K]."""
        odds_K = (features_KF @ self.weights_F).clip(-_MAX_LOG_ODDS, _MAX_LOG_ODDS)
        return 1.0 / (1.0 + np.exp(-odds_K))

    def learn(self, features_KF: np.ndarray, is_mixed_K: np.ndarray) -> None:
        """Move towards what came; the start keeps its pull, and old groups fade."""
        predicted_K = self.predict(features_KF)
        start_FF = np.diag(_CERTAINTY)
        old_FF = _FORGET * (self.information_FF - start_FF)
        slope_K = predicted_K * (1.0 - predicted_K)
        new_FF = features_KF.T @ (slope_K[:, None] * features_KF)
        self.information_FF = start_FF + old_FF + new_FF
        pull_F = features_KF.T @ (is_mixed_K - predicted_K) - (1.0 - _FORGET) * (
            start_FF @ (self.weights_F - _START)
        )
        self.weights_F = self.weights_F + np.linalg.solve(self.information_FF, pull_F)

    def state_dict(self) -> dict[str, Any]:
        """Return weights and information."""
        return {"weights": self.weights_F, "information": self.information_FF}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.weights_F = state["weights"].copy()
        self.information_FF = state["information"].copy()


class Reliability:
    """How often groups were mixed, beside how often that was predicted, in bins of the prediction.

    Attributes:
        sums_3B: number of groups, sum of predictions and of mixed groups in each of NUM_BINS bins.
    """

    def __init__(self) -> None:
        self.sums_3B = np.zeros((3, NUM_BINS))
        self.last: dict[str, float] = {}

    def record(self, predicted_K: np.ndarray, is_mixed_K: np.ndarray) -> None:
        """Add a step's groups."""
        self.last = {}
        if not len(predicted_K):
            return
        bins = np.minimum((predicted_K * NUM_BINS).astype(int), NUM_BINS - 1)
        for row, values in enumerate((np.ones(len(bins)), predicted_K, is_mixed_K)):
            self.sums_3B[row] += np.bincount(bins, values, NUM_BINS)
        self.last = {
            "sampler/mixed_predicted": float(predicted_K.mean()),
            "sampler/mixed_seen": float(is_mixed_K.mean()),
            "sampler/brier": float(np.square(predicted_K - is_mixed_K).mean()),
        }

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
_MAX_NEWTON_STEPS, _TOLERANCE = 30, 1e-8
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
    """Bayesian logistic regression by Laplace's approximation, a batch at a time.

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
        """Move to the likeliest weights given a batch, the start, and the groups before.

        Those fade, by a factor a batch, and the start gains what they lose. The loss is convex, and
        a Newton step that doesn't lower it is halved: where predictions are almost sure and wrong
        their curvature says nothing of how far to go, and a whole step would overshoot.
        """
        start_FF, old_F = np.diag(_CERTAINTY), self.weights_F
        before_FF = start_FF + _FORGET * (self.information_FF - start_FF)
        pull_F = (1.0 - _FORGET) * (start_FF @ (old_F - _START))

        def loss(weights_F: np.ndarray) -> float:
            odds_K, moved_F = features_KF @ weights_F, weights_F - old_F
            surprise = np.logaddexp(0.0, odds_K).sum() - is_mixed_K @ odds_K
            return float(surprise + pull_F @ moved_F + 0.5 * moved_F @ before_FF @ moved_F)

        weights_F, worth = old_F, loss(old_F)
        for _ in range(_MAX_NEWTON_STEPS):
            slope_F, batch_FF = self._derivatives(weights_F, features_KF, is_mixed_K)
            slope_F = slope_F + pull_F + before_FF @ (weights_F - old_F)
            step_F = np.linalg.solve(before_FF + batch_FF, slope_F)
            while (found := loss(weights_F - step_F)) > worth and np.abs(step_F).max() > _TOLERANCE:
                step_F = step_F / 2.0
            if found > worth:
                break
            weights_F, worth = weights_F - step_F, found
            if np.abs(step_F).max() <= _TOLERANCE:
                break
        self.weights_F = weights_F
        self.information_FF = before_FF + self._derivatives(weights_F, features_KF, is_mixed_K)[1]

    @staticmethod
    def _derivatives(
        weights_F: np.ndarray, features_KF: np.ndarray, is_mixed_K: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return gradient and curvature of a batch's surprise."""
        predicted_K = 1.0 / (1.0 + np.exp(-(features_KF @ weights_F).clip(-500.0, 500.0)))
        curvature_K = predicted_K * (1.0 - predicted_K)
        return (
            features_KF.T @ (predicted_K - is_mixed_K),
            features_KF.T @ (curvature_K[:, None] * features_KF),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return weights and information."""
        return {"weights": self.weights_F.copy(), "information": self.information_FF.copy()}

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

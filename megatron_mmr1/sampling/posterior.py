"""Each prompt's pass rate as a discounted Beta posterior, from training rollouts alone.

Owns the evidence and the priors. What a posterior is worth is scores.py's business, who is drawn
vas.py's.

Model: prompt i of stratum c passes with probability p_i ~ Beta(a_c, b_c), and each judged response
is correct with probability p_i. The policy moves, so evidence fades: after k policy versions a
group is worth discount^k of its responses. Until the prompt comes back, that widens its posterior
and leaves the mean where it was: a prompt once found impossible grows less certain to be, but not
more likely to be like others. The prior of a stratum is fitted to its own prompts (empirical
Bayes): a prompt that was not visited yet is ranked by what its like turned out to be, also in how
often they are solved always or never. Strata shrink to the whole data set, and that to the flat
Beta(1, 1).

P prompts, C strata.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# What Beta(1, 1) says: mean 1/2, second moment 1/3.
_FLAT = (0.5, 1.0 / 3.0)
_FLAT_GROUPS = 2.0  # groups that the flat prior weighs in the data set's
_PARENT_GROUPS = 4.0  # groups that the data set's prior weighs in a stratum's
# Of prompts alike in all but luck, and of prompts that are solved always or never.
_MIN_CORRELATION, _MAX_CORRELATION = 0.02, 0.9


class PassRates:
    """Posteriors of P prompts' pass rates.

    Args:
        stratum_P: which stratum each prompt belongs to, 0..C-1.
        discount: what a response still counts one policy version later, in (0, 1].
        prior_discount: the same for a group's share of its stratum's prior.

    Memory: 12 bytes a prompt, and 4 for its stratum.
    """

    def __init__(self, stratum_P: np.ndarray, discount: float, prior_discount: float):
        num_prompts, num_strata = len(stratum_P), int(stratum_P.max(initial=-1)) + 1
        self.stratum_P = stratum_P.astype(np.int32)
        self.discount, self.prior_discount = discount, prior_discount
        self.correct_P = np.zeros(num_prompts, np.float32)
        self.wrong_P = np.zeros(num_prompts, np.float32)
        self.version_P = np.full(num_prompts, -1, np.int32)  # of the last group; -1 = not visited
        # Fading sums over the groups of a stratum: weight, pass rate, its square (unbiased).
        self.moments_3C = np.zeros((3, num_strata))
        self.moments_version = 0

    def observe(
        self, index: np.ndarray, num_correct: np.ndarray, num_judged: np.ndarray, version: int
    ) -> None:
        """Take in groups sampled by policy `version`; int64 [K] each, and num_judged > 0.

        A prompt may occur several times.
        """
        self._learn_priors(index, num_correct, num_judged, version)
        where, place = np.unique(index, return_inverse=True)
        kept = self._retained(where, version)
        correct = np.bincount(place, num_correct, len(where))
        wrong = np.bincount(place, num_judged - num_correct, len(where))
        self.correct_P[where] = kept * self.correct_P[where] + correct
        self.wrong_P[where] = kept * self.wrong_P[where] + wrong
        self.version_P[where] = version

    def beta(
        self, version: int, index: np.ndarray | slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the posterior's parameters at a policy version, float64 each, of some prompts.

        Evidence of c correct and w wrong, prior (a, b): the mean is (a + c) / (a + b + c + w), and
        the strength a + b + discount^k (c + w), k versions after the prompt's last group.
        """
        prior_a_C, prior_b_C = self.priors()
        stratum, kept = self.stratum_P[index], self._retained(index, version)
        a = prior_a_C[stratum] + self.correct_P[index]
        b = prior_b_C[stratum] + self.wrong_P[index]
        evidence = self.correct_P[index] + self.wrong_P[index]
        left = 1.0 - (1.0 - kept) * evidence / (a + b)  # of the strength
        return a * left, b * left

    def priors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each stratum's Beta(a, b), float64 [C] each, by its first two moments."""
        total_3 = self.moments_3C.sum(axis=1)
        top = (total_3[1:] + _FLAT_GROUPS * np.array(_FLAT)) / (total_3[0] + _FLAT_GROUPS)
        mean_C, square_C = (self.moments_3C[1:] + _PARENT_GROUPS * top[:, None]) / (
            self.moments_3C[0] + _PARENT_GROUPS
        )
        mean_C = mean_C.clip(0.01, 0.99)
        # Two responses to one prompt are correlated by 1 / (a + b + 1).
        correlation_C = (square_C - mean_C**2) / (mean_C * (1.0 - mean_C))
        strength_C = 1.0 / correlation_C.clip(_MIN_CORRELATION, _MAX_CORRELATION) - 1.0
        return strength_C * mean_C, strength_C * (1.0 - mean_C)

    def _learn_priors(
        self, index: np.ndarray, num_correct: np.ndarray, num_judged: np.ndarray, version: int
    ) -> None:
        """Add groups to their strata's moments.

        The sampler goes back to prompts for what they were, so that only first visits show what a
        stratum is like. A group counts for as much as its prompt was still unknown.
        """
        is_pair = num_judged > 1  # one response says nothing of a second moment
        index, num_judged = index[is_pair], num_judged[is_pair].astype(np.float64)
        num_correct = num_correct[is_pair].astype(np.float64)
        prior_a_C, prior_b_C = self.priors()
        stratum = self.stratum_P[index]
        known = self._retained(index, version) * (self.correct_P[index] + self.wrong_P[index])
        strength = (prior_a_C + prior_b_C)[stratum]
        weight = strength / (strength + known)
        rate = num_correct / num_judged
        square = num_correct * (num_correct - 1.0) / (num_judged * (num_judged - 1.0))
        self.moments_3C *= self.prior_discount ** max(version - self.moments_version, 0)
        self.moments_version = max(version, self.moments_version)
        for row, values in enumerate((weight, weight * rate, weight * square)):
            self.moments_3C[row] += np.bincount(stratum, values, self.moments_3C.shape[1])

    def _retained(self, index: np.ndarray | slice, version: int) -> np.ndarray:
        """What a prompt's evidence still counts, float64; of one not visited there is none."""
        return self.discount ** np.maximum(version - self.version_P[index], 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the evidence, under "prompts", and the priors' moments."""
        return {
            "prompts": {
                "correct": self.correct_P.copy(),
                "wrong": self.wrong_P.copy(),
                "version": self.version_P.copy(),
            },
            "moments": self.moments_3C.copy(),
            "moments_version": self.moments_version,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, of the same prompts and strata."""
        prompts = state["prompts"]
        self.correct_P = prompts["correct"].copy()
        self.wrong_P = prompts["wrong"].copy()
        self.version_P = prompts["version"].copy()
        self.moments_3C = state["moments"].copy()
        self.moments_version = state["moments_version"]

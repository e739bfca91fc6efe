"""Variance-Aware Sampling (arXiv:2509.21268, Alg. 1), with scores from training rollouts.

Owns the mixture of the two halves of a batch. The scores are scores.py's, the uniform half
uniform.py's.

Departure from the paper: it draws the scored half with replacement; here no prompt occurs twice in
a batch. A group is named by its prompt_id and its requests are seeded by it, so that a prompt drawn
twice would be one group holding every response twice. Within a batch the draw is therefore
sequential: each next prompt in proportion to VPS among those not yet taken, and only the first is
exactly in proportion to VPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megatron_mmr1.config.schema import SamplerConfig
from megatron_mmr1.sampling.uniform import UniformSampler


def num_scored_draws(mixture_ratio: float, batch_size: int) -> int:
    """Return floor(lambda * B), exact in the decimal as written: 0.29 * 100 is 29, not 28."""
    return int(Fraction(str(mixture_ratio)) * batch_size)


def draw_by_weight(rng: np.random.Generator, weights: np.ndarray, num: int) -> list[int]:
    """Draw `num` different indices one by one, each in proportion to the weights still left.

    The smallest of E_i / w_i with E_i ~ Exp(1) is i with probability w_i / sum(w), and the order of
    the rest is that of drawing on without replacement (Efraimidis and Spirakis, 2006).

    Args:
        weights: float64 [P], not negative.

    Returns:
        Indices in drawing order; fewer than `num` when fewer weights are positive.
    """
    arrival = np.full(len(weights), np.inf)
    np.divide(rng.standard_exponential(len(weights)), weights, out=arrival, where=weights > 0)
    order = np.argsort(arrival, kind="stable")[:num]
    return order[np.isfinite(arrival[order])].tolist()


class VasSampler(UniformSampler):
    """floor(lambda * B) prompts in proportion to VPS, the rest from the reshuffled passes.

    When fewer prompts than that have a positive score, the uniform half fills the batch; with all
    scores zero the whole batch is uniform. Before the first update all scores are 1. With lambda =
    0 the draws are those of UniformSampler with the same seed.

    Raises:
        ValueError: two prompts share an id, or there are fewer prompts than a batch takes.
    """

    def __init__(
        self,
        prompt_ids: Sequence[str],
        categories: Sequence[str],
        batch_size: int,
        config: SamplerConfig,
        seed: int,
    ):
        super().__init__(prompt_ids, categories, batch_size, config, seed)
        self.num_scored = num_scored_draws(config.mixture_ratio, batch_size)

    def next_batch(self) -> list[int]:
        """Draw the scored half, then the uniform half among the other prompts, and shuffle the two.

        Shuffled, since several optimizer steps may cut a batch in its order.
        """
        scored = []
        if self.num_scored > 0:
            scored = draw_by_weight(self.rng, self.scores.vps, self.num_scored)
        batch = scored + self._draw_from_pass(self.batch_size - len(scored), taken=scored)
        if 0 < len(scored) < len(batch):
            batch = self.rng.permutation(batch).tolist()
        self.scores.draws[batch] += 1
        return batch

"""Synthetic prompts with known pass rates.

Owns where pass rates start and what a sampler may know beforehand. How they move is policy.py's.

P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_PROMPTS = 2000
_LOWEST = 1e-4  # pass rates of the plain Beta pool are clipped: 5% of Beta(.25, .25) is below
# Shares of trivial, impossible and frontier prompts.
_SHARES = {"balanced": (0.30, 0.30, 0.40), "skewed": (0.45, 0.40, 0.15)}
_NUM_RECORDS, _NUM_LEVELS = 12, 5
# Correlations of what the strata are made from with the (rank of the) pass rate.
RECORD_CORRELATION, LEVEL_CORRELATION = 0.5, 0.9


@dataclass(frozen=True, slots=True)
class Pool:
    """What is true of P prompts before training.

    Attributes:
        name: as in POOLS.
        logit_P: float64, of the pass rate.
        is_frontier_P: bool; the plain Beta pool has no such part: pass rates from 0.1 to 0.9.
        records: a stratum a prompt, weakly related to the pass rate, as source, image count and
            length are.
        levels: a stratum a prompt, closely related to it, as a level of difficulty is.
        diversity_P: float64, how diverse answers are beside what the pass rate makes of it.
        is_choice_P: bool, whether the question is a multiple choice.
    """

    name: str
    logit_P: np.ndarray
    is_frontier_P: np.ndarray
    records: list[str]
    levels: list[str]
    diversity_P: np.ndarray
    is_choice_P: np.ndarray


def make_pool(name: str, seed: int, num_prompts: int = NUM_PROMPTS) -> Pool:
    """Make a pool.

    Pass rates: "beta" has Beta(.25, .25). "balanced" and "skewed" have shares of trivial prompts
    (logit uniform in [4, 8]: 98.2% and more), impossible ones (the same below 0) and the frontier,
    Beta(2, 2). "skewed_blind" is "skewed" with records that say nothing.

    Strata: a normal number that is correlated with the prompt's rank, cut into equally large parts:
    12 records (correlation 0.5; 0 if blind) and 5 levels (0.9). So each stratum has a distribution
    of its own, and all together exactly the pool's.

    Raises:
        ValueError: an unknown name.
    """
    if name not in POOLS:
        raise ValueError(f"pool={name!r} is not known; use one of {', '.join(POOLS)}")
    rng = np.random.default_rng([seed, 1])
    shape = name.removesuffix("_blind")
    if shape == "beta":
        pass_rate_P = rng.beta(0.25, 0.25, num_prompts).clip(_LOWEST, 1 - _LOWEST)
        logit_P = np.log(pass_rate_P) - np.log1p(-pass_rate_P)
        is_frontier_P = (pass_rate_P >= 0.1) & (pass_rate_P <= 0.9)
    else:
        num_trivial, num_impossible = (round(s * num_prompts) for s in _SHARES[shape][:2])
        num_frontier = num_prompts - num_trivial - num_impossible
        pass_rate = rng.beta(2.0, 2.0, num_frontier)
        logit_P = np.concatenate(
            [
                rng.uniform(4.0, 8.0, num_trivial),
                rng.uniform(-8.0, -4.0, num_impossible),
                np.log(pass_rate) - np.log1p(-pass_rate),
            ]
        )
        is_frontier_P = np.arange(num_prompts) >= num_prompts - num_frontier
    correlation = 0.0 if name.endswith("_blind") else RECORD_CORRELATION
    return Pool(
        name,
        logit_P,
        is_frontier_P,
        _strata(logit_P, correlation, _NUM_RECORDS, rng),
        _strata(logit_P, LEVEL_CORRELATION, _NUM_LEVELS, rng),
        rng.normal(0.0, 0.1, num_prompts),
        rng.random(num_prompts) < 0.4,
    )


POOLS = ("skewed", "balanced", "beta", "skewed_blind")


def _strata(
    logit_P: np.ndarray, correlation: float, num_strata: int, rng: np.random.Generator
) -> list[str]:
    num_prompts = len(logit_P)
    normal_P = np.sort(rng.normal(size=num_prompts))[np.argsort(np.argsort(logit_P))]
    noise_P = rng.normal(size=num_prompts)
    sign_P = correlation * normal_P + np.sqrt(1.0 - correlation**2) * noise_P
    rank_P = np.argsort(np.argsort(sign_P))
    return [f"s{stratum}" for stratum in rank_P * num_strata // num_prompts]

"""Samplers, statistics and simulated steps that the sampler's tests share. P prompts."""

import io
from typing import Any

import numpy as np
import torch

from megatron_mmr1.config.schema import SamplerConfig
from megatron_mmr1.sampling import EngineShare, GroupStats, PromptPool
from megatron_mmr1.sampling.vas import VasSampler

PAPER = {"estimator": "refresh", "scoring_rollouts": 8}
RELEASED = {
    **{"estimator": "released_code", "scoring_rollouts": 8, "alpha": 1.0, "beta": 0.0},
    **{"floor": 0.0, "with_replacement": True},
}
KINDS = {
    "mixed": {},
    "thompson": {"thompson": True, "score": "vps"},
    "calibrated": {"score": "calibrated"},
    "refresh": PAPER,
    "released_code": RELEASED | {"beta": 0.5},
    "replacement": {"with_replacement": True, "mixture_ratio": 0.2, "final_mixture_ratio": 0.9},
}


def make(num_prompts=10, batch_size=4, seed=0, num_steps=1, ids=None, strata=None, **config):
    ids = ids or [f"p{i}" for i in range(num_prompts)]
    strata = strata or [f"c{int(name[1:]) % 2}" for name in ids]
    pool = PromptPool(ids, strata, strata)
    return VasSampler(pool, batch_size, SamplerConfig(**config), seed, 8, num_steps)


def groups(*rows):
    """Statistics of groups: (prompt, correct, judged = 8, diversity = 0, wrong choices = 0)."""
    return GroupStats.of_rows(np.array([[*row, *(0, 0, 8, 0.0, 0)[len(row) :]] for row in rows]))


def scored(weights, **config):
    """A sampler whose prompt i has the score weights[i] <= 1: TDS alone, of scoring rollouts."""
    settings: dict[str, Any] = PAPER | {"floor": 0.0, "alpha": 0.0, "beta": 1.0} | config
    sampler = make(len(weights), **settings)
    sampler.observe_scoring(1, groups(*((i, 0, 8, w) for i, w in enumerate(weights))))
    return sampler


def simulated(draws, step):
    """What the groups of some draws taught: the same wherever they are simulated."""
    rows = []
    for row, occurrence in draws:
        rng = np.random.default_rng([step, row, occurrence])
        rows.append((row, rng.binomial(8, (row % 10) / 9), 8, rng.random(), rng.integers(3)))
    return groups(*rows)


def live(sampler, steps, place=(0, 1), gather=lambda mine, num: mine.to_rows()):
    """Take steps as one engine of several; every third is refilled. Return what it drew."""
    drawn, size = [], sampler.batch_size
    shares = iter(EngineShare(sampler, *place))
    for step in steps:
        if due := sampler.prompts_to_score(step):
            mine = [(row, 0) for row in due[place[0] :: place[1]]]
            rows = gather(simulated(mine, step), len(due))
            sampler.observe_scoring(step, GroupStats.of_rows(rows))
        found = []
        for _ in range(1 + (step % 3 == 0)):
            share = next(shares)
            found.append(gather(simulated(share, step), size))
            drawn.append(found[-1][:, 0].astype(int).tolist())
        sampler.observe(step, GroupStats.of_rows(np.concatenate(found)))
        drawn.append(sampler.metrics())
    return drawn


def saved(sampler):
    """A sampler's state, written to a checkpoint and read again."""
    from megatron_mmr1.backend.checkpoint import _with_arrays, _with_tensors

    file = io.BytesIO()
    torch.save(_with_tensors(sampler.state_dict()), file)
    file.seek(0)
    return _with_arrays(torch.load(file, weights_only=True))

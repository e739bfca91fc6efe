"""Who is drawn next, and why: Variance-Aware Sampling (arXiv:2509.21268), from lambda = 0 on.

A sampler never calls an engine and never sees a tensor: it hands out indices into the data set and
is told what the rollouts of a step taught about their prompts.

- vas.py: the sampler: the mixture of a batch, when scores are renewed, state
- estimators.py: what is known of prompts: from training rollouts (posterior.py, calibration.py) or
  from the paper's scoring rollouts; released_code.py: as MMR1's released code has it
- scores.py, diversity.py: what a prompt is worth
- weight_tree.py, passes.py: what is drawn from
- statistics.py: from scored groups to numbers

Presets are files in hydra_conf/sampler/.
"""

from __future__ import annotations

from megatron_mmr1.sampling.base import Draw, EngineShare, Sampler
from megatron_mmr1.sampling.diversity import tds
from megatron_mmr1.sampling.statistics import GroupStats, Statistician
from megatron_mmr1.sampling.vas import PromptPool, VasSampler

__all__ = [
    "Draw",
    "EngineShare",
    "GroupStats",
    "PromptPool",
    "Sampler",
    "Statistician",
    "VasSampler",
    "tds",
]

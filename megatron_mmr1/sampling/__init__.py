"""Who is drawn next, and why: uniform passes or Variance-Aware Sampling (arXiv:2509.21268).

A sampler never calls an engine and never sees a tensor: it hands out indices into the data set and
is told what the rollouts of a step taught about their prompts. To add one: a class with the
contract of `base.Sampler`, and its name in `SAMPLERS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mmr1.config.schema import SamplerConfig
from megatron_mmr1.sampling.base import EngineShare, Sampler
from megatron_mmr1.sampling.diversity import tds
from megatron_mmr1.sampling.uniform import UniformSampler
from megatron_mmr1.sampling.vas import VasSampler

__all__ = ["SAMPLERS", "EngineShare", "Sampler", "build_sampler", "tds"]

SAMPLERS = {"vas": VasSampler, "uniform": UniformSampler}


def build_sampler(
    prompt_ids: Sequence[str],
    categories: Sequence[str],
    batch_size: int,
    config: SamplerConfig,
    seed: int,
) -> Sampler:
    """Make the sampler that `config.kind` names; `batch_size` is `prompts_per_step` of all ranks.

    Raises:
        ValueError: `config.kind` is not in SAMPLERS, or the data set does not fit (see
            UniformSampler).
    """
    if config.kind not in SAMPLERS:
        raise ValueError(f"sampler.kind={config.kind!r} is unknown; use one of {list(SAMPLERS)}")
    return SAMPLERS[config.kind](prompt_ids, categories, batch_size, config, seed)

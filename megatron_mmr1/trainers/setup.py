"""Builds the parts of a GRPO run from its configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_mmr1.backend import batching, parallel
from megatron_mmr1.backend.checkpoint import Checkpoints
from megatron_mmr1.backend.plan import Packing
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import GrpoConfig
from megatron_mmr1.data.dataset import Keys, PromptDataset
from megatron_mmr1.data.loader import PromptView, build_loader
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.observability.rollouts import read_rollouts
from megatron_mmr1.observability.timers import PhaseTimers
from megatron_mmr1.rewards import VerifierPool
from megatron_mmr1.rollout.engine import RolloutEngine
from megatron_mmr1.rollout.replay import ReplayEngine
from megatron_mmr1.sampling import EngineShare, PromptPool, Sampler, Statistician, VasSampler
from megatron_mmr1.trainers.exchange import EnginePlace
from megatron_mmr1.trainers.reporting import progress_of, report_bad_rows
from megatron_mmr1.trainers.turns import Turns
from megatron_mmr1.weight_sync import WeightSync


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that a GRPO run is made of, on this rank.

    Attributes:
        place: the engine that this rank belongs to.
        prompts: this engine's share of each draw, without pixels until they are used.
        heldout: this engine's share of the held-out prompts.
        builder: makes this rank's share of an optimizer step.
        rule: the softmax that engine and trainer share.
    """

    policy: MegatronPolicy
    engine: RolloutEngine
    sync: WeightSync
    turns: Turns
    sampler: Sampler
    train_set: PromptDataset
    place: EnginePlace
    prompts: Iterator[PromptView]
    heldout: PromptView
    verifier: VerifierPool
    statistician: Statistician
    checkpoints: Checkpoints
    builder: batching.StepBuilder
    rule: SoftmaxRule
    timers: PhaseTimers


@contextmanager
def build_parts(
    config: GrpoConfig, run_dir: Path, engine: RolloutEngine | None = None
) -> Iterator[Parts]:
    """Build the parts, data first (its errors are the cheapest to meet),
    and close the verifier at the end.
    """
    data = config.data
    processor = PromptProcessor(config.model.path, data.min_pixels, data.max_pixels)
    train_set, heldout_set = (
        PromptDataset(
            source,
            processor,
            data.max_prompt_tokens,
            config.rollout.max_images_per_prompt,
            Keys(data.problem_key, data.answer_key, data.images_key),
            data.system_prompt,
            data.cache_bytes,
            progress_of(f"checking {source}"),
        )
        for source in (data.train, data.heldout)
    )
    report_bad_rows(run_dir, [train_set, heldout_set], data.max_bad_share)
    place = EnginePlace.of(config.rollout.tp_size if config.replay is None else 1)
    sampler = VasSampler(
        prompt_pool(train_set, config.sampler.prior),
        config.prompts_per_step,
        config.sampler,
        config.seed,
        config.rollout.group_size,
        config.num_steps,
    )
    policy = MegatronPolicy(
        config.model,
        config.parallel,
        config.optimizer,
        num_steps=config.num_steps * config.algorithm.optimizer_steps_per_batch,
        keep_reference=config.algorithm.kl_coefficient > 0,
        steps_per_batch=config.algorithm.optimizer_steps_per_batch,
        precision=config.precision,
    )
    if parallel.is_main():
        print(policy.adam)
    if config.rollout.takes_turns:
        policy.step_aside()  # before the engine looks how much room there is
    engine = engine or build_engine(config, processor)
    timers = PhaseTimers()
    with (
        VerifierPool(config.reward, config.rollout.max_response_tokens) as verifier,
        Statistician(config.sampler.diversity, config.rollout.max_response_tokens) as statistician,
    ):
        yield Parts(
            policy=policy,
            engine=engine,
            sync=WeightSync(policy, engine),
            turns=Turns(policy, engine, config.rollout.takes_turns, timers),
            sampler=sampler,
            train_set=train_set,
            place=place,
            prompts=iter(
                build_loader(train_set, EngineShare(sampler, place.index, place.num_engines))
            ),
            heldout=PromptView.of(
                heldout_set, range(place.index, len(heldout_set), place.num_engines)
            ),
            verifier=verifier,
            statistician=statistician,
            checkpoints=Checkpoints(run_dir, config.checkpoint.keep_last),
            builder=batching.StepBuilder(
                Packing.at(config.parallel, config.max_tokens_per_microbatch, config.precision),
                policy.cost,
                batching.ImageTokens.of(processor),
                config.algorithm.aggregation,
                config.rollout.max_response_tokens,
            ),
            rule=SoftmaxRule(config.rollout.temperature, processor.banned_token_ids),
            timers=timers,
        )


def prompt_pool(dataset: PromptDataset, prior: str) -> PromptPool:
    """Say which prompts are alike before anything is known of them."""
    if prior == "category":
        strata = dataset.categories
        if not any(strata):
            raise ValueError(
                "sampler.prior='category' needs categories, and no row of data.train has one; use "
                "record, or global"
            )
    elif prior == "global":
        strata = [""] * len(dataset)
    else:  # record: where it comes from, how many images it has, and its length within a fifth
        strata = [
            f"{source}/{len(size.patches)}/{round(4 * math.log2(size.num_prompt_tokens))}"
            for source, size in zip(dataset.sources, dataset.sizes, strict=True)
        ]
    return PromptPool(dataset.prompt_ids, dataset.categories, strata)


def build_engine(config: GrpoConfig, processor: PromptProcessor) -> RolloutEngine:
    """Start the engine of a run: vLLM, or recorded rollouts."""
    if config.replay is not None:
        return ReplayEngine(partial(read_rollouts, config.replay))
    from megatron_mmr1.rollout.vllm_engine import VllmEngine

    return VllmEngine(
        config.model.path,
        config.precision.dtype,
        config.rollout,
        processor.banned_token_ids,
        config.data.max_prompt_tokens,
        config.rollout.tp_size,
        config.rollout.takes_turns,
        config.precision.kv_cache,
    )

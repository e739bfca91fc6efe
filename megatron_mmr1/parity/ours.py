"""What the policy computes of the same samples, at whatever layout the process groups have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_mmr1.backend import batching, losses, parallel
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.parity.outcome import Outcome
from megatron_mmr1.parity.reference import ALGORITHM, TEMPERATURE
from megatron_mmr1.types import StepBatch


def build_policy(model: ModelConfig, layout: ParallelConfig) -> MegatronPolicy:
    """Build a policy that takes steps without moving, so that one serves many batches."""
    frozen = OptimizerConfig(lr=0.0, weight_decay=0.0, max_grad_norm=1e9)
    return MegatronPolicy(model, layout, frozen, num_steps=1)


def build_step(
    policy: MegatronPolicy,
    samples: Sequence[batching.Sample],
    packing: batching.Packing,
    processor: PromptProcessor,
    aggregation: str = "token_mean",
) -> StepBatch:
    """Plan a step over all data-parallel ranks and build this rank's share."""
    sizes = [batching.SampleSize.of(sample) for sample in samples]
    plan = batching.plan_step(sizes, packing, policy.cost, parallel.dp_size())
    images = batching.ImageTokens(
        processor.image_token_id, processor.spatial_merge_size, parallel.is_first_stage()
    )
    return batching.build_step(
        plan, parallel.dp_rank(), sizes, samples.__getitem__, packing, aggregation, images
    )


def our_outcome(
    policy: MegatronPolicy,
    samples: Sequence[batching.Sample],
    packing: batching.Packing,
    processor: PromptProcessor,
    constants: tuple[list[Tensor], list[Tensor]],
    change: Callable[[StepBatch], StepBatch] = lambda step: step,
) -> Outcome:
    """Compute log-probs, loss and gradients; the same result on every rank.

    Args:
        constants: old and reference log-probs of each sample.
        change: makes a negative control of the step.
    """
    rule = losses.SoftmaxRule(TEMPERATURE, processor.banned_token_ids)
    step = change(build_step(policy, samples, packing, processor))
    old, ref = ([_of_rows(values, b.rows.sample_R) for b in step.micro_batches]
                for values in constants)  # fmt: skip
    found = policy.logprobs(step, rule)
    metrics = policy.train_step(
        batching.with_logprobs(step, old, ref), losses.grpo(ALGORITHM, rule)
    )
    gradients = {name: tensor.clone() for name, tensor in policy.named_gradients()}
    mine = {
        int(index): values_R[batch.rows.sample_R == index].cpu()
        for batch, values_R in zip(step.micro_batches, found, strict=True)
        for index in batch.rows.sample_R.unique()
    }
    # Every rank of a replica has the replica's samples; other replicas have the others.
    everyone = dict(parallel.gather_over_world(list(mine.items())))
    return Outcome(
        [everyone[index] for index in range(len(samples))],
        torch.tensor(metrics["loss"], dtype=torch.float32),
        gradients,
        *constants,
    )


def _of_rows(values: Sequence[Tensor], sample_R: Tensor) -> Tensor:
    """Put per-sample log-probs where the samples' rows are (each sample's rows are consecutive)."""
    order = sample_R.unique_consecutive().tolist()
    return torch.cat([values[i] for i in order] or [torch.zeros(0)]).to(sample_R.device)

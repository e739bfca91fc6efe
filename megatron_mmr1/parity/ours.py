"""What the policy computes of the same samples, at whatever layout the process groups have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_mmr1.backend import batching, losses, parallel
from megatron_mmr1.backend.plan import Packing
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
)
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.parity.outcome import Outcome
from megatron_mmr1.parity.reference import ALGORITHM, TEMPERATURE
from megatron_mmr1.types import PackedBatch, StepBatch


def build_policy(
    model: ModelConfig, layout: ParallelConfig, precision: PrecisionConfig | None = None
) -> MegatronPolicy:
    """Build a policy that takes steps without moving, so that one serves many batches."""
    frozen = OptimizerConfig(lr=0.0, weight_decay=0.0, max_grad_norm=1e9)
    return MegatronPolicy(
        model, layout, frozen, num_steps=1, precision=precision or PrecisionConfig()
    )


def build_step(
    policy: MegatronPolicy,
    samples: Sequence[batching.Sample],
    packing: Packing,
    processor: PromptProcessor,
    aggregation: str = "token_mean",
) -> StepBatch:
    """Build this rank's share of a step of these samples."""
    images = batching.ImageTokens.of(processor)
    builder = batching.StepBuilder(packing, policy.cost, images, aggregation)
    sizes = [batching.size_of(sample) for sample in samples]
    return builder.build(sizes, samples.__getitem__)[0]


def our_outcome(
    policy: MegatronPolicy,
    samples: Sequence[batching.Sample],
    packing: Packing,
    processor: PromptProcessor,
    constants: tuple[list[Tensor], list[Tensor]],
    change: Callable[[StepBatch], StepBatch] = lambda step: step,
) -> Outcome:
    """Compute log-probs, loss and gradients; the same result on every rank.

    Args:
        constants: old and reference log-probs of each sample.
        change: makes a negative control of the step.
    """
    rule = SoftmaxRule(TEMPERATURE, processor.banned_token_ids)
    step = change(build_step(policy, samples, packing, processor))
    found = policy.logprobs(step, rule)
    old, ref = ([of_rows(values, batch) for batch in step.micro_batches] for values in constants)
    metrics = policy.train_step(
        batching.with_logprobs(step, old, ref), losses.grpo(ALGORITHM), rule
    )
    gradients = {name: tensor.clone() for name, tensor in policy.named_gradients()}
    # Every rank of a replica has the replica's samples; other replicas have the others.
    everyone = dict(parallel.gather_over_world(list(of_samples(step, found).items())))
    return Outcome(
        [everyone[index] for index in range(len(samples))],
        torch.tensor(metrics["loss"], dtype=torch.float32),
        gradients,
        *constants,
    )


def of_samples(step: StepBatch, values: Sequence[Tensor]) -> dict[int, Tensor]:
    """Cut values of the micro-batches' rows [R] into one tensor for each sample of the share."""
    return {
        int(index): values_R[batch.rows.sample_R == index].cpu()
        for batch, values_R in zip(step.micro_batches, values, strict=True)
        for index in batch.rows.sample_R.unique()
    }


def of_rows(values: Sequence[Tensor], batch: PackedBatch) -> Tensor:
    """Put each sample's values where its rows are (a sample's rows are consecutive)."""
    order = batch.rows.sample_R.unique_consecutive().tolist()
    joined = torch.cat([values[index] for index in order] or [torch.zeros(0)])
    return joined.to(batch.rows.sample_R.device)

"""Set-up that the policy's, the engine's and the runs' tests share. Nothing stands in for a part.

N sequences, S sequence length, R response tokens, V vocabulary.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_mmr1.backend import batching
from megatron_mmr1.backend.plan import Packing
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
)
from megatron_mmr1.convert import AttentionShape
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.data.tiny_model import TEXT_SIZES
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.parity.ours import build_step, of_rows, of_samples
from megatron_mmr1.types import (
    Prompt,
    Rollout,
    RolloutGroup,
    ScoredGroup,
    ScoredRollout,
    StepBatch,
    Verdict,
)

TINY_SHAPE = AttentionShape(
    TEXT_SIZES["num_attention_heads"],
    TEXT_SIZES["num_key_value_heads"],
    TEXT_SIZES["hidden_size"] // TEXT_SIZES["num_attention_heads"],
)
NO_CLIPPING = 1e9


def png(width: int, height: int, seed: int = 0, level: int | None = None) -> bytes:
    """An image of noise, or of one grey `level`."""
    shape = (height, width, 3)
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    pixels = noise if level is None else np.full(shape, level, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mixed_prompts(processor: PromptProcessor) -> list[Prompt]:
    """Images of several sizes, two images in one prompt, and no image at all."""
    return [
        processor.prompt("square", "<image>Read the digits.", [png(56, 56, 1)]),
        processor.prompt("wide", "<image>Sum of squares?", [png(140, 28, 2)]),
        processor.prompt("text", "Largest digit?"),
        processor.prompt(
            "two", "<image>Read<image> the digits.", [png(84, 56, 3), png(28, 112, 4)]
        ),
    ]


def scored_groups(
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    group_size: int = 2,
    seed: int = 0,
    lengths: tuple[int, int] = (1, 12),
) -> list[ScoredGroup]:
    """Groups of random responses of unequal lengths with random rewards."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(
        [i for i in range(len(processor.tokenizer)) if i not in processor.banned_token_ids]
    )
    groups = []
    for prompt in prompts:
        rollouts, scores = [], []
        for index in range(group_size):
            length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
            picks = torch.randint(len(allowed), (length,), generator=generator)
            logprobs = -4.0 + torch.rand(length, generator=generator)
            tokens = tuple(allowed[picks].tolist())
            rollouts.append(Rollout(index, tokens, tuple(logprobs.tolist()), "stop", ""))
            reward = float(torch.randint(3, (), generator=generator)) + 0.1 * index
            scores.append(ScoredRollout(Verdict("wrong", "made up"), True, reward))
        groups.append(ScoredGroup(RolloutGroup(prompt, tuple(rollouts), 0), tuple(scores)))
    return groups


def make_policy(
    folder: Path,
    *,
    lr: float = 1e-3,
    dtype: str = "float32",
    freeze_vision: bool = False,
    keep_reference: bool = False,
    steps_per_batch: int = 1,
    layout: ParallelConfig | None = None,
    precision: PrecisionConfig | None = None,
    cpu_offload: float = 0.0,
) -> MegatronPolicy:
    """A fresh policy whose gradients are not clipped, so that they can be compared."""
    return MegatronPolicy(
        ModelConfig(path=str(folder), freeze_vision=freeze_vision),
        layout or ParallelConfig(),
        OptimizerConfig(
            lr=lr, schedule="linear", max_grad_norm=NO_CLIPPING, cpu_offload=cpu_offload
        ),
        num_steps=10,
        keep_reference=keep_reference,
        steps_per_batch=steps_per_batch,
        precision=precision or PrecisionConfig(dtype),
    )


def make_step(
    policy: MegatronPolicy,
    processor: PromptProcessor,
    samples: Sequence[batching.Sample],
    max_tokens: int = 128,
    aggregation: str = "token_mean",
) -> StepBatch:
    """One optimizer step of the samples, packed into several micro-batches."""
    return build_step(policy, samples, Packing(max_tokens), processor, aggregation)


def sample_logprobs(policy: MegatronPolicy, step: StepBatch, rule: SoftmaxRule) -> list[Tensor]:
    """Log-probs [R] of each sample, in the order of the samples."""
    by_sample = of_samples(step, policy.logprobs(step, rule))
    return [by_sample[index] for index in sorted(by_sample)]


def with_constants(
    step: StepBatch, old: Sequence[Tensor], ref: Sequence[Tensor] | None = None
) -> StepBatch:
    """Put per-sample [R] log-probs, in the order of the samples, where the responses stand."""
    old_R, ref_R = (
        None if values is None else [of_rows(values, batch) for batch in step.micro_batches]
        for values in (old, ref)
    )
    return batching.with_logprobs(step, old_R, ref_R)


def gradients(policy: MegatronPolicy) -> dict[str, Tensor]:
    """The last train step's gradients under their Hugging Face names."""
    return {name: tensor.clone() for name, tensor in policy.named_gradients()}


def weights(policy: MegatronPolicy) -> dict[str, Tensor]:
    """A copy of the weights under their Hugging Face names."""
    return {name: tensor.clone() for name, tensor in policy.named_tensors()}


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm, in float64."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def samples_of(groups: Sequence[RolloutGroup]) -> list[batching.Sample]:
    """What the engine sampled, as the trainer takes it; the reward is any."""
    return [
        batching.Sample(
            group.prompt,
            torch.tensor(rollout.token_ids),
            torch.tensor(rollout.rollout_logprobs),
        )
        for group in groups
        for rollout in group.rollouts
    ]

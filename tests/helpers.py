"""Set-up that the policy's, the engine's and the runs' tests share. Nothing stands in for a part.

N sequences, S sequence length, R response tokens, V vocabulary.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_mmr1.backend import batching, losses
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_mmr1.convert import FAMILIES, AttentionShape, megatron_to_hf
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.data.tiny_model import TEXT_SIZES
from megatron_mmr1.types import (
    MicroBatch,
    Prompt,
    Rollout,
    RolloutGroup,
    ScoredGroup,
    ScoredRollout,
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
) -> MegatronPolicy:
    """A fresh policy whose gradients are not clipped, so that they can be compared."""
    return MegatronPolicy(
        ModelConfig(path=str(folder), dtype=dtype, freeze_vision=freeze_vision),
        ParallelConfig(),
        OptimizerConfig(lr=lr, schedule="linear", max_grad_norm=NO_CLIPPING),
        num_steps=10,
        keep_reference=keep_reference,
    )


def make_batches(
    processor: PromptProcessor,
    samples: Sequence[batching.Sample],
    micro_batch_size: int = 4,
    aggregation: str = "token_mean",
) -> list[MicroBatch]:
    images = batching.ImageTokens(processor.image_token_id, processor.spatial_merge_size)
    return batching.micro_batches(samples, micro_batch_size, aggregation, images)


def with_constants(
    batches: Sequence[MicroBatch],
    old_logprobs: Sequence[Tensor] | None = None,
    ref_logprobs: Sequence[Tensor] | None = None,
) -> list[MicroBatch]:
    """Put per-sample [R] log-probs, in the order of the samples, where the responses stand."""

    def padded(values: Iterator[Tensor], batch: MicroBatch) -> Tensor:
        rows = torch.cat([next(values) for _ in range(len(batch.token_ids_NS))])
        return torch.zeros(batch.token_ids_NS.shape).masked_scatter(batch.response_mask_NS, rows)

    old = iter(old_logprobs) if old_logprobs is not None else None
    ref = iter(ref_logprobs) if ref_logprobs is not None else None
    return [
        replace(
            batch,
            old_logprobs_NS=padded(old, batch) if old else None,
            ref_logprobs_NS=padded(ref, batch) if ref else None,
        )
        for batch in batches
    ]


def response_rows(batches: Sequence[MicroBatch], values: Sequence[Tensor]) -> list[Tensor]:
    """Cut [N, S] values a micro-batch into one [R] tensor a sample."""
    return [
        row[mask]
        for batch, value in zip(batches, values, strict=True)
        for row, mask in zip(value, batch.response_mask_NS, strict=True)
    ]


def gradients(policy: MegatronPolicy) -> dict[str, Tensor]:
    """The last train step's gradients (Megatron's buffer) under their Hugging Face names."""
    named = ((name, p.main_grad.clone()) for name, p in policy.module.named_parameters())
    return dict(megatron_to_hf(FAMILIES["qwen2_5_vl"], named, TINY_SHAPE))


def weights(policy: MegatronPolicy) -> dict[str, Tensor]:
    """A copy of the weights under their Hugging Face names."""
    return {name: tensor.clone() for name, tensor in policy.named_tensors()}


def load_hf(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )


def file_name_of(hf_parameter: str) -> str:
    """A parameter of the Hugging Face module under its name in the safetensors file."""
    return hf_parameter.replace("model.language_model.", "model.").replace(
        "model.visual.", "visual."
    )


def hf_logprobs(model: Any, sample: batching.Sample, rule: losses.SoftmaxRule) -> Tensor:
    """Log-probs [R] of one unpadded sequence by Hugging Face, positions included."""
    prompt = sample.prompt
    token_ids = torch.cat([prompt.token_ids, sample.response_token_ids])[None]
    is_image = (token_ids == model.config.image_token_id).int()
    pixels = prompt.pixel_values
    logits_SV = model(
        input_ids=token_ids,
        attention_mask=torch.ones_like(token_ids),
        pixel_values=None if pixels is None else pixels.to(model.dtype),
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=is_image,
    ).logits[0]
    start = len(prompt.token_ids)
    logits_RV = logits_SV[start - 1 : -1].float() / rule.temperature
    is_banned_V = torch.zeros(logits_RV.shape[-1], dtype=torch.bool)
    is_banned_V[list(rule.banned_token_ids)] = True
    all_logprobs_RV = logits_RV.masked_fill(is_banned_V, -torch.inf).log_softmax(-1)
    return all_logprobs_RV.gather(-1, sample.response_token_ids[:, None])[:, 0]


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm, in float64."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())

"""What Hugging Face computes, a sequence at a time, unpadded; the loss by its definition; autograd.

Deliberately shares nothing with our path but the samples: positions are Hugging Face's own, the
loss is the readable one of algorithms/, nothing is packed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mmr1.algorithms.advantages import group_advantages
from megatron_mmr1.algorithms.grpo_loss import grpo_loss, loss_counts, token_weights
from megatron_mmr1.backend.batching import Sample
from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.convert import family_of
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.parity.cases import make_samples
from megatron_mmr1.parity.outcome import Outcome
from megatron_mmr1.types import Prompt

TEMPERATURE = 0.7
ALGORITHM = AlgorithmConfig(kl_coefficient=0.1)


def load_hf(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load Hugging Face's model with its plainest attention.

    Its embedding drops the gradient of the padding token, which a response may well hold
    (`<|endoftext|>`): the mark is taken off.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    has_images = getattr(config, "vision_config", None) is not None
    auto: Any = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    model: Any = auto.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True
    )
    model.get_input_embeddings().padding_idx = None
    return model


def hf_outcome(
    model: Any,
    samples: Sequence[Sample],
    banned_token_ids: Sequence[int],
    constants: tuple[list[Tensor], list[Tensor]] | None = None,
) -> Outcome:
    """Compute log-probs, the GRPO loss (token mean over kept samples) and its gradients.

    Args:
        constants: old and reference log-probs; made here when None, so far from the present ones
            that some ratios are clipped.
    """
    model.zero_grad(set_to_none=True)
    now = [hf_logprobs(model, s, TEMPERATURE, banned_token_ids) for s in samples]
    if constants is None:
        generator = torch.Generator().manual_seed(1)
        old, ref = (
            [(x.detach() + 0.3 * torch.randn(x.shape, generator=generator)) for x in now]
            for _ in range(2)
        )
    else:
        old, ref = constants
    loss = _definition(samples, now, old, ref)
    loss.backward()
    gradients = hf_gradients(model)
    return Outcome([x.detach() for x in now], loss.detach(), gradients, old, ref)


def _definition(
    samples: Sequence[Sample], now: list[Tensor], old: list[Tensor], ref: list[Tensor]
) -> Tensor:
    """The loss as algorithms/ defines it, of sequences end to end."""
    lengths_N = torch.tensor([len(logprobs) for logprobs in now])
    kept_N = torch.tensor([not math.isnan(sample.reward) for sample in samples])
    weights_N = token_weights(
        lengths_N, kept_N, ALGORITHM.aggregation, *loss_counts(lengths_N, kept_N), 0
    )
    sequence = torch.arange(len(samples)).repeat_interleave(lengths_N)
    return grpo_loss(
        torch.cat(now),
        torch.tensor(advantages(samples))[sequence],
        weights_N[sequence],
        ALGORITHM,
        sequence=sequence,
        old_logprobs=torch.cat(old),
        ref_logprobs=torch.cat(ref),
    ).loss


def advantages(samples: Sequence[Sample]) -> list[float]:
    """Return each sample's advantage among the responses to its prompt."""
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.prompt.prompt_id, []).append(index)
    result = [0.0] * len(samples)
    for members in groups.values():
        rewards_PG = torch.tensor([[samples[index].reward for index in members]])
        for index, value in zip(members, group_advantages(rewards_PG)[0].tolist(), strict=True):
            result[index] = value
    return result


def _image_arguments(model: Any, prompt: Prompt, token_ids: Tensor) -> dict[str, Tensor]:
    """What the family's model takes beside tokens; Qwen's needs a part of it without images too."""
    arguments = {}
    if model.config.model_type.endswith("_vl"):
        arguments["mm_token_type_ids"] = (token_ids == model.config.image_token_id).int()
    if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
        arguments["pixel_values"] = prompt.pixel_values.to(model.dtype)
        if model.config.model_type.endswith("_vl"):
            arguments["image_grid_thw"] = prompt.image_grid_thw
    return arguments


def hf_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients by the rules' names; transformers itself turns its own into those of the files."""
    from transformers.core_model_loading import revert_weight_conversion

    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    in_files = revert_weight_conversion(model, gradients)
    spelling = family_of(model.config).spelling_of(in_files)
    return {spelling.in_rules(name): gradient for name, gradient in in_files.items()}


def hf_logprobs(
    model: Any, sample: Sample, temperature: float, banned_token_ids: Sequence[int]
) -> Tensor:
    """Log-probs [R] of one sequence's response, fp32."""
    prompt = sample.prompt
    token_ids = torch.cat([prompt.token_ids, sample.response_token_ids])[None]
    logits_SV = model(
        input_ids=token_ids,
        attention_mask=torch.ones_like(token_ids),
        **_image_arguments(model, prompt, token_ids),
    ).logits[0]
    logits_RV = logits_SV[len(prompt.token_ids) - 1 : -1].float() / temperature
    is_banned_V = torch.zeros(logits_RV.shape[-1], dtype=torch.bool)
    is_banned_V[list(banned_token_ids)] = True
    all_logprobs_RV = logits_RV.masked_fill(is_banned_V, -torch.inf).log_softmax(-1)
    return all_logprobs_RV.gather(-1, sample.response_token_ids[:, None])[:, 0]


def file_for(references: Path, folder: str | Path, kind: str, what: str) -> Path:
    """Where the outcome of one model and one kind of batch is kept."""
    name = f"{Path(folder).name}-{kind}-{what}".replace(" ", "_")
    return references / f"{name}.safetensors"


def write_references(
    references: Path, folder: str | Path, kinds: Sequence[str], dtypes: Sequence[str]
) -> None:
    """Compute what Hugging Face says of a model, in float32 and in the other dtypes asked for."""
    processor = PromptProcessor(folder)
    for dtype in ("float32", *(d for d in dtypes if d != "float32")):
        model = load_hf(folder, getattr(torch, dtype))
        for kind in kinds:
            samples = make_samples(kind, processor)
            constants = None
            if dtype != "float32":
                exact = Outcome.load(file_for(references, folder, kind, "float32"))
                constants = exact.old, exact.ref
            outcome = hf_outcome(model, samples, processor.banned_token_ids, constants)
            outcome.save(file_for(references, folder, kind, dtype))

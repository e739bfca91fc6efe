"""The model FLOPs of a GRPO step, and the formula in words and numbers. The counts are those of
backend/cost.py, which also balances the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_mmr1.backend.batching import SampleSize
from megatron_mmr1.backend.cost import Flops, StepCost
from megatron_mmr1.config.schema import AlgorithmConfig


def num_logprob_passes(algorithm: AlgorithmConfig) -> int:
    """Forward passes for frozen log-probs: old ones with several optimizer steps a batch, and the
    reference's with a KL term.
    """
    return (algorithm.optimizer_steps_per_batch > 1) + (algorithm.kl_coefficient > 0)


def training_flops(sizes: Sequence[SampleSize], cost: StepCost) -> Flops:
    """FLOPs of taking sequences through the model once, each prompt's images once."""
    total = Flops()
    images = {size.key[0]: size.patches for size in sizes}
    for size in sizes:
        total += cost.of_sequence(size.num_tokens, size.num_response_tokens)
    return total + Flops(vision=sum(cost.images(patches) for patches in images.values()))


def step_flops(
    sizes: Sequence[SampleSize], hf_config: Any, algorithm: AlgorithmConfig, trains_vision: bool
) -> dict[str, Flops]:
    """Return the FLOPs of a step: "train" (forward and backward) and "logprobs" (forward passes).

    Generation is not counted. A frozen tower's features serve all passes of a step.
    """
    text, vision = hf_config.get_text_config(), getattr(hf_config, "vision_config", None)
    train = training_flops(sizes, StepCost.of(text, vision, trains_vision))
    one = training_flops(sizes, StepCost.of_forward(text, vision))
    if not trains_vision:
        one = Flops(one.language, one.attention, one.head)
    return {"train": train, "logprobs": one.times(num_logprob_passes(algorithm))}


def formula(hf_config: Any, trains_vision: bool) -> str:
    """Return the formula of a trained step with this model's numbers; FLOPs."""
    text, vision = hf_config.get_text_config(), getattr(hf_config, "vision_config", None)
    cost = StepCost.of(text, vision, trains_vision)
    lines = [
        "model FLOPs of a sequence of L tokens, R of them the response's, forward and backward:",
        f"  language model  {cost.text_token:.6g} L",
        f"  attention       {cost.text_pair:.6g} L (L + 1) / 2   (the causal half)",
        f"  head            {cost.output_token:.6g} R",
    ]
    if vision is not None:
        lines += [
            "and once a prompt and optimizer step, for each image of n patches"
            + (":" if trains_vision else " (frozen: forward alone):"),
            f"  vision tower    n ({cost.patch:.6g} + {cost.window_pair:.6g} min(n, "
            f"{cost.window_patches}) + {cost.full_pair:.6g} n)",
        ]
    lines.append("A pass for old or reference log-probs is a third of it; generation is left out.")
    return "\n".join(lines)

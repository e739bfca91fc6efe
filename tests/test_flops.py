"""The FLOPs that utilisation is made of, part by part, against a counted forward pass of Hugging
Face's: the tiny models, and published sizes whose decoders are on meta tensors.

The counter sees every product of eager attention, the causal half that we leave out too: attention
is compared as if all pairs were computed.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published import PUBLISHED
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_mmr1.backend.cost import Flops, StepCost

NUM_TOKENS, NUM_RESPONSE_TOKENS = 96, 40
GRID = (8, 16)  # whole windows of eight patches
# Rotary angles, and an expert router, are all that the counter sees and we leave out.
TOLERANCE = 0.01


def hf_model(config: Any) -> Any:
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the counter does not know grouped products
    auto: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else None
    return (auto or AutoModelForCausalLM).from_config(config)


def counted(model: Any) -> Flops:
    """One forward pass of a sequence, and of an image, by a counter that knows nothing of us."""
    device = next(model.parameters()).device
    token_ids = torch.ones(1, NUM_TOKENS, dtype=torch.long, device=device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(token_ids, logits_to_keep=NUM_RESPONSE_TOKENS)
    by_module = counter.get_flop_counts()
    head = sum(sum(v.values()) for k, v in by_module.items() if k.endswith(".lm_head"))
    attention = sum(
        flops
        for name, found in by_module.items()
        if name.endswith(".self_attn")
        for operation, flops in found.items()
        if "bmm" in str(operation)
    )
    vision = 0
    if hasattr(model.config, "vision_config"):
        vision = sum(_vision(model, model.config).values())
    return Flops(counter.get_total_flops() - head - attention, attention, head, vision)


def _vision(model: Any, config: Any) -> dict[Any, int]:
    tower = model.model.visual.to(torch.bfloat16)
    if next(tower.parameters()).is_meta:  # its positions are made of numbers, on the CPU
        tower.to_empty(device="cpu")
    size = config.vision_config
    pixels = torch.zeros(
        GRID[0] * GRID[1], size.in_channels * size.temporal_patch_size * size.patch_size**2
    )
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        tower(pixels, grid_thw=torch.tensor([[1, *GRID]]))
    return counter.get_flop_counts()["Global"]


def ours(config: Any) -> Flops:
    vision_config = getattr(config, "vision_config", None)
    cost = StepCost.of_forward(config.get_text_config(), vision_config)
    found = cost.of_sequence(NUM_TOKENS, NUM_RESPONSE_TOKENS)
    vision = cost.images([GRID[0] * GRID[1]]) if vision_config else 0.0
    return replace(found, attention=cost.text_pair * NUM_TOKENS**2, vision=vision)


def assert_equal(found: Flops, expected: Flops) -> None:
    for part in ("language", "attention", "head", "vision"):
        value = getattr(expected, part)
        assert getattr(found, part) == pytest.approx(value, rel=TOLERANCE), part


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2", "qwen3", "qwen3_moe", "llama"])
def test_every_part_of_a_tiny_model_is_within_one_per_cent_of_a_counted_forward(
    tiny_folder: Callable[[str], Path], name: str
):
    config = AutoConfig.from_pretrained(tiny_folder(name), local_files_only=True)
    assert_equal(ours(config), counted(hf_model(config)))


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B", "Qwen2-VL-7B", "Qwen3-8B", "Llama-3.1-8B"])
def test_every_part_of_a_published_model_is_within_one_per_cent_of_a_counted_forward(name: str):
    settings = dict(PUBLISHED[name].config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = hf_model(config)
    assert_equal(ours(config), counted(model))


@pytest.mark.parametrize("part", ["language", "attention", "head", "vision"])
def test_two_per_cent_too_much_in_any_part_would_be_noticed(
    tiny_folder: Callable[[str], Path], part: str
):
    """Negative control."""
    config = AutoConfig.from_pretrained(tiny_folder("qwen2_5_vl"), local_files_only=True)
    found, expected = ours(config), counted(hf_model(config))
    wrong = replace(found, **{part: 1.02 * getattr(found, part)})
    with pytest.raises(AssertionError, match=part):
        assert_equal(wrong, expected)


def test_a_trained_step_is_three_forward_passes_and_a_frozen_tower_one(
    tiny_folder: Callable[[str], Path],
):
    config = AutoConfig.from_pretrained(tiny_folder("qwen2_5_vl"), local_files_only=True)
    sizes = config.get_text_config(), config.vision_config
    forward = StepCost.of_forward(*sizes)
    for trains_vision, passes in ((True, 3), (False, 1)):
        step = StepCost.of(*sizes, trains_vision)
        assert step.of_sequence(50, 20) == forward.of_sequence(50, 20).times(3)
        assert step.images([32, 48]) == passes * forward.images([32, 48])
    total = (forward.of_sequence(50, 20) + Flops(vision=forward.images([32]))).total
    assert total == forward.sequence(50, 20) + forward.images([32])

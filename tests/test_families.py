"""Conversion tables against transformers, at the published sizes, on meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import PUBLISHED, Published
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion

from megatron_mmr1 import device
from megatron_mmr1.backend.model import PolicyStage, transformer_config
from megatron_mmr1.config.schema import ModelConfig, ParallelConfig
from megatron_mmr1.convert import AttentionShape, family_of, megatron_to_hf

pytestmark = pytest.mark.usefixtures("process_group")


def config_of(published: Published) -> Any:
    settings = dict(published.config)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def tensors_of_hugging_face(config: Any) -> dict[str, torch.Size]:
    """Names and shapes that `save_pretrained` would write."""
    auto: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else None
    with torch.device("meta"):
        model = (auto or AutoModelForCausalLM).from_config(config)
    named = dict(model.named_parameters())
    return {name: t.shape for name, t in revert_weight_conversion(model, named).items()}


def tensors_of_ours(config: Any) -> list[tuple[str, torch.Size]]:
    """Names and shapes that the table makes of every Megatron parameter."""
    with device.seam(), torch.device("meta"):
        megatron = transformer_config(config, ModelConfig("", "bfloat16"), ParallelConfig())
        parameters = list(PolicyStage(config, megatron).named_parameters())
    shape = AttentionShape.of(config.get_text_config())
    exported = megatron_to_hf(family_of(config).rules, parameters, shape)
    return [(name, tensor.shape) for name, tensor in exported]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_makes_every_published_tensor_once(name: str):
    published = PUBLISHED[name]
    config = config_of(published)
    ours = tensors_of_ours(config)
    theirs = tensors_of_hugging_face(config)
    assert len(ours) == len(theirs) == published.num_tensors
    assert dict(ours) == theirs
    assert sum(shape.numel() for _, shape in ours) == published.num_parameters

"""Conversion tables against transformers, at the published sizes, on meta tensors; rotary
frequencies; what our decoder lacks is refused.

Log-probs, gradients and exports of every family: `make parity`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published import PUBLISHED, config_of, tensors_of_hugging_face

from megatron_mmr1 import device
from megatron_mmr1.backend.model import PolicyStage, transformer_config
from megatron_mmr1.backend.rotary import Rotary, max_positions
from megatron_mmr1.config.layout import ModelSizes
from megatron_mmr1.config.schema import ParallelConfig, PrecisionConfig
from megatron_mmr1.convert import (
    FAMILIES,
    AttentionShape,
    Spelling,
    family_of,
    megatron_to_hf,
    read_config,
    settle_ties,
)

pytestmark = pytest.mark.usefixtures("process_group")


def tensors_of_ours(config: Any) -> list[tuple[str, torch.Size]]:
    """Names and shapes that the table makes of every Megatron parameter."""
    with device.seam(), torch.device("meta"):
        megatron = transformer_config(config, ParallelConfig(), PrecisionConfig("bfloat16"))
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


def test_a_table_without_a_rule_would_be_noticed():
    """Negative control: Qwen2's table has no norms of queries and keys."""
    config = config_of(PUBLISHED["Qwen3-8B"])
    with device.seam(), torch.device("meta"):
        megatron = transformer_config(config, ParallelConfig(), PrecisionConfig("bfloat16"))
        parameters = list(PolicyStage(config, megatron).named_parameters())
    shape = AttentionShape.of(config)
    with pytest.raises(ValueError, match=r"no conversion rule .*q_layernorm"):
        list(megatron_to_hf(FAMILIES["qwen2"].rules, parameters, shape))


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B", "Qwen3-VL-8B"])
def test_every_spelling_of_a_folder_is_found_and_goes_back(name: str):
    config = config_of(PUBLISHED[name])
    family, names = family_of(config), [name for name, _ in tensors_of_ours(config)]
    for spelling in (Spelling(), *family.spellings):
        in_files = [spelling.in_files(n) for n in names]
        assert family.spelling_of(in_files) == spelling
        assert [spelling.in_rules(n) for n in in_files] == names


def rotary_angles(config: Any, position_ids_3T: torch.Tensor) -> torch.Tensor:
    text = config.get_text_config()
    rotary = Rotary(text, family_of(config).interleaved_positions)
    return rotary(position_ids_3T[:, None], ())[:, 0]


@pytest.mark.parametrize("name", ["Qwen2.5-VL-3B", "Qwen3-VL-4B", "Llama-3.1-8B", "Qwen3-8B"])
def test_rotary_frequencies_are_hugging_faces(name: str):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    config = config_of(PUBLISHED[name])
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    position_ids_3T = torch.randint(0, 5000, (3, 50), generator=generator)
    if "VL" not in name:
        position_ids_3T = position_ids_3T[:1].expand(3, -1)
        cos, sin = LlamaRotaryEmbedding(text)(torch.zeros(1), position_ids_3T[:1])
    else:
        theirs = Qwen3VLTextRotaryEmbedding if "Qwen3" in name else Qwen2_5_VLRotaryEmbedding
        cos, sin = theirs(text)(torch.zeros(1), position_ids_3T[:, None])
    angles = rotary_angles(config, position_ids_3T)
    torch.testing.assert_close(angles.cos(), cos[0], rtol=0, atol=0)
    torch.testing.assert_close(angles.sin(), sin[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama-3.1-8B", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("Llama-3.1-8B", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("Mistral-7B-v0.3", {"sliding_window": 4096}, "sliding_window=4096 is not supported"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ("Qwen3-8B", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ],
)
def test_a_part_that_our_decoder_lacks_is_refused(name: str, changes: dict[str, Any], message: str):
    published = PUBLISHED[name]
    config = config_of(replace(published, config=published.config | changes))
    with pytest.raises(ValueError, match=message):
        transformer_config(config, ParallelConfig(), PrecisionConfig())


def test_dynamic_wavelengths_are_the_default_ones_up_to_the_longest_position():
    published = PUBLISHED["InternVL3-8B"]
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    text = published.config["text_config"] | {"rope_parameters": rope}
    config = config_of(replace(published, config=published.config | {"text_config": text}))
    position_ids_3T = torch.arange(50).expand(3, -1)
    default = config_of(published).get_text_config()
    default.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    expected = Rotary(default, interleaved=False)(position_ids_3T[:, None], ())[:, 0]
    assert torch.equal(rotary_angles(config, position_ids_3T), expected)
    assert max_positions(config.get_text_config()) == text.get("max_position_embeddings", 32768)
    assert max_positions(default) is None


def test_wavelengths_that_scale_attention_are_refused():
    published = PUBLISHED["Llama-3.1-8B"]
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    config = config_of(replace(published, config=published.config | {"rope_parameters": rope}))
    with pytest.raises(ValueError, match=r"rope_type='yarn' is not supported"):
        Rotary(config, interleaved=False)


# As config.json reads on the hub, of other versions of transformers.
HUB_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2-VL, flat": {
        "model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 151936, "rope_theta": 1000000.0, "sliding_window": 32768,
        "use_sliding_window": False, "tie_word_embeddings": True, "image_token_id": 151655,
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "Qwen3-MoE": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": False,
    },
    "InternVL3, tie not said": {
        "model_type": "internvl", "downsample_ratio": 0.5, "image_token_id": 151667,
        "text_config": {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "vocab_size": 151674, "rope_theta": 1000000.0, "tie_word_embeddings": False,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        },
        "vision_config": {"attention_bias": True, "hidden_size": 1024, "num_hidden_layers": 24},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_configs_as_the_hub_has_them_are_read(name: str, tmp_path: Path):
    for file in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / file).touch()
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIGS[name]))
    config, sizes = read_config(tmp_path), ModelSizes.of(tmp_path)
    megatron = transformer_config(config, ParallelConfig(), PrecisionConfig())
    Rotary(config.get_text_config(), family_of(config).interleaved_positions)
    assert sizes.num_layers == megatron.num_layers
    assert sizes.num_experts == (megatron.num_moe_experts or 0)
    assert sizes.num_vision_heads == (0 if name == "Qwen3-MoE" else 16)
    settle_ties(config, ("language_model.lm_head.weight",), lambda first, second: False)
    assert config.tie_word_embeddings == name.startswith("Qwen2-VL")

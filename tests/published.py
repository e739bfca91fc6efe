"""Published models' sizes: what differs from transformers' defaults, and the parameter counts.

The counts are those of the models' pages; nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Published:
    """A model's config, and what its files hold."""

    config: dict[str, Any]
    num_parameters: int
    num_tensors: int


def _text(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


def _qwen2_5_vl(text: dict[str, Any], vision_inner: int, tied: bool = False) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": vision_inner}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {**text, "rope_parameters": rope, "use_sliding_window": False},
        "vision_config": {**vision, "out_hidden_size": text["hidden_size"]},
        "tie_word_embeddings": tied,
    }


def _qwen2_vl(text: dict[str, Any], tied: bool = False) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return {
        "model_type": "qwen2_vl",
        "text_config": {**text, "rope_parameters": rope, "use_sliding_window": False},
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"]},
        "tie_word_embeddings": tied,
    }


def _qwen3_vl(text: dict[str, Any], vision: dict[str, Any], tied: bool = False) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    return {
        "model_type": "qwen3_vl",
        "text_config": {**text, "head_dim": 128, "rope_parameters": rope},
        "vision_config": {**vision, "num_heads": 16, "out_hidden_size": text["hidden_size"]},
        "tie_word_embeddings": tied,
    }


def _internvl(text: dict[str, Any]) -> dict[str, Any]:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    return {
        "model_type": "internvl",
        "text_config": text,
        "vision_config": {**vision, "num_attention_heads": 16, "attention_bias": True},
        "tie_word_embeddings": False,
    }


PUBLISHED: dict[str, Published] = {
    "Qwen2.5-VL-3B": Published(
        _qwen2_5_vl(_text(2048, 11008, 36, 16, 2, 151936), 3420, tied=True), 3_754_622_976, 824
    ),
    "Qwen2.5-VL-7B": Published(
        _qwen2_5_vl(_text(3584, 18944, 28, 28, 4, 152064), 3420), 8_292_166_656, 729
    ),
    "Qwen2.5-VL-32B": Published(
        _qwen2_5_vl(_text(5120, 27648, 64, 40, 8, 152064), 3456), 33_452_718_336, 1161
    ),
    "Qwen2.5-VL-72B": Published(
        _qwen2_5_vl(_text(8192, 29568, 80, 64, 8, 152064), 3456), 73_410_777_344, 1353
    ),
    "Qwen2-VL-2B": Published(
        _qwen2_vl(_text(1536, 8960, 28, 12, 2, 151936), tied=True), 2_208_985_600, 729
    ),
    "Qwen2-VL-7B": Published(_qwen2_vl(_text(3584, 18944, 28, 28, 4, 152064)), 8_291_375_616, 730),
    "Qwen3-VL-8B": Published(
        _qwen3_vl(
            _text(4096, 12288, 36, 32, 8, 151936),
            {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304,
             "deepstack_visual_indexes": [8, 16, 24]},
        ),
        8_767_123_696,
        750,
    ),
    "Qwen3-VL-4B": Published(
        _qwen3_vl(
            _text(2560, 9728, 36, 32, 8, 151936),
            {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
             "deepstack_visual_indexes": [5, 11, 17]},
            tied=True,
        ),
        4_437_815_808,
        713,
    ),
    "InternVL3-8B": Published(
        _internvl({**_text(3584, 18944, 28, 28, 4, 151674), "model_type": "qwen2"}),
        7_944_373_760,
        781,
    ),
    "InternVL2.5-8B": Published(
        _internvl({**_text(4096, 14336, 32, 32, 8, 92553), "model_type": "llama"}),
        8_075_365_376,
        733,
    ),
    "Qwen2.5-7B": Published(
        {"model_type": "qwen2", **_text(3584, 18944, 28, 28, 4, 152064)}, 7_615_616_512, 339
    ),
    "Qwen3-8B": Published(
        {"model_type": "qwen3", **_text(4096, 12288, 36, 32, 8, 151936, head_dim=128)},
        8_190_735_360,
        399,
    ),
    "Qwen3-30B-A3B": Published(
        {
            "model_type": "qwen3_moe",
            **_text(2048, 6144, 48, 32, 4, 151936, head_dim=128),
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        },
        30_532_122_624,
        18867,
    ),
    "Llama-3.1-8B": Published(
        {
            "model_type": "llama",
            **_text(4096, 14336, 32, 32, 8, 128256),
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
        },
        8_030_261_248,
        291,
    ),
    "Llama-2-7B": Published(
        {"model_type": "llama", **_text(4096, 11008, 32, 32, 32, 32000)}, 6_738_415_616, 291
    ),
    "Mistral-7B-v0.3": Published(
        {"model_type": "mistral", **_text(4096, 14336, 32, 32, 8, 32768), "sliding_window": None},
        7_248_023_552,
        291,
    ),
}  # fmt: skip


def config_of(published: Published) -> Any:
    """Return a published model's Hugging Face config."""
    from transformers import AutoConfig  # heavy, and many tests read the sizes alone

    settings = dict(published.config)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def tensors_of_hugging_face(config: Any) -> dict[str, Any]:
    """Names and shapes that `save_pretrained` would write."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    auto: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else None
    with torch.device("meta"):
        model = (auto or AutoModelForCausalLM).from_config(config)
    named = dict(model.named_parameters())
    return {name: t.shape for name, t in revert_weight_conversion(model, named).items()}

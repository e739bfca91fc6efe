"""The sizes of published models, by the names of hydra_conf/model/: plans need no download."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from megatron_mmr1.config.schema import ModelConfig

_VISION = {"depth": 32, "hidden_size": 1280, "num_heads": 16}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def _qwen2_5_vl(
    text: dict[str, int], vision_intermediate_size: int, *, is_tied: bool
) -> dict[str, Any]:
    vision = {
        **_VISION,
        "intermediate_size": vision_intermediate_size,
        "out_hidden_size": text["hidden_size"],
    }
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {
            **text,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _ROPE,
            "use_sliding_window": False,
        },
        "vision_config": vision,
        "tie_word_embeddings": is_tied,
    }


def _text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


# config.json's, as far as transformers' defaults differ.
SIZES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_3b": _qwen2_5_vl(_text(2048, 11008, 36, 16, 2, 151936), 3420, is_tied=True),
    "qwen2_5_vl_7b": _qwen2_5_vl(_text(3584, 18944, 28, 28, 4, 152064), 3420, is_tied=False),
    "qwen2_5_vl_32b": _qwen2_5_vl(_text(5120, 27648, 64, 40, 8, 152064), 3456, is_tied=False),
}


def model_config(model: ModelConfig) -> Any:
    """Return the model's Hugging Face config: its folder's if there is one, else the preset's.

    Raises:
        ValueError: there is neither.
    """
    from transformers import AutoConfig

    if (Path(model.path) / "config.json").is_file():
        return AutoConfig.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False
        )
    if model.preset not in SIZES:
        raise ValueError(
            f"model.path={model.path!r} has no config.json, and model.preset={model.preset!r} is "
            f"no published model's; use model= with {', '.join(SIZES)}, or another model.path"
        )
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(SIZES[model.preset])
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

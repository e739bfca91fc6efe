"""A tiny random model of every family, as an ordinary Hugging Face folder, for the checks.

Owns their configs and weights; tokens and processors are those of data/tiny_processors.py, sizes
those of data/tiny_model.py. Every parameter differs from what its kind is initialised to, so that a
swapped norm or a forgotten bias is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mmr1.data import tiny_model
from megatron_mmr1.data import tiny_processors as processors
from megatron_mmr1.data.tiny_model import MAX_POSITIONS, TEXT_SIZES, VISION_SIZES
from megatron_mmr1.data.tiny_processors import TILE_SIZE, TILE_TOKENS

HEAD_DIM = 32
# Interleaved: every third of the 16 frequencies turns with height, the next with width.
INTERLEAVED_SECTION = [6, 5, 5]
NUM_EXPERTS, EXPERT_SIZE, TOP_K = 4, 64, 2


@dataclass(frozen=True)
class _Family:
    """How one family's folder is made.

    Attributes:
        config: (vocabulary size, ids of its special tokens, is tied) to the Hugging Face config.
        write_processor: one of data/tiny_processors.py; returns that size and those ids.
    """

    config: Callable[[int, dict[str, int], bool], Any]
    write_processor: Callable[[Path], tuple[int, dict[str, int]]]


def build_tiny(name: str, folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Write the tiny random model of one family; an earlier one in `folder` is replaced.

    Args:
        name: a key of `TINY_MODELS`.
        folder: where to write; its parents are made.
        tied: share the output layer with the embedding (no `lm_head` in the file).
        seed: of the weights. The same seed gives the same bytes.

    Returns:
        `folder`.

    Raises:
        ValueError: `folder` holds something else than a model, or no family has this name.
    """
    if name not in TINY_MODELS:
        raise ValueError(f"no tiny model is called {name!r}; use one of {', '.join(TINY_MODELS)}")
    family = TINY_MODELS[name]

    def write(temporary: Path) -> None:
        vocab_size, ids = family.write_processor(temporary)
        _random_model(family.config(vocab_size, ids, tied), seed).save_pretrained(temporary)

    return tiny_model.write_folder(folder, write)


def _random_model(config: Any, seed: int) -> Any:
    """Make a float32 model of random weights."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        GenerationConfig,
    )

    is_multimodal = hasattr(config, "vision_config")
    auto_class = AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model = auto_class.from_config(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.05 * noise)
    text = config.get_text_config()
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=True,
    )
    return model


# Configs. For the arguments see _Family.config.


def _text(vocab_size: int, ids: dict[str, int], is_tied: bool) -> dict[str, Any]:
    """What the text models have in common."""
    end_ids = {key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        **TEXT_SIZES,
        **end_ids,
        "vocab_size": vocab_size,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": is_tied,
        "dtype": "float32",
    }


def _qwen2(vocab_size: int, ids: dict[str, int], is_tied: bool) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**_text(vocab_size, ids, is_tied))


def _qwen3(vocab_size: int, ids: dict[str, int], is_tied: bool) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_text(vocab_size, ids, is_tied), head_dim=HEAD_DIM)


def _qwen3_moe(vocab_size: int, ids: dict[str, int], is_tied: bool) -> Any:
    from transformers import Qwen3MoeConfig

    text: dict[str, Any] = {**_text(vocab_size, ids, is_tied), "head_dim": HEAD_DIM}
    return Qwen3MoeConfig(
        **text,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=EXPERT_SIZE,
        norm_topk_prob=True,
    )


def _llama(vocab_size: int, ids: dict[str, int], is_tied: bool) -> Any:
    """Llama 3: frequencies scaled, some of them already within the first 64 positions."""
    from transformers import LlamaConfig

    text = _text(vocab_size, ids, is_tied)
    text["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    return LlamaConfig(**text)


def _llama2(vocab_size: int, ids: dict[str, int], is_tied: bool) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_text(vocab_size, ids, is_tied))


def _mistral(vocab_size: int, ids: dict[str, int], is_tied: bool) -> Any:
    from transformers import MistralConfig

    return MistralConfig(**_text(vocab_size, ids, is_tied), head_dim=HEAD_DIM, sliding_window=None)


def _qwen2_5_vl(vocab_size: int, ids: dict[str, int], is_tied: bool) -> Any:
    return tiny_model.build_qwen2_5_vl_config(vocab_size, is_tied)


def _qwen2_vl(vocab_size: int, ids: dict[str, int], is_tied: bool) -> Any:
    from transformers import Qwen2VLConfig

    text = _text(vocab_size, ids, is_tied)
    text["rope_parameters"]["mrope_section"] = tiny_model.MROPE_SECTION
    return Qwen2VLConfig(
        text_config=text,
        vision_config={
            "embed_dim": VISION_SIZES["hidden_size"],
            "hidden_size": TEXT_SIZES["hidden_size"],
            "depth": VISION_SIZES["depth"],
            "num_heads": VISION_SIZES["num_heads"],
            "mlp_ratio": 2,
        },
        **_vision_ids(ids),
        tie_word_embeddings=is_tied,
        dtype="float32",
    )


def _qwen3_vl(vocab_size: int, ids: dict[str, int], is_tied: bool) -> Any:
    """Two deepstack layers, so that they fit in the first half of the text layers."""
    from transformers import Qwen3VLConfig

    text: dict[str, Any] = {**_text(vocab_size, ids, is_tied), "head_dim": HEAD_DIM}
    text["rope_parameters"] |= {"mrope_section": INTERLEAVED_SECTION, "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config=text,
        vision_config={
            **VISION_SIZES,
            "depth": 3,
            "out_hidden_size": TEXT_SIZES["hidden_size"],
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
        **_vision_ids(ids),
        tie_word_embeddings=is_tied,
        dtype="float32",
    )


def _vision_ids(ids: dict[str, int]) -> dict[str, Any]:
    return {key: ids[key] for key in ids if key.startswith(("image_", "video_", "vision_"))}


def _internvl_config(text_config: Any, image_token_id: int, is_tied: bool) -> Any:
    from transformers import InternVLConfig

    return InternVLConfig(
        text_config=text_config.to_dict(),
        vision_config={
            "hidden_size": VISION_SIZES["hidden_size"],
            "intermediate_size": VISION_SIZES["intermediate_size"],
            "num_hidden_layers": VISION_SIZES["depth"],
            "num_attention_heads": VISION_SIZES["num_heads"],
            "attention_bias": True,
            "image_size": [TILE_SIZE, TILE_SIZE],
            "patch_size": [14, 14],
        },
        image_token_id=image_token_id,
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=is_tied,
        dtype="float32",
    )


def _internvl_qwen2(vocab_size: int, ids: dict[str, int], is_tied: bool) -> Any:
    return _internvl_config(_qwen2(vocab_size, ids, is_tied), ids["image_token_id"], is_tied)


def _internvl_llama(vocab_size: int, ids: dict[str, int], is_tied: bool) -> Any:
    """InternLM2 as the converted models have it: a Llama."""
    return _internvl_config(_llama2(vocab_size, ids, is_tied), ids["image_token_id"], is_tied)


TINY_MODELS = {
    "qwen2_5_vl": _Family(_qwen2_5_vl, processors.write_qwen2_5_vl),
    "qwen2_vl": _Family(_qwen2_vl, processors.write_qwen2_vl),
    "qwen3_vl": _Family(_qwen3_vl, processors.write_qwen3_vl),
    "internvl_qwen2": _Family(_internvl_qwen2, processors.write_internvl),
    "internvl_llama": _Family(_internvl_llama, processors.write_internvl),
    "qwen2": _Family(_qwen2, processors.write_qwen_text),
    "qwen3": _Family(_qwen3, processors.write_qwen_text),
    "qwen3_moe": _Family(_qwen3_moe, processors.write_qwen_text),
    "llama": _Family(_llama, processors.write_llama3),
    "llama_sentencepiece": _Family(_llama2, processors.write_llama2),
    "mistral_sentencepiece": _Family(_mistral, processors.write_mistral),
}

"""Tiny random models of every family, in ordinary Hugging Face format.

All have the sizes of data/tiny_model.py and its vocabulary, but for the SentencePiece ones, whose
`tokenizer.model` is trained here. No parameter is left at its initial 0 or 1: a norm in another's
place or a forgotten bias changes the log-probs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mmr1.data.tiny_model import (
    CHAT_TEMPLATE,
    MAX_POSITIONS,
    MROPE_SECTION,
    TEXT_SIZES,
    VISION_SIZES,
    build_config,
    build_processor,
    build_tokenizer,
    end_ids,
    token_id,
)

_HEAD_DIM = TEXT_SIZES["hidden_size"] // TEXT_SIZES["num_attention_heads"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_TEXT_TEMPLATE = """\
{{ bos_token }}{%- for message in messages -%}
[INST] {{ message['content'] }} [/INST]
{%- endfor -%}"""


def build_tiny(name: str, folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Write a model folder.

    Args:
        name: one of `NAMES`.
        folder: must not exist, or be empty.
        tied: share the output layer with the embedding.
        seed: of the weights. The same seed gives the same bytes.

    Returns:
        `folder`.

    Raises:
        ValueError: no such model.
    """
    if name not in _CONFIGS:
        raise ValueError(f"no tiny model {name!r}; choose one of {', '.join(NAMES)}")
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    is_sentencepiece = name.endswith("_sentencepiece")
    if is_sentencepiece:
        vocab_size = _write_sentencepiece(folder)
    else:
        vocab_size = len(build_tokenizer())
        _processor(name).save_pretrained(folder)
    config = _CONFIGS[name](vocab_size, tied)
    auto: Any = AutoModelForCausalLM
    if getattr(config, "vision_config", None) is not None:
        auto = AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # 0 or 1 at first
                    parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def _processor(name: str) -> Any:
    """The tokenizer of a text model, else the processor, by the folder's own files later."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLProcessor,
        InternVLVideoProcessor,
        Qwen2VLImageProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    if name in ("qwen2_vl", "qwen2_5_vl"):
        return build_processor()
    if name == "qwen3_vl":
        pixels = 32 * 32
        size = {"shortest_edge": pixels, "longest_edge": 16 * pixels}
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(size=dict(size), patch_size=16),
            tokenizer=build_tokenizer(),
            video_processor=Qwen3VLVideoProcessor(size=dict(size), patch_size=16),
            chat_template=CHAT_TEMPLATE,
        )
    tokenizer = build_tokenizer()
    if name.startswith("internvl"):
        tokens = {
            "start_image_token": "<|vision_start|>",
            "end_image_token": "<|vision_end|>",
            "context_image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
        }
        tokenizer = build_tokenizer(tokens)
        size = {"height": 56, "width": 56}
        return InternVLProcessor(
            image_processor=GotOcr2ImageProcessor(
                size=dict(size), crop_to_patches=True, max_patches=2
            ),
            tokenizer=tokenizer,
            video_processor=InternVLVideoProcessor(size=dict(size)),
            image_seq_length=4,
            chat_template=CHAT_TEMPLATE.replace(_IMAGE, "<|image_pad|>"),
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _text(vocab_size: int, tied: bool, **more: Any) -> dict[str, Any]:
    return {
        **TEXT_SIZES,
        **end_ids(),
        "vocab_size": vocab_size,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.05,
        "rope_parameters": dict(_ROPE),
        "tie_word_embeddings": tied,
        "dtype": "float32",
        **more,
    }


def _qwen2_vl(vocab_size: int, tied: bool) -> Any:
    from transformers import Qwen2VLConfig

    rope = {**_ROPE, "mrope_section": MROPE_SECTION}
    return Qwen2VLConfig(
        text_config=_text(vocab_size, tied, rope_parameters=rope),
        vision_config={
            "depth": VISION_SIZES["depth"],
            "num_heads": VISION_SIZES["num_heads"],
            "embed_dim": VISION_SIZES["hidden_size"],
            "hidden_size": TEXT_SIZES["hidden_size"],
            "mlp_ratio": 2,
            "initializer_range": 0.05,
        },
        **_vision_ids(),
        tie_word_embeddings=tied,
    )


def _qwen3_vl(vocab_size: int, tied: bool) -> Any:
    """With image features of their own for the first two layers."""
    from transformers import Qwen3VLConfig

    rope = {**_ROPE, "mrope_section": MROPE_SECTION, "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config=_text(vocab_size, tied, rope_parameters=rope, head_dim=_HEAD_DIM),
        vision_config={
            **VISION_SIZES,
            "depth": 3,
            "out_hidden_size": TEXT_SIZES["hidden_size"],
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.05,
        },
        **_vision_ids(),
        tie_word_embeddings=tied,
    )


def _internvl(decoder: str) -> Callable[[int, bool], Any]:
    def config(vocab_size: int, tied: bool) -> Any:
        from transformers import InternVLConfig

        return InternVLConfig(
            text_config={**_text(vocab_size, tied), "model_type": decoder},
            vision_config={
                "hidden_size": VISION_SIZES["hidden_size"],
                "intermediate_size": VISION_SIZES["intermediate_size"],
                "num_hidden_layers": VISION_SIZES["depth"],
                "num_attention_heads": VISION_SIZES["num_heads"],
                "attention_bias": True,
                "image_size": [56, 56],
                "patch_size": [14, 14],
            },
            image_token_id=token_id("<|image_pad|>"),
            image_seq_length=4,
            tie_word_embeddings=tied,
        )

    return config


def _text_model(model_type: str, **more: Any) -> Callable[[int, bool], Any]:
    def config(vocab_size: int, tied: bool) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(model_type, **_text(vocab_size, tied, **more))

    return config


def _vision_ids() -> dict[str, int]:
    return {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
    }


_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_CONFIGS: dict[str, Callable[[int, bool], Any]] = {
    "qwen2_5_vl": build_config,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl_qwen2": _internvl("qwen2"),
    "internvl_llama": _internvl("llama"),
    "qwen2": _text_model("qwen2"),
    "qwen3": _text_model("qwen3", head_dim=_HEAD_DIM),
    "qwen3_moe": _text_model(
        "qwen3_moe",
        head_dim=_HEAD_DIM,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    ),
    "llama": _text_model("llama", rope_parameters=_LLAMA_3),
    "llama_sentencepiece": _text_model("llama", **_SENTENCEPIECE_IDS),
    "mistral_sentencepiece": _text_model("mistral", sliding_window=None, **_SENTENCEPIECE_IDS),
}
NAMES = tuple(_CONFIGS)


def _write_sentencepiece(folder: Path) -> int:
    """Train a `tokenizer.model` as Llama 2 has one; returns the size of its vocabulary."""
    import sentencepiece

    words = [
        "read",
        "the",
        "largest",
        "smallest",
        "digit",
        "sum",
        "product",
        "of",
        "squares",
        "answer",
        "is",
        "think",
        "box",
    ]
    sentences = [f"{a} {b} {n * 37 % 1000}" for n, a in enumerate(words) for b in words]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEXT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()

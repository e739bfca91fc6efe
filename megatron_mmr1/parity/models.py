"""A tiny random model of every family, as an ordinary Hugging Face folder, for the checks.

Owns the sizes and files of these models; tokens, chat template and folder writing are those of
data/tiny_model.py. Every parameter differs from what its kind is initialised to, so that a swapped
norm or a forgotten bias is noticed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mmr1.data import tiny_model
from megatron_mmr1.data.tiny_model import (
    CHAT_TEMPLATE,
    IMAGE_MEAN,
    IMAGE_STD,
    MAX_POSITIONS,
    TEXT_SIZES,
    VISION_SIZES,
)

HEAD_DIM = 32
# Interleaved: every third of the 16 frequencies turns with height, the next with width.
INTERLEAVED_SECTION = [6, 5, 5]
NUM_EXPERTS, EXPERT_SIZE, TOP_K = 4, 64, 2
TILE_SIZE, TILE_TOKENS = 56, 4  # InternVL: 4 x 4 patches of 14 pixels, merged 2 x 2

INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_INTERNVL_SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *INTERNVL_TOKENS.values(),
    "<unk>",
]
_INTERNVL_TEMPLATE = CHAT_TEMPLATE.replace(
    "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n"
)
_LLAMA3_SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<unk>",
]
_LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""
# Of Llama 2 and Mistral: one form serves both.
_INST_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- else -%}
{{- ' ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
_SENTENCEPIECE_SIZE = 400  # 3 control pieces and 256 bytes among them


@dataclass(frozen=True)
class _Family:
    """How one family's folder is made.

    Attributes:
        config: (vocabulary size, is tied) to the Hugging Face config.
        write_processor: writes tokenizer, chat template and processor, returns the tokenizer's
            size and the ids for the config: bos, eos and pad, and those of vision tokens.
    """

    config: Callable[[int, dict[str, int], bool], Any]
    write_processor: Callable[[Path], tuple[int, dict[str, int]]]


def build_tiny(name: str, folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Write the tiny random model of one family; an earlier one in `folder` is replaced.

    Args:
        name: a key of `FAMILIES_TINY`.
        folder: where to write; its parents are made.
        tied: share the output layer with the embedding (no `lm_head` in the file).
        seed: of the weights. The same seed gives the same bytes.

    Returns:
        `folder`.

    Raises:
        ValueError: `folder` holds something else than a model, or no family has this name.
    """
    if name not in FAMILIES_TINY:
        raise ValueError(f"no tiny model is called {name!r}; use one of {', '.join(FAMILIES_TINY)}")
    family = FAMILIES_TINY[name]

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


# Configs: (vocabulary size, token ids, is tied) to the Hugging Face config


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

    return Qwen3MoeConfig(
        **_text(vocab_size, ids, is_tied),
        head_dim=HEAD_DIM,
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

    text = _text(vocab_size, ids, is_tied) | {"head_dim": HEAD_DIM}
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


def _vision_ids(ids: dict[str, int]) -> dict[str, int]:
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


# Processors: write the files, return the vocabulary's size and the token ids


def _write_qwen_vl(folder: Path, class_name: str, patch_size: int = 14) -> Any:
    processor = tiny_model.build_qwen_processor(class_name, patch_size)
    processor.save_pretrained(folder)
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    vision_ids = {f"{key}_token_id": tiny_model.token_id(token) for key, token in names.items()}
    return len(processor.tokenizer), {**tiny_model.end_ids(), **vision_ids}


def _write_qwen2_5_vl(folder: Path) -> Any:
    return _write_qwen_vl(folder, "Qwen2_5_VLProcessor")


def _write_qwen2_vl(folder: Path) -> Any:
    return _write_qwen_vl(folder, "Qwen2VLProcessor")


def _write_qwen3_vl(folder: Path) -> Any:
    return _write_qwen_vl(folder, "Qwen3VLProcessor", patch_size=16)


def _write_internvl(folder: Path) -> Any:
    """At most four tiles an image, and a thumbnail."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    tokenizer = tiny_model.build_word_tokenizer(
        _INTERNVL_SPECIAL_TOKENS, model_specific_special_tokens=INTERNVL_TOKENS
    )
    size = {"height": TILE_SIZE, "width": TILE_SIZE}
    look = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, max_patches=4, **look
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size, **look),
        image_seq_length=TILE_TOKENS,
        chat_template=_INTERNVL_TEMPLATE,
    ).save_pretrained(folder)
    ids = _ids_of(tokenizer) | {"image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")}
    return len(tokenizer), ids


def _write_qwen_text(folder: Path) -> Any:
    tokenizer = tiny_model.build_word_tokenizer(chat_template=CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder)
    return len(tokenizer), _ids_of(tokenizer)


def _write_llama3(folder: Path) -> Any:
    """Like the published tokenizer, it puts BOS before every text unless told not to."""
    from tokenizers import processors

    bos = _LLAMA3_SPECIAL_TOKENS[0]
    tokenizer = tiny_model.build_word_tokenizer(
        _LLAMA3_SPECIAL_TOKENS,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        chat_template=_LLAMA3_TEMPLATE,
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 0)]
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer), _ids_of(tokenizer)


def _ids_of(tokenizer: Any) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _write_llama2(folder: Path) -> Any:
    return _write_sentencepiece(folder, is_legacy=False)


def _write_mistral(folder: Path) -> Any:
    return _write_sentencepiece(folder, is_legacy=True)


def _write_sentencepiece(folder: Path, is_legacy: bool) -> Any:
    """A folder whose tokenizer is `tokenizer.model` alone, trained here on the task's words."""
    import sentencepiece

    words = "".join(tiny_model.QUESTION_TOKENS) + " " + " ".join(tiny_model.RESPONSE_TOKENS)
    sentences = [words, words.lower(), *(f"{a} plus {a + 1} is {2 * a + 1}" for a in range(40))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=_SENTENCEPIECE_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": "<s>",
                "chat_template": _INST_TEMPLATE,
                "clean_up_tokenization_spaces": False,
                "eos_token": "</s>",
                "legacy": is_legacy,
                "model_max_length": MAX_POSITIONS,
                "pad_token": None,
                "sp_model_kwargs": {},
                "tokenizer_class": "LlamaTokenizer",
                "unk_token": "<unk>",
                "use_default_system_prompt": False,
            },
            indent=2,
        ),
        encoding="utf-8",
    )
    return _SENTENCEPIECE_SIZE, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


FAMILIES_TINY = {
    "qwen2_5_vl": _Family(_qwen2_5_vl, _write_qwen2_5_vl),
    "qwen2_vl": _Family(_qwen2_vl, _write_qwen2_vl),
    "qwen3_vl": _Family(_qwen3_vl, _write_qwen3_vl),
    "internvl_qwen2": _Family(_internvl_qwen2, _write_internvl),
    "internvl_llama": _Family(_internvl_llama, _write_internvl),
    "qwen2": _Family(_qwen2, _write_qwen_text),
    "qwen3": _Family(_qwen3, _write_qwen_text),
    "qwen3_moe": _Family(_qwen3_moe, _write_qwen_text),
    "llama": _Family(_llama, _write_llama3),
    "llama_sentencepiece": _Family(_llama2, _write_llama2),
    "mistral_sentencepiece": _Family(_mistral, _write_mistral),
}

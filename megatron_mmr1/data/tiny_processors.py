"""Tokenizers, chat templates and processors of the tiny models of parity/models.py, by family.

Each function writes its files into a folder and returns the vocabulary's size and the ids of the
special tokens that a config names. The words are those of tiny_model.py.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from megatron_mmr1.data import tiny_model
from megatron_mmr1.data.tiny_model import CHAT_TEMPLATE, IMAGE_MEAN, IMAGE_STD, MAX_POSITIONS

Written = tuple[int, dict[str, int]]

TILE_SIZE, TILE_TOKENS = 56, 4  # InternVL: 4 x 4 patches of 14 pixels, merged 2 x 2
_INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_INTERNVL_SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *_INTERNVL_TOKENS.values(),
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


def _write_qwen_vl(folder: Path, class_name: str, patch_size: int = 14) -> Written:
    processor = tiny_model.build_qwen_processor(class_name, patch_size)
    processor.save_pretrained(folder)
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    vision_ids = {f"{key}_token_id": tiny_model.token_id(token) for key, token in names.items()}
    return len(processor.tokenizer), {**tiny_model.end_ids(), **vision_ids}


def write_qwen2_5_vl(folder: Path) -> Written:
    """Patches of 14 pixels."""
    return _write_qwen_vl(folder, "Qwen2_5_VLProcessor")


def write_qwen2_vl(folder: Path) -> Written:
    """Patches of 14 pixels."""
    return _write_qwen_vl(folder, "Qwen2VLProcessor")


def write_qwen3_vl(folder: Path) -> Written:
    """Patches of 16 pixels."""
    return _write_qwen_vl(folder, "Qwen3VLProcessor", patch_size=16)


def write_internvl(folder: Path) -> Written:
    """At most four tiles an image, and a thumbnail."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    tokenizer = tiny_model.build_word_tokenizer(
        _INTERNVL_SPECIAL_TOKENS, model_specific_special_tokens=_INTERNVL_TOKENS
    )
    size: Any = {"height": TILE_SIZE, "width": TILE_SIZE}
    look: dict[str, Any] = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, max_patches=4, **look
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size, **look),
        image_seq_length=TILE_TOKENS,
        chat_template=_INTERNVL_TEMPLATE,
    ).save_pretrained(folder)
    image_token_id = _INTERNVL_SPECIAL_TOKENS.index("<IMG_CONTEXT>")  # they come first
    return len(tokenizer), {**_ids_of(tokenizer), "image_token_id": image_token_id}


def write_qwen_text(folder: Path) -> Written:
    """Qwen2 and Qwen3: the tokens of the vision-language models, and no processor."""
    tokenizer = tiny_model.build_word_tokenizer(chat_template=CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder)
    return len(tokenizer), _ids_of(tokenizer)


def write_llama3(folder: Path) -> Written:
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


def write_llama2(folder: Path) -> Written:
    """SentencePiece, with the settings that Llama 2 was published with."""
    return _write_sentencepiece(folder, is_legacy=False)


def write_mistral(folder: Path) -> Written:
    """SentencePiece, with the settings that Mistral 7B was published with."""
    return _write_sentencepiece(folder, is_legacy=True)


def _write_sentencepiece(folder: Path, is_legacy: bool) -> Written:
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

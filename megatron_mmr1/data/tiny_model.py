"""A Qwen2.5-VL of 0.86M parameters in ordinary Hugging Face format, for the embedded task.

Owns the tiny model's sizes, its vocabulary and its files. Does not own the task (see digits.py) or
any training. The folder loads wherever a real Qwen2.5-VL does: transformers, vLLM, and our
converter. Nothing in it is trained or downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

# Head dimension 32: vLLM's CPU attention has kernels for 32, 64, 80, 96, 112 and 128 only.
TEXT_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION_SIZES = {"hidden_size": 64, "intermediate_size": 128, "depth": 2, "num_heads": 2}
MROPE_SECTION = [
    4,
    6,
    6,
]  # rotary frequencies for (time, height, width): half the head dimension in all
MAX_POSITIONS = 2048
# Of the training tiles (digits.py). Qwen's own mean leaves the white paper as a large constant that
# RMSNorm doesn't remove: after 300 steps of cold start 3% of three-digit readings were right; with
# these, 73% (one run each).
IMAGE_MEAN, IMAGE_STD = 0.78, 0.31
MAX_VISUAL_TOKENS = 16

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
]
# Ordinary tokens: rewards read them from text that was decoded without special tokens.
RESPONSE_TOKENS = ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}"]
RESPONSE_TOKENS += [*"0123456789", "+", "*", "=", ",", "^2", "max", "min", "(", ")"]
PROMPT_TOKENS = ["\n", "system", "user", "assistant"]
QUESTION_TOKENS = [
    "Read",
    " the",
    " digits",
    ".",
    "Largest",
    "Smallest",
    " digit",
    "?",
    "Sum",
    " of",
    " squares",
]
QUESTION_TOKENS += ["Product", " "]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""


def build_tiny_qwen2_5_vl(folder: Path, seed: int = 0, tie_word_embeddings: bool = False) -> Path:
    """Write the tiny model, randomly initialised from `seed`, with its tokenizer and processor.

    Everything is written to a temporary folder beside `folder` and renamed at the end, so that a
    folder that exists is complete; an earlier one is replaced.

    Args:
        folder: where to write; its parents are made.
        seed: of the initial weights. The same seed gives the same bytes.
        tie_word_embeddings: share the output layer with the embedding (no `lm_head` in the file).

    Returns:
        `folder`.

    Raises:
        ValueError: `folder` holds something else than a model.
    """
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    processor = build_qwen_processor("Qwen2_5_VLProcessor")
    config = build_qwen2_5_vl_config(len(processor.tokenizer), tie_word_embeddings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(**end_ids(), do_sample=True)
    return write_folder(folder, model.save_pretrained, processor.save_pretrained)


def write_folder(folder: Path, *writers: Callable[[Path], object]) -> Path:
    """Let `writers` fill a temporary folder and put it in the place of `folder`.

    Raises:
        ValueError: `folder` holds something else than a model.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} exists and holds no model (no config.json); name another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for write in writers:
            write(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def build_word_tokenizer(
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    bos_token: str = "<|endoftext|>",
    eos_token: str = "<|im_end|>",
    pad_token: str = "<|endoftext|>",
    **keywords: Any,
) -> PreTrainedTokenizerFast:
    """One token for each word and sign of the task; any other text becomes `<unk>`.

    Args:
        special_tokens: the first ids of the vocabulary; `<unk>` is among them.
        bos_token, eos_token, pad_token: which of them begins a text, ends a turn, and pads.
        keywords: more for the Hugging Face tokenizer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*special_tokens, *RESPONSE_TOKENS, *PROMPT_TOKENS, *QUESTION_TOKENS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    longest_first = sorted(tokens, key=len, reverse=True)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # The tokens are alternatives of one pattern: "35" is two tokens and "\\boxed{" one.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join(re.escape(token) for token in longest_first)), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()  # no space between tokens: decode(encode(x)) == x
    keywords.setdefault("extra_special_tokens", [t for t in special_tokens if t != "<unk>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token=pad_token,
        bos_token=bos_token,
        unk_token="<unk>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        **keywords,
    )


def build_qwen_processor(class_name: str, patch_size: int = 14) -> Any:
    """Tokenizer, image processor and chat template of a Qwen vision-language model.

    With patches of 14 pixels, one 28 x 28 tile is one visual token.

    Args:
        class_name: of the Hugging Face processor.
        patch_size: of the vision tower.
    """
    import transformers

    is_qwen3 = class_name == "Qwen3VLProcessor"
    video_class = (
        transformers.Qwen3VLVideoProcessor if is_qwen3 else transformers.Qwen2VLVideoProcessor
    )
    # vLLM profiles its start-up with an image of `longest_edge` pixels: kept small.
    pixels = (2 * patch_size) ** 2
    size = {"shortest_edge": pixels, "longest_edge": pixels * MAX_VISUAL_TOKENS}
    return getattr(transformers, class_name)(
        image_processor=transformers.Qwen2VLImageProcessor(
            size=dict(size),
            patch_size=patch_size,
            image_mean=[IMAGE_MEAN] * 3,
            image_std=[IMAGE_STD] * 3,
        ),
        tokenizer=build_word_tokenizer(),
        video_processor=video_class(size=dict(size), patch_size=patch_size),
        chat_template=CHAT_TEMPLATE,
    )


def token_id(special_token: str) -> int:
    """The id of a special token: special tokens come first in the vocabulary."""
    return SPECIAL_TOKENS.index(special_token)


def end_ids() -> dict[str, int]:
    """Qwen's convention: a turn ends in <|im_end|>, and <|endoftext|> pads."""
    padding = token_id("<|endoftext|>")
    return {
        "bos_token_id": padding,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": padding,
    }


def build_qwen2_5_vl_config(vocab_size: int, tie_word_embeddings: bool) -> Qwen2_5_VLConfig:
    """Sizes and ids above; float32."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            **TEXT_SIZES,
            **end_ids(),
            "vocab_size": vocab_size,
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.05,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": MROPE_SECTION,
            },
            "tie_word_embeddings": tie_word_embeddings,
            "dtype": "float32",
        },
        vision_config={
            **VISION_SIZES,
            "out_hidden_size": TEXT_SIZES["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.05,
            "dtype": "float32",
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tie_word_embeddings,
        dtype="float32",
    )

"""A model folder and an engine, as what answers questions.

Qwen-VL and text models take the way of training: data/processor.py makes tokens and pixels. Every
other vision-language model gets its chat-templated text and pictures through vLLM's own processing
(rollout/vllm_chat.py). No code of a model folder ever runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError

from megatron_mmr1.config.model_folder import has_vision
from megatron_mmr1.config.schema import EngineConfig, EvaluateConfig
from megatron_mmr1.data.images import decode_image, fit_pixels
from megatron_mmr1.data.processor import IMAGE_TAG, PromptProcessor, content_parts
from megatron_mmr1.evaluation.journal import Reply, Response
from megatron_mmr1.evaluation.prompts import prompt_text
from megatron_mmr1.evaluation.questions import Question, digest_of
from megatron_mmr1.rollout.engine import Sampling

# Of config.json; the engine takes their pixels as data/processor.py makes them.
_WITH_PIXELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_MIN_CACHE_BYTES = 256 << 20
_LONGEST_SEQUENCES = 8  # that a cache of unstated size holds


@dataclass(frozen=True, slots=True)
class Prepared:
    """A question in the form that a model's engine takes.

    Attributes:
        prompt: data.Prompt or rollout.ChatPrompt.
        num_bytes: of its pixels.
    """

    question_id: str
    digest: str
    prompt: Any
    num_bytes: int


class Model(Protocol):
    """What answers questions."""

    def prepare(self, question: Question) -> Prepared:
        """Make the model's input.

        Raises:
            ValueError: the question is not for this model, with the reason.
        """
        ...

    def answer(self, prepared: Sequence[Prepared], sampling: Sampling) -> Iterator[Reply]:
        """Yield one reply a question, as they finish."""
        ...


def open_model(folder: Path, config: EvaluateConfig) -> Model:
    """Load the processor and start the engine.

    Raises:
        ValueError: the model needs code of its own, has no chat template, or no room for a prompt.
    """
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type = content.get("model_type")
    _check_needs_no_code(content, config.model)
    if has_vision(folder, "model") and model_type not in _WITH_PIXELS:
        return _ChatModel(folder, config)
    return _PixelModel(folder, config)


class _PixelModel:
    """Tokens and pixels, as in training."""

    def __init__(self, folder: Path, config: EvaluateConfig) -> None:
        from megatron_mmr1.rollout.vllm_engine import VllmEngine

        self._processor = PromptProcessor(folder, config.min_pixels, config.max_pixels)
        self._max_tokens, engine = room_of(folder, config)
        self._max_images = engine.max_images_per_prompt
        banned = self._processor.banned_token_ids
        self._engine = VllmEngine(str(folder), config.dtype, engine, banned, self._max_tokens)

    def prepare(self, question: Question) -> Prepared:
        _check_images(question, self._max_images)
        prompt = self._processor.prompt(
            question.question_id, prompt_text(question), question.images, question.answer
        )
        if len(prompt.token_ids) > self._max_tokens:
            raise ValueError(_too_long(len(prompt.token_ids), self._max_tokens))
        num_bytes = 0 if prompt.pixel_values is None else prompt.pixel_values.nbytes
        return Prepared(question.question_id, digest_of(question), prompt, num_bytes)

    def answer(self, prepared: Sequence[Prepared], sampling: Sampling) -> Iterator[Reply]:
        digests = {item.question_id: item.digest for item in prepared}
        for group in self._engine.generate([item.prompt for item in prepared], sampling):
            responses = tuple(
                Response(r.text, len(r.token_ids), r.finish_reason == "length")
                for r in group.rollouts
            )
            question_id = group.prompt.prompt_id
            yield Reply(question_id, digests[question_id], responses)


class _ChatModel:
    """Text and pictures, by the model's own processor and chat template."""

    def __init__(self, folder: Path, config: EvaluateConfig) -> None:
        from transformers import AutoProcessor

        from megatron_mmr1.rollout.vllm_chat import VllmChatEngine

        auto_class: Any = AutoProcessor
        self._processor: Any = auto_class.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        if getattr(self._processor, "chat_template", None) is None:
            raise ValueError(
                f"model={config.model!r} has no chat template; copy chat_template.json or "
                "chat_template.jinja of the model there"
            )
        self._pixels = (config.min_pixels, config.max_pixels)
        max_tokens, engine = room_of(folder, config)
        self._max_images = engine.max_images_per_prompt
        self._engine = VllmChatEngine(str(folder), config.dtype, engine, (), max_tokens)

    def prepare(self, question: Question) -> Prepared:
        from megatron_mmr1.rollout.vllm_chat import ChatPrompt

        _check_images(question, self._max_images)
        text = prompt_text(question)
        if text.count(IMAGE_TAG) != len(question.images):
            num_tags = text.count(IMAGE_TAG)
            raise ValueError(f"{num_tags} {IMAGE_TAG} tags for {len(question.images)} images")
        placeholder = getattr(self._processor, "image_token", None)
        if placeholder and placeholder in text:
            raise ValueError(f"the text holds the image token {placeholder}")
        messages = [{"role": "user", "content": content_parts(text)}]
        try:
            text = self._processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        pictures = tuple(fit_pixels(decode_image(data), *self._pixels) for data in question.images)
        num_bytes = sum(3 * picture.width * picture.height for picture in pictures)
        prompt = ChatPrompt(question.question_id, text, pictures)
        return Prepared(question.question_id, digest_of(question), prompt, num_bytes)

    def answer(self, prepared: Sequence[Prepared], sampling: Sampling) -> Iterator[Reply]:
        digests = {item.question_id: item.digest for item in prepared}
        for answer in self._engine.chat([item.prompt for item in prepared], sampling):
            responses = tuple(
                Response(text, num_tokens, finish == "length")
                for text, num_tokens, finish in answer.responses
            )
            question_id = answer.prompt_id
            yield Reply(question_id, digests[question_id], responses, answer.refused)


def room_of(folder: Path, config: EvaluateConfig) -> tuple[int, EngineConfig]:
    """Return the longest prompt that the model has positions for, and the engine's settings.

    Raises:
        ValueError: no prompt fits beside a response, or no sequence fits into the cache.
    """
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    text: Any = whole.get_text_config()
    longest_response = config.rollout.max_response_tokens
    positions = int(getattr(text, "max_position_embeddings", 0)) or (1 << 31)
    max_tokens = min(config.max_prompt_tokens, positions - longest_response)
    if max_tokens < 1:
        raise ValueError(
            f"rollout.max_response_tokens={longest_response} leaves no room for a prompt in the "
            f"model's {positions} positions; use a smaller number"
        )
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = text.num_hidden_layers * heads * head_dim * 2
    token_bytes *= 4 if config.dtype == "float32" else 2
    needed = token_bytes * (max_tokens + longest_response)
    given = config.rollout.kv_cache_bytes
    if 0 < given < needed:
        raise ValueError(
            f"rollout.kv_cache_bytes={given} holds no sequence of {max_tokens} + "
            f"{longest_response} tokens, which takes {needed} bytes; raise it, use 0, or lower "
            "max_prompt_tokens"
        )
    cache = given or max(_LONGEST_SEQUENCES * needed, _MIN_CACHE_BYTES)
    settings = {**vars(config.rollout), "kv_cache_bytes": cache}
    return max_tokens, EngineConfig(**settings)


def identity_of(folder: Path) -> str:
    """Return what changes when a file of the model does: a hash of names, sizes and times."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        line = f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\0"
        digest.update(line.encode())
    return digest.hexdigest()[:16]


def _check_needs_no_code(content: dict[str, Any], model: str) -> None:
    from transformers import CONFIG_MAPPING

    if content.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"model={model!r} has model_type={content.get('model_type')!r}, which the installed "
            "transformers doesn't know; code of a model folder is never run: use the model's "
            "Hugging Face form (for InternVL, the folders whose names end in -hf)"
        )


def _check_images(question: Question, limit: int) -> None:
    if len(question.images) > limit:
        raise ValueError(
            f"{len(question.images)} images exceed rollout.max_images_per_prompt={limit}"
        )


def _too_long(length: int, limit: int) -> str:
    return f"{length} tokens exceed max_prompt_tokens={limit}"

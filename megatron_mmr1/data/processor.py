"""Question and images to the tokens and pixels that a model folder expects.

Owns the only call of the Hugging Face processor: its result, a `Prompt`, feeds rollout and training
alike. Uses the folder's own chat template. What differs between families stands in image_tokens.py
and tokenizer.py. Does not own rows and files (dataset.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from jinja2 import TemplateError
from PIL import Image

from megatron_mmr1.config.model_folder import check_processor_files, has_vision
from megatron_mmr1.data.image_tokens import ImageTokens, NoImages, image_tokens
from megatron_mmr1.data.images import MAX_IMAGE_PIXELS, decode_image, fit_pixels
from megatron_mmr1.data.tokenizer import has_sentencepiece_alone, text_encoder
from megatron_mmr1.types import Prompt

IMAGE_TAG = "<image>"


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        text: with `<image>` where an image belongs.
    """

    role: str
    text: str


class Measure(Protocol):
    """What checking a row asks of a model's processor; nothing here processes pixels."""

    def picture(self, data: bytes) -> Image.Image:
        """Decode an image, within the limits of its size."""
        ...

    def fit(self, picture: Image.Image) -> Image.Image:
        """Scale a decoded image into these limits."""
        ...

    def count_tokens(
        self, question: str, pictures: Sequence[Image.Image], history: Sequence[Turn] = ()
    ) -> int:
        """Count a prompt's tokens."""
        ...

    def count_patches(self, picture: Image.Image) -> int:
        """Count an image's patches."""
        ...

    def count_response_tokens(self, response: str) -> int:
        """Count a response's tokens, the end-of-turn token included."""
        ...


class PromptProcessor:
    """The tokenizer, chat template and image processor of one model folder.

    Attributes:
        tokenizer: the Hugging Face tokenizer. To encode text, call `encode`.
        image_token_id: the placeholder of one visual token; -1 for a model of text alone.
        spatial_merge_size: patches merged into a visual token along each side.
        banned_token_ids: sorted; image, video and vision marker tokens, which no response may hold:
            a sampled placeholder breaks the match of tokens and image features.
        end_of_turn_id: the token that ends a response.
    """

    def __init__(
        self,
        model_folder: str | Path,
        min_pixels: int = 0,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        """Load from local files; nothing is fetched and no code of the folder runs.

        Args:
            min_pixels, max_pixels: of an image, before the model's own processor rounds its sides.

        Raises:
            ValueError: the folder lacks a file, its config a key, or the image processor cuts
                images otherwise than the vision tower expects.
        """
        folder = Path(model_folder)
        check_processor_files(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        from transformers import AutoProcessor, AutoTokenizer

        is_multimodal = has_vision(folder)
        if is_multimodal and has_sentencepiece_alone(folder):
            raise ValueError(
                f"{folder} has images and tokenizer.model alone, which the Hugging Face processor "
                "does not encode as sentencepiece does; copy tokenizer.json of the model there"
            )
        auto_class: Any = AutoProcessor if is_multimodal else AutoTokenizer
        self._processor: Any = auto_class.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        if self._processor.chat_template is None:
            raise ValueError(
                f"{folder} has no chat template; copy chat_template.json or chat_template.jinja "
                "of the model there"
            )
        self._images: ImageTokens = (
            image_tokens(folder, config, self._processor)
            if is_multimodal
            else NoImages(config.get("model_type", ""))
        )
        self.tokenizer: Any = self._processor.tokenizer if is_multimodal else self._processor
        self.image_token_id: int = self._images.image_token_id
        self.spatial_merge_size: int = self._images.spatial_merge_size
        self.banned_token_ids: tuple[int, ...] = self._images.banned_token_ids
        self.end_of_turn_id: int = self.tokenizer.eos_token_id
        self._banned_texts = [str(self.tokenizer.decode([i])) for i in self.banned_token_ids]
        self._encode = text_encoder(folder, self.tokenizer)
        self._min_pixels, self._max_pixels = min_pixels, max_pixels
        self._folder = folder

    @property
    def identity(self) -> str:
        """A hash of all that prompts depend on: the folder's files without weights, and limits."""
        digest = hashlib.sha256(f"{self._min_pixels}/{self._max_pixels}".encode())
        for path in sorted(self._folder.iterdir()):
            if path.suffix in (".json", ".jinja", ".txt", ".model"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    def prompt(
        self,
        prompt_id: str,
        question: str,
        images: Sequence[bytes] = (),
        answer: str = "",
        category: str = "",
        history: Sequence[Turn] = (),
    ) -> Prompt:
        """Make the model's input of one question.

        Args:
            prompt_id: unique in its data set.
            question: text with one `<image>` for each image, where the image belongs.
            images: encoded PNG or JPEG files, in the order of their tags.
            answer: the gold answer.
            category: the data set's name for this kind of question.
            history: turns before the question, which may have images of their own.

        Raises:
            ValueError: tags and images differ in number, or an image is refused.
        """
        text = self.render(question, len(images), history)
        if images:
            pictures = [self.picture(data) for data in images]
            # The template has the beginning-of-text token, where a model has one.
            inputs = self._processor(
                text=[text], images=pictures, add_special_tokens=False, return_tensors="pt"
            )
            token_ids = inputs["input_ids"][0]
            pixel_values, image_grid_thw = inputs["pixel_values"].float(), self._images.grid(inputs)
        else:
            token_ids = torch.tensor(self._encode(text), dtype=torch.int64)
            pixel_values = image_grid_thw = None
        return Prompt(
            prompt_id=prompt_id,
            token_ids=token_ids,
            position_ids=self._images.positions(token_ids, image_grid_thw),
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            answer=answer,
            category=category,
            question=question,
            images=tuple(images),
        )

    def picture(self, data: bytes) -> Image.Image:
        """Decode an image, within the limits of its size.

        Raises:
            ValueError: see `decode_image`.
        """
        return self.fit(decode_image(data))

    def fit(self, picture: Image.Image) -> Image.Image:
        """Scale a decoded image into the limits of its size."""
        return fit_pixels(picture, self._min_pixels, self._max_pixels)

    def render(self, question: str, num_images: int, history: Sequence[Turn] = ()) -> str:
        """Apply the chat template; each image is still one placeholder.

        Raises:
            ValueError: the number of `<image>` tags is not `num_images`, the model takes none, a
                turn holds one of its vision tokens as text, or the template refuses the turns.
        """
        turns = [*history, Turn("user", question)]
        require_tags(turns, num_images)
        for token in self._banned_texts:
            if any(token in turn.text for turn in turns):
                raise ValueError(f"the text holds the vision token {token}")
        is_blind = isinstance(self._images, NoImages)
        if isinstance(self._images, NoImages) and num_images:
            raise self._images.refusal()
        messages = [
            {"role": turn.role, "content": turn.text if is_blind else content_parts(turn.text)}
            for turn in turns
        ]
        try:
            return self._processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:  # such as a system turn that a model doesn't take
            raise ValueError(f"the chat template refuses it: {error}") from error

    def count_tokens(
        self, question: str, pictures: Sequence[Image.Image], history: Sequence[Turn] = ()
    ) -> int:
        """The length that `prompt` would have, without processing pixels.

        Raises:
            ValueError: tags and images differ in number, or the text holds a vision token or one
                that the tokenizer doesn't know.
        """
        token_ids = self.encode(self.render(question, len(pictures), history))
        num_visual_tokens = sum(self._images.count(picture)[0] for picture in pictures)
        return len(token_ids) - len(pictures) + num_visual_tokens

    def count_patches(self, picture: Image.Image) -> int:
        """The patches that an image will be cut into, without processing pixels."""
        return self._images.count(picture)[1]

    def encode(self, text: str) -> list[int]:
        """Token ids of text as it stands, nothing added.

        Raises:
            ValueError: the tokenizer has no token for a part of the text.
        """
        token_ids = self._encode(text)
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in token_ids:
            raise ValueError("the tokenizer has no token for a part of the text")
        return token_ids

    def response_token_ids(self, response: str) -> torch.Tensor:
        """Token ids of a response to imitate, int64 [R], ending in the end-of-turn token.

        Raises:
            ValueError: the response holds a banned or an unknown token.
        """
        token_ids = self.encode(response)
        banned = set(self.banned_token_ids) & set(token_ids)
        if banned:
            raise ValueError(f"the response holds the vision tokens {sorted(banned)}")
        return torch.tensor([*token_ids, self.end_of_turn_id])

    def count_response_tokens(self, response: str) -> int:
        """The length of `response_token_ids`; raises as that does."""
        return len(self.response_token_ids(response))


def require_tags(turns: Sequence[Turn], num_images: int) -> None:
    """Refuse turns that have not one `<image>` for each image."""
    num_tags = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    if num_tags != num_images:
        raise ValueError(f"{num_tags} {IMAGE_TAG} tags for {num_images} images")


def content_parts(text: str) -> list[dict[str, str]]:
    """Cut a turn at its `<image>` tags, for a chat template."""
    first, *others = text.split(IMAGE_TAG)
    parts = [{"type": "text", "text": first}] if first else []
    for after in others:
        parts.append({"type": "image"})
        if after:
            parts.append({"type": "text", "text": after})
    return parts

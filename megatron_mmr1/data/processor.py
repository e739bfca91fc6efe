"""Question and images to the tokens and pixels that a model folder expects.

Owns the only call of the Hugging Face processor: its result, a `Prompt`, feeds rollout and training
alike. Uses the folder's own chat template. Does not own rows and files (dataset.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_mmr1.config.model_folder import check_processor_files
from megatron_mmr1.data.image_inputs import image_inputs_of
from megatron_mmr1.data.images import decode_image
from megatron_mmr1.types import Prompt

IMAGE_TAG = "<image>"


class PromptProcessor:
    """The tokenizer, chat template and image processor of one model folder.

    Attributes:
        tokenizer: the Hugging Face tokenizer.
        image_token_id: the placeholder of one visual token; -1 for a text model.
        spatial_merge_size: patches merged into a visual token along each side.
        banned_token_ids: sorted; image, video and vision marker tokens, which no response may hold:
            a sampled placeholder breaks the match of tokens and image features.
        end_of_turn_id: the token that ends a response.
    """

    def __init__(self, model_folder: str | Path) -> None:
        """Load from local files; nothing is fetched and no code of the folder runs.

        Raises:
            ValueError: the folder lacks a file, its config a key, or the image processor cuts
                images otherwise than the vision tower expects.
        """
        folder = Path(model_folder)
        check_processor_files(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        from transformers import AutoProcessor, AutoTokenizer

        auto: Any = AutoProcessor if config.get("vision_config") else AutoTokenizer
        self._processor: Any = auto.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        if self._processor.chat_template is None:
            raise ValueError(
                f"{folder} has no chat template; copy chat_template.json or chat_template.jinja "
                "of the model there"
            )
        self._images = image_inputs_of(folder, config, self._processor)
        self.tokenizer: Any = getattr(self._processor, "tokenizer", self._processor)
        self.image_token_id = self._images.image_token_id
        self.spatial_merge_size = self._images.spatial_merge_size
        self.banned_token_ids = self._images.banned_token_ids
        self.end_of_turn_id: int = self.tokenizer.eos_token_id

    def prompt(
        self,
        prompt_id: str,
        question: str,
        images: Sequence[bytes] = (),
        answer: str = "",
        category: str = "",
    ) -> Prompt:
        """Make the model's input of one question.

        Args:
            prompt_id: unique in its data set.
            question: text with one `<image>` for each image, where the image belongs.
            images: encoded PNG or JPEG files, in the order of their tags.
            answer: the gold answer.
            category: the data set's name for this kind of question.

        Raises:
            ValueError: tags and images differ in number, or an image is refused.
        """
        text = self.render(question, len(images))
        pictures = [decode_image(data) for data in images]
        token_ids, pixel_values, image_grid_thw = self._images.process(text, pictures)
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

    def render(self, question: str, num_images: int) -> str:
        """Apply the chat template to one user turn; each image is still one placeholder.

        Raises:
            ValueError: the number of `<image>` tags is not `num_images`.
        """
        texts = question.split(IMAGE_TAG)
        if len(texts) - 1 != num_images:
            raise ValueError(f"{len(texts) - 1} {IMAGE_TAG} tags for {num_images} images")
        content = [{"type": "text", "text": texts[0]}] if texts[0] else []
        for text in texts[1:]:
            content.append({"type": "image"})
            if text:
                content.append({"type": "text", "text": text})
        # Text models' templates know no parts.
        has_parts = self.image_token_id >= 0
        return self._processor.apply_chat_template(
            [{"role": "user", "content": content if has_parts else question}],
            tokenize=False,
            add_generation_prompt=True,
        )

    def count_tokens(self, question: str, pictures: Sequence[Image.Image]) -> int:
        """The length that `prompt` would have, without processing pixels.

        Raises:
            ValueError: tags and images differ in number, or the text holds special vision tokens.
        """
        token_ids = self.encode(self.render(question, len(pictures)))
        num_placeholders = token_ids.count(self.image_token_id)
        if num_placeholders != len(pictures):
            raise ValueError(f"{num_placeholders} image placeholders for {len(pictures)} images")
        num_visual_tokens = sum(self._images.num_tokens(picture) for picture in pictures)
        return len(token_ids) - num_placeholders + num_visual_tokens

    def count_patches(self, picture: Image.Image) -> int:
        """The patches that an image will be cut into, without processing pixels."""
        return self._images.num_patches(picture)

    def encode(self, text: str) -> list[int]:
        """Token ids of text as it stands, nothing added.

        Raises:
            ValueError: the tokenizer has no token for a part of the text.
        """
        token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
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

"""What an image becomes in the token sequence, family by family.

Owns the ids that stand for images, how many tokens and patches an image takes, the sizes that
config and processor must share, and the positions. Does not call the processor (processor.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from megatron_mmr1.data.mrope import mrope_positions

_QWEN_TOKEN_KEYS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)
_INTERNVL_TOKENS = ("start_image_token_id", "end_image_token_id", "video_token_id")


class ImageTokens(Protocol):
    """How one family counts, marks and places the tokens of images.

    Attributes:
        image_token_id: the placeholder of one visual token.
        spatial_merge_size: patches merged into a visual token along each side.
        banned_token_ids: sorted; what no response may hold.
    """

    image_token_id: int
    spatial_merge_size: int
    banned_token_ids: tuple[int, ...]

    def count(self, picture: Image.Image) -> tuple[int, int]:
        """The tokens that take an image's one placeholder's place, and its patches."""
        ...

    def grid(self, inputs: Any) -> Tensor:
        """`Prompt.image_grid_thw` of what the processor returned."""
        ...

    def positions(self, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """`Prompt.position_ids`, int64 [3, S].

        Raises:
            ValueError: the placeholders are not exactly those of the images.
        """
        ...


class QwenImages:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches of the whole image, multimodal positions."""

    def __init__(self, folder: Path, config: dict[str, Any], processor: Any) -> None:
        vision, image_processor = config["vision_config"], processor.image_processor
        patch_size = vision.get("patch_size", 16 if config["model_type"] == "qwen3_vl" else 14)
        self.spatial_merge_size: int = vision.get("spatial_merge_size", 2)
        temporal = vision.get("temporal_patch_size", 2)
        _check_same(folder, "patch_size", image_processor.patch_size, patch_size)
        _check_same(folder, "temporal_patch_size", image_processor.temporal_patch_size, temporal)
        _check_same(
            folder,
            "merge_size",
            image_processor.merge_size,
            self.spatial_merge_size,
            "spatial_merge_size",
        )
        self.image_token_id: int = config["image_token_id"]
        self.banned_token_ids = tuple(
            sorted(config[key] for key in _QWEN_TOKEN_KEYS if key in config)
        )
        self._image_processor = image_processor

    def count(self, picture: Image.Image) -> tuple[int, int]:
        """See ImageTokens."""
        patches = self._image_processor.get_number_of_image_patches(picture.height, picture.width)
        return patches // self.spatial_merge_size**2, patches

    def grid(self, inputs: Any) -> Tensor:
        """See ImageTokens: one row an image."""
        return inputs["image_grid_thw"]

    def positions(self, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """See ImageTokens and mrope.py."""
        return mrope_positions(
            token_ids, image_grid_thw, self.image_token_id, self.spatial_merge_size
        )


class InternVLImages:
    """InternVL: an image becomes tiles of one size, each of them a small image of its own.

    Hugging Face's processor cuts into tiles whatever the folder's `crop_to_patches` says; how many
    at most, the folder's `max_patches` says. The same is counted here.
    """

    def __init__(self, folder: Path, config: dict[str, Any], processor: Any) -> None:
        vision = config["vision_config"]
        tile_hw = _pair(vision.get("image_size", 448))
        patch_hw = _pair(vision.get("patch_size", 14))
        size = processor.image_processor.size
        _check_same(folder, "size", [size["height"], size["width"]], tile_hw, "image_size")
        self.spatial_merge_size: int = round(1 / config.get("downsample_ratio", 0.5))
        self._tile_grid = [1, tile_hw[0] // patch_hw[0], tile_hw[1] // patch_hw[1]]
        patches = self._tile_grid[1] * self._tile_grid[2]
        expected = patches // self.spatial_merge_size**2
        if processor.image_seq_length != expected:
            raise ValueError(
                f"{folder}: the processor has image_seq_length={processor.image_seq_length}, but "
                f"the sizes in config.json make {expected} tokens of a tile; "
                "copy the processor files of the same model"
            )
        self.image_token_id: int = config["image_token_id"]
        ids = {self.image_token_id}
        ids |= {getattr(processor.tokenizer, name) for name in _INTERNVL_TOKENS}
        self.banned_token_ids = tuple(sorted(ids))
        self._processor = processor

    def count(self, picture: Image.Image) -> tuple[int, int]:
        """See ImageTokens; the marks before and after an image count as its tokens."""
        # Not the image processor's own count: that one heeds `crop_to_patches`.
        sizes = self._processor._get_num_multimodal_tokens([(picture.height, picture.width)])
        tiles = sizes["num_image_patches"][0]
        return sizes["num_image_tokens"][0], tiles * self._tile_grid[1] * self._tile_grid[2]

    def grid(self, inputs: Any) -> Tensor:
        """See ImageTokens: one row a tile."""
        return torch.tensor([self._tile_grid]).repeat(len(inputs["pixel_values"]), 1)

    def positions(self, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """See ImageTokens; an image's tokens are placed like text."""
        tiles = 0 if image_grid_thw is None else len(image_grid_thw)
        expected = tiles * self._processor.image_seq_length
        found = int((token_ids == self.image_token_id).sum())
        if found != expected:
            raise ValueError(
                f"{found} image tokens, but the images need {expected}; take image tokens out of "
                "the text"
            )
        return text_positions(len(token_ids))


class NoImages:
    """A model of text alone."""

    image_token_id = -1
    spatial_merge_size = 1
    banned_token_ids: tuple[int, ...] = ()

    def __init__(self, model_type: str) -> None:
        self._model_type = model_type

    def count(self, picture: Image.Image) -> tuple[int, int]:
        """Refuse the image.

        Raises:
            ValueError: always.
        """
        raise self.refusal()

    def grid(self, inputs: Any) -> Tensor:
        """Refuse the image.

        Raises:
            ValueError: always.
        """
        raise self.refusal()

    def positions(self, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """See ImageTokens."""
        return text_positions(len(token_ids))

    def refusal(self) -> ValueError:
        """Say that the model takes no images."""
        return ValueError(
            f"model_type={self._model_type!r} takes no images; drop the row or train a "
            "vision-language model"
        )


_MULTIMODAL: dict[str, type[QwenImages] | type[InternVLImages]] = {
    "qwen2_vl": QwenImages,
    "qwen2_5_vl": QwenImages,
    "qwen3_vl": QwenImages,
    "internvl": InternVLImages,
}


def image_tokens(folder: Path, config: dict[str, Any], processor: Any) -> ImageTokens:
    """Choose by `model_type` of a vision-language model's config.json.

    Raises:
        ValueError: an unknown family, a missing key, or a processor of other sizes than the config.
    """
    model_type = config.get("model_type")
    if model_type not in _MULTIMODAL:
        raise ValueError(
            f"{folder / 'config.json'} has model_type={model_type!r}, whose images we do not know; "
            f"use one of {', '.join(_MULTIMODAL)}, or a model of text alone"
        )
    if "image_token_id" not in config:
        raise ValueError(
            f"{folder / 'config.json'} has no image_token_id; "
            "copy config.json of the original model"
        )
    return _MULTIMODAL[model_type](folder, config, processor)


def text_positions(length: int) -> Tensor:
    """Positions 0 to `length` - 1, alike on all three axes: int64 [3, S]."""
    return torch.arange(length).repeat(3, 1)


def _pair(size: int | list[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _check_same(folder: Path, name: str, found: Any, expected: Any, key: str = "") -> None:
    """Refuse an image processor of another model: its image tokens would not match their grid."""
    if found != expected:
        raise ValueError(
            f"{folder}: the image processor has {name}={found}, but vision_config.{key or name}="
            f"{expected} in config.json; copy the processor files of the same model"
        )

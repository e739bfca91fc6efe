"""How a model family takes images: pixels, placeholders in the text, positions.

One small class a kind, chosen by `image_inputs_of`. Each wraps the folder's own Hugging Face
processor and owns what it can't say without processing pixels. Images only: no video.

S is the sequence length, I the number of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from megatron_mmr1.data.mrope import mrope_positions

_VISION_TOKEN_KEYS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)


class ImageInputs(Protocol):
    """What prompts need to know of a family.

    Attributes:
        image_token_id: the placeholder of one visual token; -1 for a text model.
        spatial_merge_size: patches merged into a visual token along each side.
        banned_token_ids: sorted; markers of images and video, which no response may hold.
    """

    image_token_id: int
    spatial_merge_size: int
    banned_token_ids: tuple[int, ...]

    def process(
        self, text: str, pictures: Sequence[Image.Image]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return token ids [S], and pixels and their grid of patches, [I, 3], if there are any."""
        ...

    def positions(self, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """Return rotary positions (time, height, width), int64 [3, S]."""
        ...

    def num_patches(self, picture: Image.Image) -> int:
        """Count the patches that an image will be cut into."""
        ...

    def num_tokens(self, picture: Image.Image) -> int:
        """Count the tokens that will take the place of an image's one placeholder."""
        ...


def image_inputs_of(folder: Path, config: dict[str, Any], processor: Any) -> ImageInputs:
    """Choose by what config.json says.

    Args:
        processor: the folder's Hugging Face processor; of a text model its tokenizer.

    Raises:
        ValueError: the image processor cuts images otherwise than the vision tower expects.
    """
    if not config.get("vision_config"):
        return NoImages(config.get("model_type", ""), processor)
    if "image_token_id" not in config:
        raise ValueError(
            f"{folder / 'config.json'} has a vision_config and no image_token_id; copy it from the "
            "model, in transformers' own format"
        )
    if "downsample_ratio" in config:
        return TiledImages(config, processor)
    _check_same_sizes(folder, config["vision_config"], processor.image_processor)
    return PatchedImages(config, processor)


class NoImages:
    """A text model: no images, and positions that count."""

    def __init__(self, model_type: str, tokenizer: Any) -> None:
        self._model_type, self._tokenizer = model_type, tokenizer
        self.image_token_id = -1
        self.spatial_merge_size = 1
        self.banned_token_ids: tuple[int, ...] = ()

    def process(
        self, text: str, pictures: Sequence[Image.Image]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See ImageInputs.

        Raises:
            ValueError: there are images.
        """
        self._refuse(len(pictures))
        # The template has the tokens that start a sequence.
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(token_ids, dtype=torch.long), None, None

    def positions(self, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """See ImageInputs."""
        return _counted(token_ids)

    def num_patches(self, picture: Image.Image) -> int:
        """See ImageInputs."""
        self._refuse(1)
        return 0

    def num_tokens(self, picture: Image.Image) -> int:
        """See ImageInputs."""
        return self.num_patches(picture)

    def _refuse(self, num_images: int) -> None:
        if num_images:
            raise ValueError(
                f"{num_images} images for a text model (model_type={self._model_type!r}); use a "
                "vision-language model, or rows without images"
            )


class PatchedImages:
    """Qwen-VL: patches of an image at its own size, merged, with positions on three axes."""

    def __init__(self, config: dict[str, Any], processor: Any) -> None:
        self._processor = processor
        self.image_token_id: int = config["image_token_id"]
        self.spatial_merge_size: int = config["vision_config"].get("spatial_merge_size", 2)
        self.banned_token_ids = tuple(
            sorted(config[key] for key in _VISION_TOKEN_KEYS if config.get(key) is not None)
        )

    def process(
        self, text: str, pictures: Sequence[Image.Image]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See ImageInputs; pixels are float32 [patches, values]."""
        inputs = self._processor(text=[text], images=list(pictures) or None, return_tensors="pt")
        if not pictures:
            return inputs["input_ids"][0], None, None
        return inputs["input_ids"][0], inputs["pixel_values"].float(), inputs["image_grid_thw"]

    def positions(self, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """See ImageInputs."""
        return mrope_positions(
            token_ids, image_grid_thw, self.image_token_id, self.spatial_merge_size
        )

    def num_patches(self, picture: Image.Image) -> int:
        """See ImageInputs."""
        image_processor = self._processor.image_processor
        return image_processor.get_number_of_image_patches(picture.height, picture.width)

    def num_tokens(self, picture: Image.Image) -> int:
        """See ImageInputs."""
        return self.num_patches(picture) // self.spatial_merge_size**2


class TiledImages:
    """InternVL: tiles of one size. Each counts as an image of its own in the grid of patches."""

    def __init__(self, config: dict[str, Any], processor: Any) -> None:
        vision = config["vision_config"]
        height, width = vision.get("image_size", (448, 448))
        patch_height, patch_width = vision.get("patch_size", (14, 14))
        self._processor = processor
        self._tile_grid = [1, height // patch_height, width // patch_width]
        self.image_token_id: int = config["image_token_id"]
        self.spatial_merge_size = round(1 / config["downsample_ratio"])
        self.banned_token_ids = tuple(sorted({self.image_token_id, *processor.image_token_ids}))

    def process(
        self, text: str, pictures: Sequence[Image.Image]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See ImageInputs; pixels are float32 [tiles, 3, height, width], the grid [tiles, 3]."""
        inputs = self._processor(text=[text], images=list(pictures) or None, return_tensors="pt")
        if not pictures:
            return inputs["input_ids"][0], None, None
        pixels = inputs["pixel_values"].float()
        return inputs["input_ids"][0], pixels, torch.tensor([self._tile_grid] * len(pixels))

    def positions(self, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """See ImageInputs."""
        return _counted(token_ids)

    def num_patches(self, picture: Image.Image) -> int:
        """See ImageInputs."""
        _, rows, columns = self._tile_grid
        return rows * columns * self._sizes(picture)["num_image_patches"][0]

    def num_tokens(self, picture: Image.Image) -> int:
        """See ImageInputs; a marker before and one after the image are among them."""
        return self._sizes(picture)["num_image_tokens"][0]

    def _sizes(self, picture: Image.Image) -> Any:
        # What vLLM asks too; its "patches" are tiles.
        return self._processor._get_num_multimodal_tokens([(picture.height, picture.width)])


def _counted(token_ids: Tensor) -> Tensor:
    return torch.arange(len(token_ids)).expand(3, -1)


def _check_same_sizes(folder: Path, vision_config: dict[str, Any], image_processor: Any) -> None:
    """Refuse an image processor of another model: its image tokens would not match their grid."""
    defaults = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    for key, default in defaults.items():
        name = "merge_size" if key == "spatial_merge_size" else key
        expected, found = vision_config.get(key, default), getattr(image_processor, name)
        if found != expected:
            raise ValueError(
                f"{folder}: the image processor has {name}={found}, but vision_config.{key}="
                f"{expected} in config.json; copy the processor files of the same model"
            )

"""Vision towers: Hugging Face's modules, one way to build them and one to call them.

M visual tokens, D hidden of the decoder, K layers of the decoder that take features of their own
(deepstack: Qwen3-VL).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.internvl.modeling_internvl import (
    InternVLModel,
    InternVLMultiModalProjector,
    InternVLVisionModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

_QWEN: dict[str, Any] = {
    "qwen2_vl": Qwen2VisionTransformerPretrainedModel,
    "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel,
    "qwen3_vl": Qwen3VLVisionModel,
}


def build_tower(hf_config: Any) -> torch.nn.Module:
    """Build the tower of a vision-language model, uninitialised, to be called by `encode`."""
    vision = hf_config.vision_config
    vision._attn_implementation = "sdpa"
    if hf_config.model_type == "internvl":
        return _InternVLTower(hf_config).eval()
    return _QWEN[hf_config.model_type](vision).eval()  # no dropout


def num_deepstack_layers(hf_config: Any) -> int:
    """Return K: how many of the decoder's first layers take features, after them."""
    vision = getattr(hf_config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def encode(tower: Any, pixels: Tensor, grid_thw: Tensor) -> Tensor:
    """Return the features, [M, (1 + K) D]: those for the embedding, then those for each layer."""
    if isinstance(tower, _InternVLTower):
        return tower(pixels)
    output = tower(pixels, grid_thw=grid_thw)
    return torch.cat([output.pooler_output, *(getattr(output, "deepstack_features", ()))], dim=-1)


class _InternVLTower(torch.nn.Module):
    """Transformers' InternVL up to its decoder: tower, pixel shuffle, projector."""

    def __init__(self, hf_config: Any) -> None:
        super().__init__()
        if hf_config.vision_feature_layer != -1:
            raise ValueError(
                f"config.json: vision_feature_layer={hf_config.vision_feature_layer} is not "
                "supported; use a model with -1, the tower's last layer"
            )
        self.vision_tower = InternVLVisionModel(hf_config.vision_config)
        self.multi_modal_projector = InternVLMultiModalProjector(hf_config)
        self._drops_first = hf_config.vision_feature_select_strategy == "default"
        self._scale = hf_config.downsample_ratio
        self._shuffle: Any = InternVLModel.pixel_shuffle

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features [M, D] of tiles [N, 3, H, W], all of one size."""
        hidden: Tensor = self.vision_tower(pixel_values=pixels).last_hidden_state
        if self._drops_first:
            hidden = hidden[:, 1:]
        side = int(hidden.shape[1] ** 0.5)
        square = hidden.reshape(len(hidden), side, side, -1)
        shuffled = self._shuffle(self, square, scale_factor=self._scale)
        return self.multi_modal_projector(shuffled.flatten(1, 2)).flatten(0, 1)

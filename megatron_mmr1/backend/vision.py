"""The visual features of one step: every prompt's images encoded once, whatever the packing.

The responses of a prompt may fall into different micro-batches. All of them take the same features;
with a trained tower the gradients that they send back add up and go through the tower once, after
the last micro-batch.

M visual tokens of the step, D hidden (times the places that take features: towers.encode).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.backend.towers import encode
from megatron_mmr1.types import PromptImages

CHUNK_PATCHES = 8192


class StepFeatures:
    """Features of a step's images, and the way back for their gradients.

    Args:
        tower: see backend/towers.py.
        images: of each prompt, encoded in chunks of at most `CHUNK_PATCHES` (of one prompt at
            least).
        trains: keep what the backward pass needs.
        recomputes: encode again in the backward pass, a chunk at a time, in place of keeping the
            tower's activations for the whole step.

    Attributes:
        features_MD: a leaf of the micro-batches' graphs; None without images.

    Parallelism: every tensor- and context-parallel rank of the first stage encodes the same images.
    """

    def __init__(
        self,
        tower: Any,
        images: Sequence[PromptImages],
        *,
        trains: bool,
        recomputes: bool,
    ) -> None:
        self._tower = tower
        self._chunks = _chunks(images, CHUNK_PATCHES)
        self._keeps_graph = trains and not recomputes
        self._encoded = []
        for chunk in self._chunks:
            with torch.set_grad_enabled(self._keeps_graph):
                self._encoded.append(self._encode(chunk))
        self._sizes = [len(part) for part in self._encoded]
        self.features_MD: Tensor | None = None
        if self._encoded:
            self.features_MD = torch.cat([part.detach() for part in self._encoded])
            self.features_MD.requires_grad_(trains)
        if not self._keeps_graph:
            self._encoded = []

    def backward(self) -> None:
        """Send the accumulated gradient through the tower."""
        if self.features_MD is None or self.features_MD.grad is None:
            return
        for index, gradient in enumerate(self.features_MD.grad.split(self._sizes)):
            encoded = (
                self._encoded[index] if self._keeps_graph else self._encode(self._chunks[index])
            )
            encoded.backward(gradient)
        self._encoded = []

    def _encode(self, chunk: Sequence[PromptImages]) -> Tensor:
        pixels = torch.cat([images.pixel_values for images in chunk]).to(device.device())
        grid = torch.cat([images.image_grid_thw for images in chunk]).to(device.device())
        dtype = next(self._tower.parameters()).dtype
        return encode(self._tower, pixels.to(dtype), grid)


def _chunks(images: Sequence[PromptImages], max_patches: int) -> list[list[PromptImages]]:
    chunks: list[list[PromptImages]] = []
    num_patches = 0
    for prompt in images:
        more = int(prompt.image_grid_thw.prod(-1).sum())
        if not chunks or num_patches + more > max_patches:
            chunks.append([])
            num_patches = 0
        chunks[-1].append(prompt)
        num_patches += more
    return chunks

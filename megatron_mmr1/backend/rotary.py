"""Multimodal rotary frequencies of exactly the tokens that this rank holds (arXiv:2409.12191, 2.1).

Megatron-Core's module slices a packed batch for context parallelism as if it were one sequence.
Ours gets positions that are cut already (backend/layout.py) and computes each token's frequencies
from its own position: what is packed beside it and which rank holds it make no difference.

T tokens of this rank, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class MultimodalRotary(torch.nn.Module):
    """Frequencies from (time, height, width) positions; takes the place of GPTModel's module."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self._head_dim = head_dim
        self._base = base

    def forward(
        self, position_ids_31T: Tensor, mrope_section: Sequence[int], cp_group: Any = None
    ) -> Tensor:
        """Return float32 [T, 1, E]: each position times the inverse wavelengths.

        Args:
            position_ids_31T: int64.
            mrope_section: how many of the E / 2 wavelengths turn with time, height and width.
        """
        exponent = torch.arange(0, self._head_dim, 2, device=position_ids_31T.device).float()
        inverse_wavelength = 1.0 / self._base ** (exponent / self._head_dim)
        frequencies_3TE = position_ids_31T[:, 0, :, None].float() * inverse_wavelength
        sections = frequencies_3TE.split(list(mrope_section), dim=-1)
        half_TE = torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)
        return torch.cat([half_TE, half_TE], dim=-1).unsqueeze(1)

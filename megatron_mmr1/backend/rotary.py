"""Rotary frequencies of exactly the tokens that this rank holds (arXiv:2104.09864; with positions
on three axes arXiv:2409.12191, 2.1).

Megatron-Core's modules slice a packed batch for context parallelism as if it were one sequence.
Ours gets positions that are cut already (backend/layout.py) and computes each token's frequencies
from its own position: what is packed beside it and which rank holds it make no difference.

T tokens of this rank, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Rotary(torch.nn.Module):
    """Frequencies from (time, height, width) positions; takes the place of GPTModel's module.

    Args:
        text_config: Hugging Face's; its `rope_parameters` name the kind of wavelengths.
        interleaved: the wavelengths turn with time, height and width in turn, and those that are
            left with time (Qwen3-VL), instead of in three sections.

    Attributes:
        axis_E2: which of the three axes each wavelength turns with.

    Raises:
        ValueError: wavelengths of another kind than default, dynamic, linear or llama3.
    """

    def __init__(self, text_config: Any, interleaved: bool) -> None:
        super().__init__()
        inverse = _inverse_wavelengths(text_config)
        sections = text_config.rope_parameters.get("mrope_section") or [len(inverse), 0, 0]
        self._inverse_wavelength_E2 = inverse
        self.axis_E2 = _axes(sections, len(inverse), interleaved)

    def forward(
        self, position_ids_31T: Tensor, mrope_section: Sequence[int], cp_group: Any = None
    ) -> Tensor:
        """Return float32 [T, 1, E]: each position times the inverse wavelengths.

        Args:
            position_ids_31T: int64.
            mrope_section: Megatron's own copy of it, not used.
        """
        positions_3T = position_ids_31T[:, 0].float()
        target = positions_3T.device
        half_TE = positions_3T[self.axis_E2.to(target)].T * self._inverse_wavelength_E2.to(target)
        return torch.cat([half_TE, half_TE], dim=-1).unsqueeze(1)


def max_positions(text_config: Any) -> int | None:
    """Return how many positions there may be; None if the wavelengths never change.

    Dynamic ones (InternVL's decoders) are the default ones up to `max_position_embeddings`.
    """
    is_dynamic = text_config.rope_parameters.get("rope_type") == "dynamic"
    return text_config.max_position_embeddings if is_dynamic else None


def _inverse_wavelengths(text_config: Any) -> Tensor:
    """Return float32 [E / 2]."""
    parameters = text_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "dynamic", "linear", "llama3"):
        raise ValueError(
            f"config.json: rope_parameters.rope_type={kind!r} is not supported; "
            "use a model with default, dynamic, linear or llama3"
        )
    if kind in ("linear", "llama3"):
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        with torch.device("cpu"):
            return ROPE_INIT_FUNCTIONS[kind](text_config, torch.device("cpu"))[0]
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    exponent = torch.arange(0, head_dim, 2, device="cpu").float()
    return 1.0 / parameters["rope_theta"] ** (exponent / head_dim)


def _axes(sections: Sequence[int], num_wavelengths: int, interleaved: bool) -> Tensor:
    """Return which axis each wavelength turns with, int64 [E / 2]."""
    if not interleaved:
        return torch.arange(3, device="cpu").repeat_interleave(torch.tensor(sections, device="cpu"))
    axes = torch.zeros(num_wavelengths, dtype=torch.long, device="cpu")
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes

"""FP8 on any machine, slowly: for the study in examples/fp8, not for training.

The inputs of the decoder's linear layers' matrix products are rounded as Transformer Engine's
recipes round them: E4M3 for activations and weights, E5M2 (format "hybrid") or E4M3 for the
gradients of outputs. The products themselves are float32 sums of the rounded values, as a tensor
core's are but for the order and width of its sums. Everything else stays in the model's dtype:
norms, attention, embedding, vision tower and output layer, as on a GPU.

Not emulated: the all-reduce of the largest values over ranks (one process only), and experts.

M tokens, K inputs, N outputs of a layer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_mmr1.backend import parallel

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BLOCK = 128  # of Transformer Engine's blockwise recipe
HISTORY_LENGTH = 1024  # of the delayed recipe, in products of a layer
RECIPES = ("delayed", "tensorwise", "blockwise")


@dataclass(frozen=True, slots=True)
class Fp8Emulation:
    """Which values are rounded to what.

    Attributes:
        fp8: hybrid | e4m3, as in `precision.fp8`.
        recipe: as in `precision.recipe`.
        parts: what is rounded; the rest keeps its dtype.
    """

    fp8: str = "hybrid"
    recipe: str = "tensorwise"
    parts: tuple[str, ...] = ("input", "weight", "gradient")

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The format of gradients."""
        return E5M2 if self.fp8 == "hybrid" else E4M3


def round_to_fp8(values: Tensor, dtype: torch.dtype, scale: Tensor | float) -> Tensor:
    """Round to the nearest value of an FP8 format, ties to even; what is too large saturates.

    Args:
        scale: values are multiplied by it before, and divided after; a number, or one a value.

    Returns:
        float32, of the same shape.
    """
    largest = LARGEST[dtype]
    return (values.float() * scale).clamp(-largest, largest).to(dtype).float() / scale


def tensor_scale(largest_value: float, dtype: torch.dtype) -> float:
    """Return the scale that maps a tensor's largest absolute value to the format's; 1 for zeros."""
    return LARGEST[dtype] / largest_value if largest_value > 0 else 1.0


def block_scales(values: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
    """Return the scale of each value of a matrix: one a block of (rows, columns), a power of two.

    The power of two is the largest with which the block's largest value doesn't saturate. Blocks at
    the ends may be smaller.
    """
    (rows, columns), (height, width) = values.shape, block
    padded = values.new_zeros(-(-rows // height) * height, -(-columns // width) * width).float()
    padded[:rows, :columns] = values.abs()
    largest = padded.view(len(padded) // height, height, -1, width).amax((1, 3))
    scale = torch.where(largest > 0, LARGEST[dtype] / largest, 1.0).log2().floor().exp2()
    whole = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return whole[:rows, :columns]


@contextmanager
def decoder_in_fp8(emulation: Fp8Emulation) -> Iterator[None]:
    """Compute Megatron's local linear layers, forward and backward, in emulated FP8 inside.

    The output layer is none of them (kernels/head.py), nor is a linear layer of the vision tower.
    """
    original = layers.linear_with_grad_accumulation_and_async_allreduce

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
        assert parallel.tp_group().size() == 1, "one process only"
        output: Any = _Linear.apply(input, weight, emulation)
        return output if bias is None else output + bias

    layers.linear_with_grad_accumulation_and_async_allreduce = linear
    try:
        yield
    finally:
        layers.linear_with_grad_accumulation_and_async_allreduce = original


class _Linear(torch.autograd.Function):
    """input [..., K] times weight [N, K] transposed; the three products of Transformer Engine."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, emulation: Fp8Emulation) -> Tensor:
        input_MK = input.detach().flatten(0, -2)
        along_K, along_M = _rounded(input_MK, E4M3, emulation, weight, "input")
        weight_NK, weight_KN = _rounded(weight.detach(), E4M3, emulation, weight, "weight")
        ctx.save_for_backward(along_M, weight_KN, weight)
        ctx.emulation = emulation
        output = (along_K @ weight_NK.T).to(input.dtype)
        return output.unflatten(0, input.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        input_MK, weight_NK, weight = ctx.saved_tensors
        gradient_MN = gradient.flatten(0, -2)
        along_N, along_M = _rounded(
            gradient_MN, ctx.emulation.gradient_dtype, ctx.emulation, weight, "gradient"
        )
        of_input = (along_N @ weight_NK).to(gradient.dtype)
        of_weight = (along_M.T @ input_MK).to(weight.dtype)
        return of_input.unflatten(0, gradient.shape[:-1]), of_weight, None


def _rounded(
    values: Tensor, dtype: torch.dtype, emulation: Fp8Emulation, weight: Tensor, what: str
) -> tuple[Tensor, Tensor]:
    """Return a matrix rounded for a product that sums over its columns, and over its rows.

    They differ in the blockwise recipe alone, whose blocks lie along the sum: 128 values of an
    activation or a gradient; a weight's blocks are 128 x 128.
    """
    if what not in emulation.parts:
        return values.float(), values.float()
    if emulation.recipe == "blockwise":
        blocks = [(BLOCK, BLOCK)] if what == "weight" else [(1, BLOCK), (BLOCK, 1)]
        both = [round_to_fp8(values, dtype, block_scales(values, dtype, b)) for b in blocks]
        return both[0], both[-1]
    largest = float(values.abs().max()) if values.numel() else 0.0
    if emulation.recipe == "delayed":
        history = _history(weight, what)
        scale = tensor_scale(max(history, default=0.0), dtype)
        history.append(largest)
    else:
        scale = tensor_scale(largest, dtype)
    assert math.isfinite(scale), f"{what}: largest value {largest}"
    rounded = round_to_fp8(values, dtype, scale)
    return rounded, rounded


def _history(weight: Tensor, what: str) -> deque[float]:
    """Return the largest values of a layer's earlier products, kept with its weight."""
    holder: Any = weight
    if not hasattr(holder, "fp8_histories"):
        holder.fp8_histories = {}
    return holder.fp8_histories.setdefault(what, deque(maxlen=HISTORY_LENGTH))

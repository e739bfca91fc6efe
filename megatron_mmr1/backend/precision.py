"""FP8 through Transformer Engine: which machine can compute it, what Megatron is told, and how
weights that are kept in FP8 are read and written.

Megatron enters FP8 around the decoder's layers and nowhere else: embedding, output layer (our own,
kernels/head.py) and vision tower (Hugging Face's modules, run before the decoder) stay in the
model's dtype.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from megatron.core import fp8_utils
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.config.schema import PrecisionConfig

# The usual window of delayed scaling; Megatron's own default scales by the last product alone.
_HISTORY_LENGTH = 1024


def check_machine(precision: PrecisionConfig) -> None:
    """Refuse FP8 that this process would not compute, before a model is built.

    Raises:
        ValueError: names the key, its value, what was found and the remedy.
    """
    if precision.fp8 == "off":
        return
    asked = f"precision.fp8={precision.fp8!r} with precision.recipe={precision.recipe!r}"
    if not device.has_gpu():
        raise ValueError(f"{asked} needs a GPU, and there is none; use precision.fp8=off")
    found = torch.cuda.get_device_capability()
    needed = (9, 0) if precision.recipe == "blockwise" else (8, 9)
    if found < needed:
        other = ", or recipe=tensorwise" if found >= (8, 9) else ""
        raise ValueError(
            f"{asked} needs a GPU of compute capability {needed[0]}.{needed[1]}, and "
            f"{torch.cuda.get_device_name()} has {found[0]}.{found[1]}; use "
            f"precision.fp8=off{other}"
        )
    if not fp8_utils.HAVE_TE:
        # Megatron takes this for "not installed", and would go on without FP8.
        try:
            import_module("transformer_engine.pytorch")
            reason = "though it can now"
        except Exception as error:  # whatever it fails with: libraries, driver, versions
            reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{asked} needs Transformer Engine, which could not be imported ({reason}); install "
            "requirements-cuda.txt again, or use precision.fp8=off"
        )


def megatron_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the arguments of TransformerConfig that stand for a number format."""
    if precision.fp8 == "off":
        return {}
    return {
        "fp8": precision.fp8,
        "fp8_recipe": precision.recipe,
        "fp8_amax_history_len": _HISTORY_LENGTH,
        "fp8_amax_compute_algo": "max",
        "fp8_param": precision.fp8_params,
        # Of the whole model, whatever the pipeline.
        "first_last_layers_bf16": precision.first_last_bf16,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
    }


@torch.no_grad()
def write_weight(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter, in FP8 or not, before the optimizer is built.

    Transformer Engine keeps what an FP8 parameter was made of until the optimizer takes its float32
    weights from it: memory that nothing has initialised, if only the parameter were set.
    """
    parameter.copy_(values)
    original = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    if original is not None:
        original.copy_(values)


def plain(weight: Tensor) -> Tensor:
    """Return a weight as an ordinary tensor of its nominal dtype: the values that it stands for."""
    return weight.dequantize() if fp8_utils.is_float8tensor(weight) else weight

"""Whose AdamW Megatron takes on this machine, and who adds up the weights' gradients.

Megatron takes Transformer Engine's fused Adam where that is installed, else Apex's, else torch's.
Nothing of it can be chosen at run time, so that an explicit request is checked, not carried out.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import megatron.core.optimizer as megatron_optimizer
from megatron.core.tensor_parallel import layers

from megatron_mmr1 import device
from megatron_mmr1.config.schema import OptimizerConfig

_NAMES = {"torch": "torch's AdamW", "transformer_engine": "Transformer Engine's FusedAdam"}
_NAMES["apex"] = "Apex's FusedAdam"


@dataclass(frozen=True, slots=True)
class Found:
    """What this process trains with.

    Attributes:
        implementation: torch | transformer_engine | apex.
        fuses_accumulation: the kernel that makes a weight's gradient adds it, in float32, to those
            of earlier micro-batches; otherwise a second one does, of gradients in the model's
            dtype.
    """

    implementation: str
    fuses_accumulation: bool

    def __str__(self) -> str:
        """Say it in a line."""
        fused = "fused" if self.fuses_accumulation else "not fused"
        return f"optimizer: {_NAMES[self.implementation]}; gradient accumulation: {fused}"


def find(config: OptimizerConfig) -> Found:
    """Look for the parts, and refuse a request for what is not there.

    Raises:
        ValueError: names the key, its value and what to do.
    """
    implementation = "torch"
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        implementation = megatron_optimizer.Adam.__module__.partition(".")[0]
    asked = config.implementation
    if asked not in ("auto", implementation):
        raise ValueError(f"optimizer.implementation={asked!r}: {_why_not(asked, implementation)}")
    if implementation == "apex" and find_spec("amp_C") is None:
        raise ValueError(
            f"optimizer.implementation={asked!r}: Apex is installed without its CUDA extensions "
            "(amp_C), and Megatron-Core would take it; build it with them, or remove it"
        )
    # Transformer Engine's linear layers have it built in, and all layers are its where there is a
    # GPU. Our output layer is never called (kernels/head.py).
    can_fuse = device.has_gpu()
    if config.fused_accumulation == "on" and not can_fuse:
        raise ValueError(
            "optimizer.fused_accumulation='on' needs a GPU, where Transformer Engine's layers have "
            "it, and there is none; use auto"
        )
    if config.cpu_offload > 0 and not device.has_gpu():
        raise ValueError(
            f"optimizer.cpu_offload={config.cpu_offload!r} moves the optimizer's states off the "
            "GPU, and there is no GPU; use 0"
        )
    return Found(implementation, can_fuse and config.fused_accumulation != "off")


def let_output_layer_be_built() -> None:
    """Let Megatron build its output layer with fused accumulation on, without Apex.

    It asks for Apex's extension (fused_weight_gradient_mlp_cuda) when the layer is built; that
    would be needed when it is called, and ours never is.
    """
    layers._grad_accum_fusion_available = True


def _why_not(asked: str, found: str) -> str:
    if asked == "torch":
        return f"Megatron-Core takes {_NAMES[found]} where it is installed; use auto"
    if asked == "apex" and found == "transformer_engine":
        return "Megatron-Core takes Transformer Engine's where it is installed; use auto"
    if asked == "apex":
        return (
            "apex.optimizers cannot be imported; build Apex from NVIDIA's source (PyPI's apex is "
            "another project), or use auto"
        )
    return "transformer_engine is not installed; install requirements-cuda.txt, or use auto"

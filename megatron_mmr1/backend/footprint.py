"""What one rank of any number holds of a policy, counted on a model without memory.

Owns the pretended world: one process plays any rank of hundreds. torch's fake process group stands
in for the others, and the model, Megatron's data-parallel buffers and its distributed optimizer are
built on the meta device, as `policy.MegatronPolicy` builds them for real (tests/test_memory.py
holds the two to the same bytes). Nothing of it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_mmr1 import device
from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.model import PolicyStage, transformer_config
from megatron_mmr1.backend.optimizer import build_optimizer
from megatron_mmr1.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a rank holds between two steps, in bytes unless it says otherwise.

    Attributes:
        num_parameters: elements of this rank's parameters, its share of a tensor-parallel weight.
        num_layers: decoder layers on this rank.
        weights: parameters in `precision.dtype`, in Megatron's padded buffers.
        gradients: float32 buffers of the trainable ones.
        states: AdamW's moments, and in bfloat16 the float32 weights: this rank's data-parallel
            share.
        largest_parameter: whose gradient exists a second time while it is added to the buffer.
        has_tower: whether the vision tower is here.
    """

    num_parameters: int
    num_layers: int
    weights: int
    gradients: int
    states: int
    largest_parameter: int
    has_tower: bool


def footprint(
    hf_config: Any,
    layout: ParallelConfig,
    precision: PrecisionConfig,
    optimizer: OptimizerConfig,
    *,
    world_size: int,
    rank: int,
    freeze_vision: bool = False,
) -> Footprint:
    """Count what `rank` of `world_size` holds at a layout.

    Counted on Megatron's local layers. Those of Transformer Engine, which train on a GPU, have the
    same parameters; padding between them may differ by less than 256 bytes a parameter. All states
    are counted, also those that `optimizer.cpu_offload` keeps on the CPU.

    Needs a process in which torch.distributed is not initialised, and no GPU in sight.
    """
    assert not dist.is_initialized() and not device.has_gpu()
    with _pretended_world(world_size, rank, layout), device.seam(), _on_meta():
        config = transformer_config(hf_config, layout, precision)
        stages = range(layout.vpp_size) if layout.vpp_size > 1 else [None]
        chunks = [PolicyStage(hf_config, config, stage) for stage in stages]
        tower = getattr(chunks[0], "vision", None)
        if tower is not None:
            tower.requires_grad_(not freeze_vision)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True
        )
        model: list[Any] = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
        states = build_optimizer(optimizer, 1, model, config.params_dtype)[0]
        return _counted(chunks, model, states)


def _counted(chunks: list[PolicyStage], model: list[Any], optimizer: Any) -> Footprint:
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    weights = _storages(p.detach() for p in parameters)
    buffers = [b for chunk in model for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    gradients = _storages(buffer.grad_data for buffer in buffers)
    states: dict[int, int] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is not None:  # else the rank trains no parameters of this kind
            states |= _storages(p for group in inner.param_groups for p in group["params"])
            states |= _storages(t for of in inner.state.values() for t in of.values())
    return Footprint(
        num_parameters=sum(p.numel() for p in parameters),
        num_layers=sum(len(chunk.language.decoder.layers) for chunk in chunks),
        weights=sum(weights.values()),
        gradients=sum(gradients.values()),
        # In float32 the optimizer steps on the weights themselves.
        states=sum(size for storage, size in states.items() if storage not in weights),
        largest_parameter=max(p.numel() * p.element_size() for p in parameters),
        has_tower=hasattr(chunks[0], "vision"),
    )


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each storage that tensors lie in; on the meta device they have no address."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in found}


@contextmanager
def _pretended_world(world_size: int, rank: int, layout: ParallelConfig) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group: Any = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:  # Megatron asks for gloo's, too
        return new_group(*args, **{**kwargs, "backend": "fake"})

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with patch.object(dist, "new_group", fake_group):
            parallel.lay_groups(layout, seed=0)
        yield
    finally:
        parallel.finalize()


@contextmanager
def _on_meta() -> Iterator[None]:
    """Inside `device.seam`: what names no device, or the current one, is made without memory."""
    with (
        patch.object(torch.cuda, "current_device", lambda: torch.device("meta")),
        torch.device("meta"),
        _TypeNames(),
    ):
        yield


class _TypeNames(TorchFunctionMode):
    """Megatron's optimizer compares `Tensor.type()` with names of CUDA tensors, as the seam says
    them; of a meta tensor it would be "torch.cuda.meta.FloatTensor".
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("meta.", "")
        return result


def stage_ranks(layout: ParallelConfig, world_size: int) -> list[int]:
    """Return one rank of each pipeline stage, all of the same data-parallel replica.

    Ranks of one stage hold equally much: tensor-parallel weights are cut evenly, and so are the
    optimizer's states over data-parallel ranks, but for padding at their end.
    """
    with _pretended_world(world_size, 0, layout):
        group = parallel_state.get_pipeline_model_parallel_group()
        return dist.get_process_group_ranks(group)

"""An H100 that is only reported, and ranks that are only played: what `make te-check` needs to
build Transformer Engine's modules in one process without a GPU. Nothing computes on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mmr1.config.layout import replica_size
from megatron_mmr1.config.schema import ParallelConfig

META, CPU = torch.device("meta"), torch.device("cpu")
_NAME = "NVIDIA H100 80GB HBM3"


class _InPlaceOfCuda(TorchFunctionMode):
    """Puts what is asked for on CUDA, and what names no device, on another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": self._device}
        return func(*args, **kwargs)


@contextmanager
def reported_gpu(
    device: torch.device = META, capability: tuple[int, int] = (9, 0)
) -> Iterator[None]:
    """Report a GPU; its tensors are on `device`: meta (no memory), or the CPU."""
    properties = SimpleNamespace(
        name=_NAME, major=capability[0], minor=capability[1], multi_processor_count=132,
        total_memory=80 << 30, warp_size=32, shared_memory_per_block_optin=232448,
        L2_cache_size=50 << 20,
    )  # fmt: skip
    reports = {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: device,
        "set_device": lambda *args: None,
        "Stream": lambda *args, **kwargs: object(),
        "get_device_capability": lambda *args: capability,
        "get_device_properties": lambda *args: properties,
        "get_device_name": lambda *args: _NAME,
    }
    with (
        patch.multiple(torch.cuda, **reports),
        _InPlaceOfCuda(device),
        torch.device(device) if device == META else nullcontext(),
    ):
        yield


@contextmanager
def played_rank(layout: ParallelConfig, rank: int) -> Iterator[None]:
    """Be one rank of a replica, with Megatron's groups over torch's fake ones: no collective runs.

    Experts are not cut by tensor parallelism, as in parallel.lay_groups.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks(layout))
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp_size,
            pipeline_model_parallel_size=layout.pp_size,
            virtual_pipeline_model_parallel_size=layout.vpp_size if layout.vpp_size > 1 else None,
            context_parallel_size=layout.cp_size,
            expert_model_parallel_size=layout.ep_size,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def num_ranks(layout: ParallelConfig) -> int:
    """Return the ranks of one copy of the model; experts may be spread over more than that."""
    replica = replica_size(layout)
    return replica * max(1, layout.ep_size * layout.pp_size // replica)

"""Process groups: torch.distributed and Megatron-Core's parallel state,
and the few collectives that rooms share.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_mmr1 import device
from megatron_mmr1.backend import patches
from megatron_mmr1.config.schema import ParallelConfig


def initialize(config: ParallelConfig, seed: int) -> None:
    """Join the process group that torchrun describes (or a group of one)
    and lay Megatron's groups over it.

    Raises:
        ValueError: a single process finds its MASTER_PORT taken.
    """
    alone = "RANK" not in os.environ
    if alone:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    if device.has_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        device.collective_backend(),
        timeout=timedelta(minutes=30),
        store=_loopback_store() if alone else None,
        rank=0 if alone else -1,
        world_size=1 if alone else -1,
    )
    with device.seam():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tp_size,
            pipeline_model_parallel_size=config.pp_size,
            context_parallel_size=config.cp_size,
        )
        patches.rng_tracker_uses_cpu_generator()
        patches.sync_save_starts_no_process()
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def finalize() -> None:
    """Leave every group."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def dp_rank() -> int:
    """Return this process's data-parallel rank."""
    return parallel_state.get_data_parallel_rank()


def dp_size() -> int:
    """Return how many data-parallel replicas there are."""
    return parallel_state.get_data_parallel_world_size()


def is_main() -> bool:
    """Say whether this process writes the run's files."""
    return dist.get_rank() == 0


def sum_over_dp(values: dict[str, float]) -> dict[str, float]:
    """Add each value over data-parallel ranks (float64, one all-reduce);
    keys must be the same everywhere.
    """
    names = sorted(values)
    totals = torch.tensor(
        [values[name] for name in names], dtype=torch.float64, device=device.device()
    )
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    return dict(zip(names, totals.tolist(), strict=True))


def max_over_dp(value: float) -> float:
    """Return the largest value over data-parallel ranks."""
    largest = torch.tensor([value], dtype=torch.float64, device=device.device())
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return largest.item()


def gather_over_dp(items: list[Any]) -> list[Any]:
    """Concatenate each data-parallel rank's plain values
    (numbers, strings, tuples) in rank order.
    """
    shares: list[list[Any] | None] = [None] * dp_size()
    dist.all_gather_object(shares, items, group=parallel_state.get_data_parallel_group())
    return [item for share in shares if share is not None for item in share]


def gather_to_main(items: list[Any]) -> list[Any] | None:
    """Concatenate each rank's plain values in rank order on rank 0; None elsewhere."""
    shares: list[list[Any]] | None = (
        [[] for _ in range(dist.get_world_size())] if is_main() else None
    )
    dist.gather_object(items, shares, dst=0)
    return None if shares is None else [item for share in shares for item in share]


def broadcast_from_main(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every rank is here."""
    dist.barrier()


def _loopback_store() -> dist.TCPStore:
    """A store that listens on 127.0.0.1 only (torch's own listens on every interface)."""
    port = int(os.environ.get("MASTER_PORT", "0"))
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"MASTER_PORT={port} is in use on 127.0.0.1 ({error.strerror}); "
                "choose another with MASTER_PORT=NNNN, or leave it unset to have a free one picked"
            ) from error
        listener.listen()
        os.environ["MASTER_PORT"] = str(listener.getsockname()[1])
        return dist.TCPStore(
            "127.0.0.1",
            int(os.environ["MASTER_PORT"]),
            world_size=1,
            is_master=True,
            master_listen_fd=listener.detach(),
        )

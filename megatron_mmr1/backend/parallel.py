"""Process groups: torch.distributed and Megatron-Core's parallel state,
and the few collectives that rooms share.
"""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as distributed_c10d
from megatron.core import parallel_state, tensor_parallel

from megatron_mmr1 import device
from megatron_mmr1.backend import patches
from megatron_mmr1.config.schema import ParallelConfig
from megatron_mmr1.launch.rendezvous import Meeting, meet

# How long a rank waits for the others: a slow engine's rollouts and a first compilation fit in.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def initialize(config: ParallelConfig, seed: int, meeting: Meeting | None = None) -> None:
    """Make the process group of those that met, and lay Megatron's groups over it.

    Args:
        meeting: of `launch.rendezvous.meet`; None = meet now.

    Raises:
        ValueError: the processes don't meet.
    """
    meeting = meeting or meet()
    # NCCL's communicators, made at their first use, also wait in the store.
    meeting.store.set_timeout(_COLLECTIVE_TIMEOUT)
    if device.has_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        device.collective_backend(),
        timeout=_COLLECTIVE_TIMEOUT,
        store=meeting.store,
        rank=meeting.rank,
        world_size=meeting.world_size,
    )
    lay_groups(config, seed)


def lay_groups(config: ParallelConfig, seed: int) -> None:
    """Lay Megatron's groups over the processes; again, for another layout, after `lift_groups`.

    Experts are not cut by tensor parallelism (see `model.transformer_config`).
    """
    with device.seam():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tp_size,
            pipeline_model_parallel_size=config.pp_size,
            virtual_pipeline_model_parallel_size=config.vpp_size if config.vpp_size > 1 else None,
            context_parallel_size=config.cp_size,
            expert_model_parallel_size=config.ep_size,
            expert_tensor_parallel_size=1,
        )
        patches.rng_tracker_uses_cpu_generator()
        patches.sync_save_starts_no_process()
        patches.adam_steps_are_separate()
        patches.saved_states_skip_bucket_padding()
        patches.alltoall_dispatcher_needs_no_stream()
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def lift_groups() -> None:
    """Take Megatron's groups away; torch's own stays.

    Megatron only forgets its groups; each keeps threads until it is destroyed and no policy that
    was dropped before still refers to it.
    """
    gc.collect()
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def finalize() -> None:
    """Leave every group."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def tp_group() -> dist.ProcessGroup:
    """Return the tensor-parallel process group."""
    return _one(parallel_state.get_tensor_model_parallel_group())


def pp_group() -> dist.ProcessGroup:
    """Return the pipeline-parallel process group."""
    return _one(parallel_state.get_pipeline_model_parallel_group())


def cp_group() -> dist.ProcessGroup:
    """Return the context-parallel process group."""
    return _one(parallel_state.get_context_parallel_group())


def ep_group() -> dist.ProcessGroup:
    """Return the expert-parallel process group."""
    return _one(parallel_state.get_expert_model_parallel_group())


def dp_cp_group() -> dist.ProcessGroup:
    """Return the group over which gradients are added: data- and context-parallel ranks."""
    return _one(parallel_state.get_data_parallel_group(with_context_parallel=True))


def _one(group: Any) -> dist.ProcessGroup:
    assert group is not None and not isinstance(group, list)
    return group


def dp_rank() -> int:
    """Return this process's data-parallel rank."""
    return parallel_state.get_data_parallel_rank()


def dp_size() -> int:
    """Return how many data-parallel replicas there are."""
    return parallel_state.get_data_parallel_world_size()


def is_main() -> bool:
    """Say whether this process writes the run's files."""
    return dist.get_rank() == 0


def is_first_stage() -> bool:
    """Say whether this rank is on the first pipeline stage: embedding and vision tower."""
    return parallel_state.is_pipeline_first_stage(ignore_virtual=True)


def is_last_stage() -> bool:
    """Say whether this rank is on the last pipeline stage: output layer and loss."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def reduce_metrics(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    """Combine what the last stage's ranks measured, and tell every rank.

    Sums (in float64) and maxima go over data- and context-parallel ranks; tensor-parallel ranks
    hold the same numbers. Keys must be the same on all of them; other stages give none.
    """
    metrics: dict[str, float] = {}
    if is_last_stage():
        for values, operation in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
            names = sorted(values)
            totals = torch.tensor(
                [values[name] for name in names], dtype=torch.float64, device=device.device()
            )
            if names:
                dist.all_reduce(totals, operation, group=dp_cp_group())
            metrics |= dict(zip(names, totals.tolist(), strict=True))
    return _from_last_stage(metrics)


def _from_last_stage(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=_last_of_pipeline(), group=pp_group())
    return box[0]


def _last_of_pipeline() -> int:
    return dist.get_global_rank(pp_group(), pp_group().size() - 1)


def from_context_and_last_stage(values: torch.Tensor) -> torch.Tensor:
    """Add the last stage's context-parallel parts (zeros where a rank has none), on every rank."""
    if is_last_stage():
        dist.all_reduce(values, group=cp_group())
    dist.broadcast(values, src=_last_of_pipeline(), group=pp_group())
    return values


def gather_over_world(items: list[Any]) -> list[Any]:
    """Concatenate each rank's plain values (numbers, strings, tuples) in rank order, everywhere."""
    shares: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, items)
    return [item for share in shares for item in share]


def gather_array(values: np.ndarray) -> np.ndarray:
    """Return every rank's float64 array of one shape, [ranks, *shape], in rank order."""
    mine = torch.from_numpy(values).to(device.device())
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).cpu().numpy()


def barrier() -> None:
    """Wait until every rank is here."""
    dist.barrier()

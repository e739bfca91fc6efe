"""Mends of Megatron-Core 0.19.2 that `device.seam` can't make from outside: what a CPU run needs
(experts' dispatcher included), and what loading the distributed optimizer's states needs anywhere.

Each is named and applied by `parallel.lay_groups`; applied twice, it changes nothing more.
"""

from __future__ import annotations

import queue
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_mmr1 import device


def rng_tracker_uses_cpu_generator() -> None:
    """Make the RNG tracker save and restore the CPU generator.

    Its two functions go through torch.cuda's lazy initialisation: without a GPU the state would be
    queued for a device that never comes, and dropout or initialisation would not be forked at all.
    """
    if device.has_gpu():
        return

    def get_state(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(new_state)

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state


def sync_save_starts_no_process() -> None:
    """Give the checkpoint writer an ordinary queue for its results.

    Its own belongs to a `multiprocessing.Manager`: a second process of 0.6 GB that takes 5 s to
    start and outlives a trainer that is killed. Only asynchronous saves need it; ours are written
    by threads of this process.
    """
    filesystem_async._results_queue = queue.Queue()


def adam_steps_are_separate() -> None:
    """Load torch AdamW's step counts: one tensor a parameter, each with the saved value.

    `DistributedOptimizer.load_state_dict` hands one tensor to all parameters, so that every
    parameter's update would advance the count of all. The copy of the other states then stops at
    the count, which the checkpoint keeps with the parameter groups: it is left out of that copy.
    """
    load = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    if set_states.__name__ == "_set_states_but_step":
        return

    def _load_with_own_steps(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        if isinstance(self.optimizer, torch.optim.AdamW):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    def _set_states_but_step(self: Any, model_param: Any, tensors: Any) -> None:
        set_states(self, model_param, {**tensors, "step": None})  # None is left alone

    DistributedOptimizer.load_state_dict = _load_with_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_states_but_step


def saved_states_skip_bucket_padding() -> None:
    """Cut the optimizer's states out of the gathered buffer at the right places.

    Megatron gathers its buckets without the padding at their ends, but cuts with offsets that count
    it: what lies behind a padded bucket is saved shifted. There is more than one bucket with tied
    embeddings over several pipeline stages.
    """
    build = DistributedOptimizer.sharded_param_state_fully_reshardable
    if build.__name__ == "_build_unpadded":
        return

    def _build_unpadded(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            padding = [0]
            for bucket in buffer.buckets:
                padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
            buffer.param_index_map = {
                parameter: (start - padding[bucket], end - padding[bucket], bucket)
                for parameter, (start, end, bucket) in buffer.param_index_map.items()
            }
        try:
            return build(self, *args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = index_map

    DistributedOptimizer.sharded_param_state_fully_reshardable = _build_unpadded


def alltoall_dispatcher_needs_no_stream() -> None:
    """Let experts' all-to-all dispatcher work without CUDA.

    It makes a CUDA stream to bring the numbers of tokens that it sends and receives to the CPU,
    where the collective wants numbers. Without a GPU there is no stream to make, and the counts,
    on the CPU already, would stay the tensors that the collective refuses.
    """
    if device.has_gpu():
        return

    def splits_as_numbers(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        for name in ("input_splits", "output_splits"):
            splits = getattr(self, name)
            if isinstance(splits, torch.Tensor):
                setattr(self, name, splits.tolist())
        return tokens_per_expert

    no_stream: Any = object()  # anything but None: then none is made
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = no_stream
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = splits_as_numbers

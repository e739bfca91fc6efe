"""Mends of Megatron-Core 0.19.2 that a CPU run needs
and that `device.seam` can't make from outside.

Each is named and applied once by `parallel.initialize`.
"""

from __future__ import annotations

import queue

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import random as mcore_random

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

"""The trainer's half of a shared GPU: what only training needs, out of the way and back.

Owns where gradients and optimizer states are between two training phases. The rollout engine's
half is its sleep (rollout/vllm_engine.py); whose turn it is says trainers/turns.py.

Megatron-Core has `offload_to_cpu` of its own for optimizers. It isn't used: in float32 it moves the
optimizer's views of the parameters off, so that steps no longer reach the model, and it copies to
pageable memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_mmr1 import device


class ParkedState:
    """Gradients and optimizer states of one policy, on the training device or away.

    Gradients are freed: every step starts from zeros. States (moments; in bfloat16 the float32
    weights too) are copied to host memory, pinned on a GPU, and their storages freed. Tensors keep
    their identity, so whatever holds views of them sees them come back. What is shared with the
    model's own parameters stays.

    Args:
        chunks: the data-parallel wrappers of this rank's model chunks.
        optimizer: Megatron's, over their parameters.

    Attributes:
        is_parked: whether they are away. Reading them then is an error of ours.
    """

    def __init__(self, chunks: list[Any], optimizer: Any) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self._host = WeakTensorKeyDictionary()  # pinned memory is slow to come by: kept
        self._parked: list[tuple[Tensor, int]] = []
        self.is_parked = False

    @torch.no_grad()
    def park(self) -> int:
        """Make room; return how many bytes of the training device that made."""
        assert not self.is_parked
        num_bytes = 0
        for tensor in self._states():
            storage = tensor.untyped_storage()
            if tensor not in self._host:
                self._host[tensor] = torch.empty_like(
                    tensor, device="cpu", pin_memory=device.has_gpu()
                )
            self._host[tensor].copy_(tensor, non_blocking=True)
            self._parked.append((tensor, storage.nbytes()))
            num_bytes += storage.nbytes()
        device.synchronize()  # the copies end before their sources are freed
        for tensor, _ in self._parked:
            tensor.untyped_storage().resize_(0)
        for chunk in self._chunks:
            buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
            num_bytes += sum(b.grad_data.untyped_storage().nbytes() for b in buffers)
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
        device.release_cached_memory()
        self.is_parked = True
        return num_bytes

    @torch.no_grad()
    def unpark(self) -> None:
        """Bring everything back; gradients are zeros."""
        assert self.is_parked
        for tensor, num_bytes in self._parked:
            tensor.untyped_storage().resize_(num_bytes)
            tensor.copy_(self._host[tensor], non_blocking=True)
        for chunk in self._chunks:
            chunk.restore_grad_buffers(synchronize=False)
        device.synchronize()
        self._parked, self.is_parked = [], False

    def _states(self) -> Iterator[Tensor]:
        """The optimizer's tensors that fill a storage of their own on the training device."""
        kept = {
            parameter.untyped_storage().data_ptr()
            for chunk in self._chunks
            for parameter in chunk.parameters()
        }
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            inner = getattr(part, "optimizer", None)
            if inner is None:  # a rank without trainable parameters of this kind
                continue
            tensors = [p for group in inner.param_groups for p in group["params"]]
            tensors += [t for state in inner.state.values() for t in state.values()]
            for tensor in tensors:
                if not isinstance(tensor, Tensor) or tensor.numel() < 2:
                    continue
                storage = tensor.untyped_storage()
                is_whole = storage.nbytes() == tensor.numel() * tensor.element_size()
                is_here = tensor.device.type == device.device().type
                if is_whole and is_here and storage.data_ptr() not in kept:
                    yield tensor

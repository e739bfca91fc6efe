"""Owns `weight_version`: the number of the weights that the policy has and the engine should have.

Knows two protocols and neither Megatron nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor


class Source(Protocol):
    """Something that can name its weights as the engine knows them."""

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, tensor)."""
        ...


class Sink(Protocol):
    """Something that takes weights and afterwards reports the version that it was given."""

    weight_version: int
    is_asleep: bool

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the weights."""
        ...


class WeightSync:
    """Pushes weights and checks that what samples is what was trained."""

    def __init__(self, source: Source, sink: Sink) -> None:
        self._source, self._sink = source, sink
        self.weight_version = 0

    def push(self, version: int) -> None:
        """Copy all weights to the engine as `version`."""
        self._sink.update_weights(self._source.named_tensors(), version)
        self.weight_version = version
        self.check(self._sink.weight_version)

    def wake(self) -> None:
        """Push the same weights again if the engine lost them in its sleep."""
        if self._sink.is_asleep:
            self.push(self.weight_version)

    def check(self, weight_version: int) -> None:
        """Refuse rollouts of other weights than the policy's.

        Raises:
            RuntimeError: the versions differ.
        """
        if weight_version != self.weight_version:
            raise RuntimeError(
                f"rollouts come from weight version {weight_version}, "
                f"the policy has {self.weight_version}: a weight update was lost"
            )

"""How long the parts of a policy's step took, on the clock of the device that does the work.

A GPU works on after the host has gone on. So the marks there are CUDA events, put into the stream
between the work and read when the step is over: nothing waits for them, and a timed step is as fast
as an untimed one. On a CPU a mark is the host's clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from megatron_mmr1 import device

# Megatron's names of what its schedules do, and ours.
_OF_SCHEDULE = {"forward-compute": "forward", "backward-compute": "backward"}


class StepClock:
    """Seconds a part, added up until `pop`. Every moment belongs to one part: the innermost open.

    Parts that a policy opens:
        vision: the vision tower, forward and, when it is trained, backward.
        forward: the decoder's layers.
        head: output layer and loss, forward and their gradients: kernels/head.py makes both at
            once.
        backward: the decoder's layers.
        pipeline: what is left of Megatron's schedule: with several stages, sending, receiving and
            waiting for each other; with one, the loop itself.
        gradient_sync: gradients added up over ranks.
        optimizer: clipping, the optimizer's step, and weights gathered over data-parallel ranks.
        logprobs: whole passes for old or reference log-probs, vision and head included.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[Any, str]] = []
        self._open: list[str] = []
        self._whole: str | None = None
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str, *, is_whole: bool = False) -> Iterator[None]:
        """Time the block; `is_whole`: with the parts that are opened inside it."""
        depth = len(self._open)
        self.begin(name)
        self._whole = name if is_whole else self._whole
        try:
            yield
        finally:
            # Also what an error left open inside.
            del self._open[depth:]
            self._whole = None if is_whole else self._whole
            self._mark()

    def begin(self, name: str) -> None:
        """Open a part inside the one that is open."""
        self._open.append(self._whole or name)
        self._mark()

    def end(self) -> None:
        """Close the part that was opened last."""
        self._open.pop()
        self._mark()

    def settle(self) -> None:
        """Read the marks; call it when the device has finished the step, as reading a loss does."""
        if self._marks and device.has_gpu():
            self._marks[-1][0].synchronize()  # on every pipeline stage, whoever reads the loss
        for (start, name), (end, _) in pairwise(self._marks):
            if name:
                self._seconds[name] = self._seconds.get(name, 0.0) + _seconds(start, end)
        self._marks = []

    def pop(self) -> dict[str, float]:
        """Return {"time/PART_s": seconds} of the settled steps since the last pop."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}_s": value for name, value in seconds.items()}

    def of_schedule(self, name: str, log_level: int = 0) -> _Timer:
        """Return a timer for Megatron's schedules (`config.timers`), by Megatron's name."""
        return _Timer(self, _OF_SCHEDULE.get(name))

    def _mark(self) -> None:
        self._marks.append((_now(), self._open[-1] if self._open else ""))


class _Timer:
    """What Megatron's schedules start and stop; a part that we don't name is not timed."""

    def __init__(self, clock: StepClock, part: str | None) -> None:
        self._clock, self._part = clock, part

    def start(self, barrier: bool = False) -> None:
        """Begin; ranks never wait for each other here, whatever `barrier` asks for."""
        if self._part:
            self._clock.begin(self._part)

    def stop(self, barrier: bool = False) -> None:
        """End."""
        if self._part:
            self._clock.end()


def _now() -> Any:
    if not device.has_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return start.elapsed_time(end) / 1e3 if device.has_gpu() else end - start

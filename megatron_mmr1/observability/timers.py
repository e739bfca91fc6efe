"""How long each phase of a step took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# The policy measures these inside the phase "train" (backend/clock.py says what they are).
PARTS_OF_TRAIN = (
    "logprobs",
    "vision",
    "forward",
    "head",
    "backward",
    "pipeline",
    "gradient_sync",
    "optimizer",
)


class PhaseTimers:
    """Wall-clock seconds a phase, added up until `pop`. Nested phases each count their whole time.

    The clock is the host's: a phase that only launches GPU work must end in something that waits
    for it (reading the loss, a collective on the host) or its time shows up in the next phase. A
    benchmark sets `waits`, which is then called before every reading of the clock.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self.waits: Callable[[], None] = _wait_for_nothing

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under `name`, also when it raises."""
        self.waits()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waits()
            elapsed = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + elapsed

    def seconds(self, name: str) -> float:
        """Return what `name` took since the last pop."""
        return self._seconds.get(name, 0.0)

    def pop(self) -> dict[str, float]:
        """Return {"time/NAME_s": seconds} since the last pop, and start over."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}_s": value for name, value in seconds.items()}


def _wait_for_nothing() -> None:
    pass

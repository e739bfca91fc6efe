"""How much memory of its own this process takes, at its peak (Linux).

Anonymous memory: not pages of files, which the system takes back when it needs them.
"""

from __future__ import annotations

import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")
_INTERVAL_S = 0.002


def anonymous_bytes() -> int:
    """Return this process's anonymous memory now."""
    lines = _STATUS.read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(kilobytes) << 10


def peak_resident_bytes() -> int:
    """Return the most memory that this process ever had resident, pages of files among it."""
    lines = _STATUS.read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) << 10


class PeakMemory:
    """A context that watches from a thread.

    Args:
        before: anonymous memory to compare with; None: what it is on entering.

    Attributes:
        growth_bytes: the largest growth while the context was open.
    """

    def __init__(self, before: int | None = None) -> None:
        self.growth_bytes = 0
        self._before = anonymous_bytes() if before is None else before
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(_INTERVAL_S):
            self.growth_bytes = max(self.growth_bytes, anonymous_bytes() - self._before)

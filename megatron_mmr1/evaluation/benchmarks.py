"""The benchmarks by name: how each one's files are read.

(Its rule of scoring is rewards/ for the embedded one.)
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_mmr1.data.dataset import PromptDataset
from megatron_mmr1.data.processor import PromptProcessor


def _read_digits(path: str, processor: PromptProcessor) -> PromptDataset:
    """The embedded task's held-out file: MMR1-RL's schema."""
    return PromptDataset(path, processor)


BENCHMARKS: dict[str, Callable[[str, PromptProcessor], PromptDataset]] = {"digits": _read_digits}

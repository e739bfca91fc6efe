"""How much memory a measured step takes."""

from __future__ import annotations

import torch

from megatron_mmr1.observability.memory import peak_resident_bytes


class StepMemory:
    """The most memory that a step has in use.

    On a GPU: all that is taken of it (contexts, torch's cache, the engine), read whenever a phase
    begins or ends; of what a phase needed in between, torch's cache then still holds the most.
    torch's own count would be too high: pools that vLLM unmaps for its sleep stay in it. On a CPU:
    what the process ever had resident.
    """

    def __init__(self) -> None:
        self._peak_bytes = 0

    def read_gpu(self) -> None:
        """Wait for the GPU, and see how much of it is taken."""
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        self._peak_bytes = max(self._peak_bytes, total - free)

    def pop(self) -> int:
        """Return bytes since the last pop, and start over."""
        if not torch.cuda.is_available():
            return peak_resident_bytes()
        peak_bytes, self._peak_bytes = self._peak_bytes, 0
        return peak_bytes

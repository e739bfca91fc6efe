"""The one seam between a CPU with gloo and CUDA with nccl.

Megatron-Core names CUDA in many places (`torch.cuda.current_device()`, `device="cuda"`, `.cuda()`).
On a machine without a GPU, `seam()` points these at the CPU while Megatron code runs, and puts
everything back on leaving, so that nothing else in the process (vLLM, Hugging Face) ever sees it.
With a GPU the seam does nothing.

Imports neither megatron nor vllm. The one Megatron function that the seam can't reach from outside
is mended in backend/patches.py.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def has_gpu() -> bool:
    """Say whether this process trains on CUDA."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device that this process trains on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else CPU


def collective_backend() -> str:
    """Return the process-group backend that goes with `device()`."""
    return "nccl" if has_gpu() else "gloo"


def synchronize() -> None:
    """Wait for what was launched on the GPU."""
    if has_gpu():
        torch.cuda.synchronize()


def release_cached_memory() -> None:
    """Give memory that torch keeps for later back to the GPU, for others in it (vLLM)."""
    if has_gpu():
        torch.cuda.empty_cache()


def prepare_process() -> None:
    """Set what must be set before megatron.core or vLLM are imported.

    Call it first in every entry point. One torch thread a process (tiny models, many processes); on
    a CPU also no torch.compile, which Megatron-Core would otherwise ask for at import.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    _quieten_libraries()
    if not has_gpu():
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _quieten_libraries() -> None:
    """Keep the libraries' start-up notices off the screen
    (no Apex, no Triton on a CPU, deprecations).

    Errors still show. `VLLM_LOGGING_LEVEL=INFO` brings vLLM's log back.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    # The seam, and the engine's search through modules, call torch for libraries.
    ours = (r"megatron_mmr1\.device", r"megatron_mmr1\.rollout\.vllm_engine")
    for module in ours:
        warnings.filterwarnings("ignore", module=module)
    for library in ("megatron", "vllm", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{library}\.")
    for logger in ("megatron.core", "torch.utils.cpp_extension", "vllm"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _CpuInPlaceOfCuda(TorchFunctionMode):
    """Rewrites the device arguments of torch calls made inside it from CUDA to the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and isinstance(result, str):
            # Megatron's gradient clipping compares Tensor.type() with "torch.cuda.FloatTensor".
            return result.replace("torch.", "torch.cuda.", 1)
        return result


_CUDA_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "current_device": lambda: CPU,
    "synchronize": lambda *args, **kwargs: None,
    "empty_cache": lambda: None,
    "current_stream": lambda *args, **kwargs: None,
    "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
    "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
}


@contextmanager
def seam() -> Iterator[None]:
    """Run Megatron code on whatever device this machine has; re-entrant, and undone on leaving."""
    if has_gpu():
        yield
        return
    originals = {name: getattr(torch.cuda, name) for name in _CUDA_FUNCTIONS}
    for name, replacement in _CUDA_FUNCTIONS.items():
        setattr(torch.cuda, name, replacement)
    try:
        with _CpuInPlaceOfCuda():
            yield
    finally:
        for name, original in originals.items():
            setattr(torch.cuda, name, original)

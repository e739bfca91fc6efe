"""What the doctor looks at in the machine: GPUs and driver, shared memory, disk, open files."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_mmr1.launch.findings import GIB, Finding, do, not_here, ok

_DRIVER_OF_CUDA_13 = 580
_LEAST_CAPABILITY = 8.0  # bfloat16, and what vLLM's kernels are built for
_FP8_CAPABILITY = 8.9
_SHARED_MEMORY_BYTES = 1 * GIB  # a GPU, and at least; NCCL and vLLM between processes
_CHOICE = "CUDA_VISIBLE_DEVICES"
_DISK_BYTES = 10 * GIB
_OPEN_FILES = 4096  # gloo and NCCL open some for every pair of processes


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as nvidia-smi has it: compute capability as in 9.0, memory as in "81559 MiB"."""

    name: str
    driver: str
    capability: float
    memory: str


def find_gpus() -> tuple[list[Gpu], str]:
    """Return those of this machine's NVIDIA GPUs that CUDA shows, and why there are none."""
    query = "--query-gpu=index,uuid,name,driver_version,compute_cap,memory.total"
    if shutil.which("nvidia-smi") is None:
        return [], "no nvidia-smi"
    asked = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
    )
    if asked.returncode != 0:
        return [], f"nvidia-smi says: {' '.join((asked.stdout + asked.stderr).split())}"
    rows = [line.split(", ") for line in asked.stdout.strip().splitlines()]
    chosen = os.environ.get(_CHOICE)
    gpus = [
        Gpu(n, driver, float(cap), memory) for _, _, n, driver, cap, memory in _shown(rows, chosen)
    ]
    return gpus, f"{_CHOICE}={chosen} names none of them" if rows and not gpus else "none"


def _shown(rows: list[list[str]], chosen: str | None) -> list[list[str]]:
    """The rows of index, UUID, ... that CUDA_VISIBLE_DEVICES names: nvidia-smi shows all."""
    if chosen is None or "MIG-" in chosen:  # parts of a GPU have no row
        return rows
    shown: list[list[str]] = []
    for name in (part.strip() for part in chosen.split(",")):
        by_uuid = name.startswith("GPU-")
        named = [row for row in rows if (row[1].startswith(name) if by_uuid else row[0] == name)]
        if not named:
            break  # CUDA, too, reads no further
        shown.append(named[0])
    return shown


def check_gpus(gpus: list[Gpu], why_none: str, devices: Path = Path("/dev")) -> Finding:
    """GPUs that our kernels and CUDA 13 run on, all of one kind."""
    if not gpus:
        if why_none != "no nvidia-smi" or any(devices.glob("nvidia[0-9]*")):
            remedy = "change it" if why_none.startswith(_CHOICE) else "install or mend the driver"
            return do("GPU", f"there seems to be one, but {why_none}; {remedy}")
        return not_here("GPU", f"none found ({why_none}); training runs on the CPU")
    kinds = {(gpu.name, gpu.memory) for gpu in gpus}
    if len(kinds) > 1:
        names = ", ".join(sorted(f"{name} ({memory})" for name, memory in kinds))
        return do(
            "GPU",
            f"{names} beside each other; choose alike ones with {_CHOICE}, by nvidia-smi's numbers "
            "and with CUDA_DEVICE_ORDER=PCI_BUS_ID, which makes them CUDA's, too",
        )
    gpu = gpus[0]
    if int(gpu.driver.partition(".")[0]) < _DRIVER_OF_CUDA_13:
        return do(
            "GPU",
            f"driver {gpu.driver} is older than CUDA 13, for which torch is built; "
            f"install driver {_DRIVER_OF_CUDA_13} or newer",
        )
    if gpu.capability < _LEAST_CAPABILITY:
        return do(
            "GPU",
            f"{gpu.name} has compute capability {gpu.capability}; use one of "
            f"{_LEAST_CAPABILITY} or above (A100, H100)",
        )
    fp8 = "FP8" if gpu.capability >= _FP8_CAPABILITY else f"no FP8 (from {_FP8_CAPABILITY} on)"
    return ok(
        "GPU",
        f"{len(gpus)} x {gpu.name}, {gpu.memory}, compute capability {gpu.capability} ({fp8}), "
        f"driver {gpu.driver}",
    )


def check_shared_memory(num_gpus: int, folder: Path = Path("/dev/shm")) -> Finding:
    """Room in /dev/shm, which containers by default give 64 MB."""
    needed = _SHARED_MEMORY_BYTES * max(num_gpus, 1)
    if not folder.is_dir():
        return do("shared memory", f"there is no {folder}; mount a tmpfs there")
    usage = shutil.disk_usage(folder)
    found = f"{folder} has {_gib(usage.free)} free of {_gib(usage.total)}"
    if usage.free < needed:
        return do(
            "shared memory",
            f"{found} and {_gib(needed)} may be needed; in a container give --shm-size=16g "
            "(Kubernetes: an emptyDir with medium: Memory), else delete what is left there",
        )
    return ok("shared memory", found)


def check_disk(topic: str, folder: Path, needed_bytes: int = _DISK_BYTES) -> Finding:
    """Room and the right to write where a folder is, or will be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return do(topic, f"{place} can't be written to; mend its rights or use another folder")
    free = shutil.disk_usage(place).free
    found = f"{folder} has {_gib(free)} free"
    if free < needed_bytes:
        return do(topic, f"{found}, and {_gib(needed_bytes)} may be needed; make room")
    return ok(topic, found)


def hub_cache() -> Path:
    """Where the Hugging Face libraries keep what they fetch."""
    return Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))


def check_open_files(needed: int = _OPEN_FILES) -> Finding:
    """The limit that `ulimit -n` shows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        at_most = f" (at most {hard} here)" if hard not in (unlimited, soft) else ""
        return do("open files", f"ulimit -n is {soft}; run `ulimit -n 65536` before{at_most}")
    return ok("open files", f"ulimit -n is {'unlimited' if soft == unlimited else soft}")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"

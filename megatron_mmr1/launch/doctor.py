"""The doctor: one look at a machine, each line OK or what to do. `python tools/doctor.py`.

Composes software.py, hardware.py and network.py; loads no torch, so that it answers at once and on
a machine where nothing works yet.
"""

from __future__ import annotations

from pathlib import Path

from megatron_mmr1.launch import hardware, network, software
from megatron_mmr1.launch.findings import Finding, not_here


def examine(
    checkout: Path, output_dir: Path, port: int | None = None, rendezvous: str | None = None
) -> list[Finding]:
    """Look at everything.

    Args:
        checkout: where the requirements files are.
        output_dir: where runs are to be written.
        port: one that a process is to listen on here; None = none.
        rendezvous: HOST:PORT where nodes are to meet; None = nowhere.

    Raises:
        ValueError: `rendezvous` is not of that form.
    """
    gpus, why_none = hardware.find_gpus()
    has_gpu = bool(gpus)
    findings = [
        software.check_python(),
        *software.check_pins(checkout, has_gpu),
        hardware.check_gpus(gpus, why_none),
        software.check_nccl(has_gpu),
        software.check_transformer_engine(checkout, has_gpu),
        software.check_apex(),
        software.check_triton(),
        software.check_vllm(has_gpu),
        software.check_compiler(),
        software.check_libnuma(),
        hardware.check_shared_memory(len(gpus)),
        hardware.check_open_files(),
        hardware.check_disk("disk, runs", output_dir),
        hardware.check_disk("disk, hub", hardware.hub_cache()),
    ]
    nothing = "none was asked about; add --port 29500"
    findings.append(network.check_port(port) if port else not_here("port", nothing))
    if rendezvous:
        findings += network.check_rendezvous(rendezvous)
    else:
        findings.append(not_here("rendezvous", "one node; with several add --rdzv HOST:PORT"))
    return findings

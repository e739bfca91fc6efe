"""A Slurm of two nodes on this machine: its own daemons, in the namespaces of namespaces.py and a
folder of their own. Touches no Slurm that may be installed here.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from namespaces import TABLE_OF_PROCESSES, Node
from processes import REPOSITORY

_TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
_LOST_AFTER_S = 20  # without a sign of life from a node


def why_no_slurm() -> str | None:
    """What this machine lacks for it; None = nothing."""
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    return f"needs {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else None


_PATH = f"{os.environ['PATH']}:/usr/sbin"


@dataclass
class Cluster:
    """Slurm on two nodes; the first one has the controller."""

    folder: Path
    nodes: list[Node]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def ask(self, *command: str) -> str:
        """Run one of Slurm's commands on the first node, in the checkout."""
        done = subprocess.run(
            [*self.nodes[0].enter, *command],
            capture_output=True,
            text=True,
            env=self._environment,
            cwd=REPOSITORY,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str, key: str) -> str:
        """One of the values that `scontrol show job` prints."""
        words = self.ask("scontrol", "show", "job", number).split()
        return next(w.partition("=")[2] for w in words if w.startswith(f"{key}="))

    def start_node(self, node: Node) -> None:
        self._start(node.name, [*node.enter, *TABLE_OF_PROCESSES, "slurmd", "-D", "-N", node.name])

    def lose_node(self, node: Node) -> None:
        """Kill the daemon and all that it started there, at once."""
        daemon = self.daemons.pop(node.name)
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()

    def start(self) -> None:
        for name in ("state", "munge"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o755)
        (self.folder / "slurm.conf").write_text(_configuration(self.folder, self.nodes))
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{w}-file={self.folder / 'munge' / w}" for w in ("key", "pid", "log", "seed")]
        socket = f"--socket={self.folder / 'munge' / 'socket'}"
        self._start("munge", ["munged", "--foreground", "--force", *files, socket])
        _wait_for(self.folder / "munge" / "socket")
        self._start("controller", [*self.nodes[0].enter, *TABLE_OF_PROCESSES, "slurmctld", "-D"])
        for node in self.nodes:
            self.start_node(node)

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )

    @property
    def _environment(self) -> dict[str, str]:
        ours = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}
        return os.environ | ours | {"PYTHONPATH": str(REPOSITORY)}


@contextmanager
def slurm(folder: Path, nodes: list[Node]) -> Iterator[Cluster]:
    """Run a cluster whose files are in an empty folder."""
    cluster = Cluster(folder, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        for daemon in cluster.daemons.values():
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


def _configuration(folder: Path, nodes: list[Node]) -> str:
    cores = os.cpu_count()
    settings = {
        "ClusterName": "rehearsal",
        "SlurmctldHost": f"{nodes[0].name}({nodes[0].address})",
        "SlurmUser": "root",
        "AuthInfo": f"socket={folder / 'munge' / 'socket'}",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool.%n",
        "SlurmctldPidFile": folder / "controller.pid",
        "SlurmdPidFile": folder / "%n.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "MpiDefault": "none",
        "SlurmdTimeout": _LOST_AFTER_S,
        "ReturnToService": 2,
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    for node in nodes:
        lines.append(f"NodeName={node.name} NodeAddr={node.address} CPUs={cores} State=UNKNOWN")
    names = ",".join(node.name for node in nodes)
    return "\n".join([*lines, f"PartitionName=all Nodes={names} Default=YES State=UP", ""])

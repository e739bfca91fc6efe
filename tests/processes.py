"""Commands as people start them, in processes of their own: what the tests of whole runs share."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT_S = 300
_OF_A_PROCESS_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Finished:
    """A process that has ended."""

    returncode: int
    stdout: str
    stderr: str

    def succeeded(self) -> "Finished":
        assert self.returncode == 0, f"{self.stdout[-2000:]}\n{self.stderr[-4000:]}"
        return self


class Process:
    """A started command with its children, in a process group of its own; output goes to files.

    Args:
        command: what follows `program`.
        inside: what comes before, to run it somewhere else (namespaces.py).
    """

    def __init__(
        self,
        log: Path,
        *command: str,
        program: str = sys.executable,
        inside: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self._paths = log.with_suffix(".out"), log.with_suffix(".err")
        inherited = {k: v for k, v in os.environ.items() if k not in _OF_A_PROCESS_GROUP}
        with self._paths[0].open("w") as out, self._paths[1].open("w") as err:
            self._popen = subprocess.Popen(
                [*inside, program, *command],
                stdout=out,
                stderr=err,
                cwd=REPOSITORY,
                env=inherited | environment,
                start_new_session=True,
            )

    def is_running(self) -> bool:
        return self._popen.poll() is None

    def kill(self) -> None:
        os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def wait(self, limit_s: float = LIMIT_S) -> Finished:
        try:
            self._popen.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
        return Finished(self._popen.returncode, *(path.read_text() for path in self._paths))

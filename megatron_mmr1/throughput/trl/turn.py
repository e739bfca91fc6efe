"""How a side takes its turn: a step when it is told to, what it measured when it is done.

Both sides wait in processes of their own, models loaded, and one works at a time: what else the
machine does in these seconds meets both alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_MARK = "@turn "  # what libraries print is not ours


def wait() -> bool:
    """Say that this side is ready, and wait; False when no more steps are wanted."""
    print(f"{_MARK}ready", flush=True)
    return sys.stdin.readline().strip() == "step"


def report(measured: dict[str, float]) -> None:
    """Say what the step was."""
    print(_MARK + json.dumps(measured), flush=True)


class Side:
    """A side's process, seen from the one that gives the turns.

    Args:
        module: the side's, with its arguments.
        log: where what it says to standard error goes.

    Raises:
        RuntimeError: it ended; the message has the end of its log.
    """

    def __init__(self, module: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self._read("ready")

    def step(self) -> dict[str, float]:
        """Let it take a step."""
        self._write("step")
        measured = json.loads(self._read())
        self._read("ready")
        return measured

    def end(self) -> None:
        """Let it go."""
        self._write("end")
        self._process.wait()

    def kill(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()
        self._process.wait()

    def _write(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _read(self, expected: str | None = None) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                text = line.removeprefix(_MARK).strip()
                assert expected in (None, text), text
                return text
        self._process.wait()
        end = self._log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"a side ended with status {self._process.returncode}; {end}")

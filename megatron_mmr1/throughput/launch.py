"""Measurements at several layouts and numbers of processes, each in a launch of its own.

A launch that is refused, or fails, is an entry of the record with what it said. Imports nothing
heavy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_OF_A_PROCESS_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Point:
    """One launch.

    Attributes:
        kind: layout, weak or strong.
        label: what tables call it.
        processes: how many.
        overrides: key=value, after those of the command line.
    """

    kind: str
    label: str
    processes: int
    overrides: tuple[str, ...] = ()


def points_of(
    layouts: Sequence[str],
    processes: int,
    weak: Sequence[int],
    strong: Sequence[int],
    prompts_per_step: int,
) -> list[Point]:
    """List the launches that a command line asks for.

    Weak scaling gives every process as many prompts as `prompts_per_step` is at the smallest number
    of processes; strong scaling shares out the same step.

    Args:
        layouts: overrides of each, separated by blanks; "" is the experiment as it stands.
        processes: of the layouts.
        weak, strong: numbers of processes.
    """
    points = [
        Point("layout", layout or "as it stands", processes, tuple(layout.split()))
        for layout in layouts
    ]
    points += [
        Point(
            "weak",
            f"weak, {number}",
            number,
            (f"prompts_per_step={prompts_per_step * number // min(weak)}",),
        )
        for number in weak
    ]
    return points + [Point("strong", f"strong, {number}", number) for number in strong]


def run_points(
    points: Sequence[Point],
    command: Sequence[str],
    folder: Path,
    say: Callable[[str], None],
    environment: dict[str, str],
    refusal: Callable[[Point], str],
) -> list[dict[str, Any]]:
    """Launch one after the other; return an entry each, in their order.

    Args:
        command: script and arguments, which takes `--record FILE` and further overrides.
        folder: for the launches' logs and records; must exist.
        refusal: why a point need not be launched; "" = it may.
    """
    entries = []
    for number, point in enumerate(points, 1):
        say(f"[{number}/{len(points)}] {point.label}, {point.processes} process(es)")
        if why := refusal(point):
            entries.append(asdict(point) | {"error": why})
            say(f"  {why}")
            continue
        start = time.monotonic()
        record, log = folder / f"point_{number}.json", folder / f"point_{number}.log"
        record.unlink(missing_ok=True)
        status = _launch(point, [*command, "--record", str(record)], log, say, environment)
        entry: dict[str, Any] = asdict(point) | {"launch_s": time.monotonic() - start}
        if status == 0 and record.exists():
            entry |= json.loads(record.read_text(encoding="utf-8"))
        else:
            entry["error"] = reason(log.read_text(errors="replace"), status)
            say(f"  {entry['error']}")
        entries.append(entry)
    return entries


def reason(log: str, status: int) -> str:
    """Return what a launch that came to nothing said: its one line to the user, or its last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    refusals = [line for line in lines if line.startswith("error: ")]
    errors = [line for line in lines if "Error" in line]
    if refusals:
        return refusals[0].removeprefix("error: ")
    found = errors[-1:] or lines[-1:] or ["it said nothing"]
    return f"{found[0]} (exit status {status})"


def _launch(
    point: Point,
    command: Sequence[str],
    log: Path,
    say: Callable[[str], None],
    environment: dict[str, str],
) -> int:
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={point.processes}"]
    launcher = torchrun if point.processes > 1 else []
    # A caller's own process group must not be taken for this launch's.
    inherited = {k: v for k, v in environment.items() if k not in _OF_A_PROCESS_GROUP}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *launcher, *command, *point.overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=inherited,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if line.startswith(("step ", "warm-up ")):
                    say(f"  {line.rstrip()}")
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()

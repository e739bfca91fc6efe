#!/usr/bin/env python3
"""Runs a stage of the Dockerfile without a container engine: its own steps, in a clean root.

    sudo examples/container/rehearse.py --root DIR [--stage demo] [--cmd]

DIR holds a minimal Debian (debootstrap) with what the stage's base image would bring; README.md
says how it was made. The steps are read from the Dockerfile, so that the rehearsal cannot drift
from it: RUN, as the user and in the folder that USER and WORKDIR say, with a clean environment;
COPY of what git tracks, less .dockerignore; ARG and ENV; and with --cmd at last CMD. Not rehearsed:
layers, the base image itself, and options of RUN.

Each step has mount and process namespaces of its own: mounts are gone when it ends. Needs root.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# How the network is reached is no part of the image.
PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "PIP_CERT", "UV_CACHE_DIR")


@dataclass(frozen=True)
class Step:
    """One instruction of a stage, its continuation lines joined."""

    line: int
    instruction: str
    argument: str


def stage_steps(dockerfile: str, stage: str) -> list[Step]:
    """Return the steps of a stage, without its FROM.

    Raises:
        ValueError: no such stage, or an option of RUN or COPY that a rehearsal can't follow.
    """
    steps, is_inside = [], False
    for step in _instructions(dockerfile):
        if step.instruction == "FROM":
            is_inside = re.search(rf"\sAS\s+{re.escape(stage)}$", step.argument, re.I) is not None
        elif is_inside:
            option = re.match(r"--(?!chown=)\S+", step.argument)
            if option or "<<" in step.argument:
                raise ValueError(f"line {step.line}: {option or '<<'} can't be rehearsed")
            steps.append(step)
    if not steps:
        raise ValueError(f"the Dockerfile has no stage {stage!r}")
    return steps


def _instructions(text: str) -> Iterator[Step]:
    parts: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or not (parts or line.strip()):
            continue
        first = first if parts else number
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            instruction, _, argument = "".join(parts).strip().partition(" ")
            yield Step(first, instruction.upper(), argument.strip())
            parts = []


@dataclass
class Rehearsal:
    """A root in which steps run one after another.

    Attributes:
        root: the folder that stands in for the image.
        user, folder, environment: as the steps before have set them.
    """

    root: Path
    user: str = "0"
    folder: str = "/"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})

    def run(self, step: Step, runs_cmd: bool) -> None:
        """Follow one step."""
        if step.instruction == "RUN":
            self._shell(step.argument)
        elif step.instruction in ("ENV", "ARG"):
            for assignment in shlex.split(step.argument):
                name, _, value = assignment.partition("=")
                known = self.environment
                self.environment[name] = re.sub(
                    r"\$\{?(\w+)\}?", lambda found, known=known: known.get(found[1], ""), value
                )
        elif step.instruction == "USER":
            self.user = step.argument
        elif step.instruction == "WORKDIR":
            self.folder = step.argument
            self._inside(step.argument).mkdir(parents=True, exist_ok=True)
        elif step.instruction == "COPY":
            self._copy(step.argument)
        elif step.instruction == "CMD" and runs_cmd:
            self._shell(shlex.join(json.loads(step.argument)))
        elif step.instruction != "CMD":
            raise ValueError(f"line {step.line}: {step.instruction} can't be rehearsed")

    def _shell(self, command: str) -> None:
        """Run a command in the root, as the user, in the folder, with this environment alone."""
        home = self._home()
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        variables = [f"{k}={v}" for k, v in (passed | self.environment | {"HOME": home}).items()]
        inner = ["env", "-i", *variables, "sh", "-c", f"cd {shlex.quote(self.folder)} && {command}"]
        chroot = ["chroot", f"--userspec={self.user}", "--groups=", str(self.root), *inner]
        root = shlex.quote(str(self.root))
        mounts = f"mount -t proc proc {root}/proc && mount -t tmpfs tmpfs {root}/dev/shm"
        subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-c", f"{mounts} && exec \"$@\"", "sh",
             *chroot],
            check=True,
        )  # fmt: skip

    def _copy(self, argument: str) -> None:
        owner = re.match(r"--chown=(\S+)\s+", argument)
        *sources, target = argument.split()[1 if owner else 0 :]
        place = self._inside(os.path.join(self.folder, target))
        for name in _context():
            if sources != ["."] and name not in sources:
                continue
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, place / name, follow_symlinks=False)
        if owner:
            subprocess.run(
                ["chroot", str(self.root), "chown", "-R", owner[1], "/" + str(
                    place.relative_to(self.root)
                )],
                check=True,
            )  # fmt: skip

    def _home(self) -> str:
        for line in self._inside("/etc/passwd").read_text().splitlines():
            name, _, uid, _, _, home, _ = line.split(":")
            if self.user in (name, uid):
                return home
        return "/"

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")


def _context() -> list[str]:
    """What COPY sees: tracked files, less .dockerignore."""
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={REPOSITORY}", "ls-files"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line.removeprefix("**/") for line in lines if line and not line.startswith("#")]
    return [
        name
        for name in listed.stdout.splitlines()
        if not any(fnmatch.fnmatch(part, p) for part in Path(name).parts for p in patterns)
        and (REPOSITORY / name).exists()
    ]


def main() -> None:
    """Follow the steps, and say what each took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="a minimal Debian")
    parser.add_argument("--stage", default="demo")
    parser.add_argument("--cmd", action="store_true", help="run CMD, too")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("error: chroot needs root; run it with sudo")
    if not (options.root / "etc/debian_version").is_file() or options.root.resolve() == Path("/"):
        sys.exit(f"error: --root {options.root} holds no Debian; make one with debootstrap")
    rehearsal = Rehearsal(options.root.resolve())
    for step in stage_steps((REPOSITORY / "Dockerfile").read_text(), options.stage):
        shown = " ".join(step.argument.split())
        print(f"line {step.line}: {step.instruction} {shown}", flush=True)
        start = time.monotonic()
        rehearsal.run(step, options.cmd)
        print(f"    done in {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()

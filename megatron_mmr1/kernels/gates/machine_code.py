"""A compiled kernel's machine code (SASS), read with the disassembler that Triton brings along."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton import knobs
from triton.compiler import CompiledKernel
from triton.knobs import NvidiaTool

_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_LABEL = re.compile(r"\s*(\.L\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_BRANCH = re.compile(r"BRA.*`\((\.L\w+)\)")


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop: its instructions, without their predicates, in the order of memory."""

    instructions: tuple[str, ...]

    def num(self, opcode: str) -> int:
        """Return how many instructions begin with `opcode`, such as MUFU.EX2."""
        return _num(self.instructions, opcode)

    def widths(self, opcode: str) -> list[int]:
        """Return the bits of each access, of opcode LDG (loads) or STG (stores)."""
        return [_bits(line) for line in self.instructions if line.startswith(opcode)]


@dataclass(frozen=True, slots=True)
class MachineCode:
    """One kernel for one architecture. `local_bytes`: of a thread, stack included."""

    registers: int
    local_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...]
    loops: tuple[Loop, ...]

    @property
    def num_spills(self) -> int:
        """Return the accesses to local memory."""
        return _num(self.instructions, "STL") + _num(self.instructions, "LDL")


def read(kernel: CompiledKernel) -> MachineCode:
    """Disassemble a compiled kernel."""
    with tempfile.TemporaryDirectory(prefix="gates-") as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = run_tool("cuobjdump", "-res-usage", str(cubin))
        listing = run_tool("nvdisasm", "-c", str(cubin))
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions, loops = parse(listing)
    local = used["STACK"] + used["LOCAL"]
    return MachineCode(used["REG"], local, kernel.metadata.shared, instructions, loops)


def parse(listing: str) -> tuple[tuple[str, ...], tuple[Loop, ...]]:
    """Return the instructions of `nvdisasm -c`, and its innermost loops: backward branches."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(found[1])
            branch = _BRANCH.match(found[1])
            if branch and branch[1] in labels and labels[branch[1]] < len(instructions) - 1:
                spans.append((labels[branch[1]], len(instructions)))
    inner = [
        (start, end)
        for start, end in spans
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in spans)
    ]
    return tuple(instructions), tuple(Loop(tuple(instructions[a:b])) for a, b in inner)


def run_tool(name: str, *arguments: str) -> str:
    """Run one of the CUDA tools and return what it prints."""
    command = [tool(name).path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tool(name: str) -> NvidiaTool:
    """Return path and version of one of the CUDA tools that come with Triton.

    Raises:
        ValueError: it is missing.
    """
    try:
        return getattr(knobs.nvidia, name)
    except RuntimeError as error:
        raise ValueError(
            f"{error}, which comes with the triton wheel: install triton anew, or set "
            f"TRITON_{name.upper()}_PATH to the program of a CUDA toolkit"
        ) from error


def _num(instructions: tuple[str, ...], opcode: str) -> int:
    return sum(line.startswith(opcode) for line in instructions)


def _bits(instruction: str) -> int:
    """Bits of an access from its opcode's last part that names a width; 32 without one."""
    parts = instruction.split()[0].split(".")
    return next((_BITS[part] for part in reversed(parts) if part in _BITS), 32)

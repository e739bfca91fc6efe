"""Gates on machine code, by path and architecture; and on one compilation for all lengths."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import triton

from megatron_mmr1.kernels.gates import controls, machine_code
from megatron_mmr1.kernels.gates.launches import Launch, pretended_ranks, recorded
from megatron_mmr1.kernels.gates.machine_code import Loop, MachineCode
from megatron_mmr1.kernels.gates.paths import ROW_PATHS, SEQUENCE_PATHS, Path, RowPath, Size
from megatron_mmr1.kernels.gates.table import Gate

ARCHITECTURES = (80, 90, 100)
TP_SIZE = 8
# Of a thread. A row of fp32 has the same logits in twice as many registers.
MAX_REGISTERS = {"row": 64, "fp32 row": 80, "sequence": 160}
MAX_SHARED_BYTES = 4096  # of a program: far below what would bound how many an SM holds
ACCESS_BITS = 128
# Forward and backward, without and with the entropy's gradient.
MAX_INSTRUCTIONS = {False: 15.0, True: 20.0}
_EXPONENTIALS = 4  # or more in a loop over the vocabulary; other loops of row kernels have none
_LENGTHS = (
    Size(1, 1000, num_sequences=1, num_rewards=1, num_banned=0),
    Size(16, 1000, num_sequences=16, num_rewards=16, num_banned=1),
    Size(17, 1000, num_sequences=17, num_rewards=17, num_banned=16, first_row=16),
    Size(4096, 1000, num_sequences=2, num_rewards=8, num_banned=2, first_row=1),
    Size(997, 1000, num_sequences=1, num_rewards=512, num_banned=3, first_row=4096),
)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A launch's machine code for one architecture."""

    launch: Launch
    arch: int
    code: MachineCode

    @property
    def is_row(self) -> bool:
        """Whether it goes over the vocabulary."""
        return "logits" in self.launch.arguments


def compiled_gates() -> list[Gate]:
    """Compile every path for every architecture and judge it; then the controls."""
    with pretended_ranks(TP_SIZE):
        launches = {path: launches_of(path, Size()) for path in (*ROW_PATHS, *SEQUENCE_PATHS)}
        one_compilation = list(_one_compilation(launches))
    todo = [(x, arch) for found in launches.values() for x in found for arch in ARCHITECTURES]
    bad = {control: control.launch(launches) for control in controls.CODE}
    todo += [(launch, 90) for launch in bad.values()]
    compiled = compile_all(todo)
    gates, seen = [], set[str]()
    for path, found in launches.items():
        parts = [compiled[x.key(arch)] for x in found for arch in ARCHITECTURES]
        for part in parts:
            key = part.launch.key(part.arch)
            if key not in seen:
                gates += code_gates(f"{_name(part.launch)}: {path.name}", part)
            seen.add(key)
        if isinstance(path, RowPath) and path.upstream != "none":
            gates += _instruction_gates(path, parts)
    gates += one_compilation
    for control, launch in bad.items():
        made = code_gates(control.subject, compiled[launch.key(90)])
        gates += [control.of(gate) for gate in made if gate.name in control.gates]
    costly = next(p for p in launches if isinstance(p, RowPath) and p.has_entropy)
    cost = _instructions(compiled[x.key(90)] for x in launches[costly])
    gates.append(
        Gate(
            f"{costly.name}, as if without", "instructions a logit", "sm_90",
            cost, "<=", MAX_INSTRUCTIONS[False], is_control=True,
        )
    )  # fmt: skip
    return [*gates, controls.vocabulary_sizes()]


def versions() -> str:
    """Return the versions of what compiles."""
    old, new = machine_code.tool("ptxas"), machine_code.tool("ptxas_blackwell")
    return f"Triton {triton.__version__}, ptxas {old.version} (sm_100: {new.version})"


def launches_of(path: Path, size: Size) -> list[Launch]:
    """Return what a path would launch."""
    with recorded() as launches:
        path.call(size)
    return launches


def compile_all(todo: Iterable[tuple[Launch, int]]) -> dict[str, Compiled]:
    """Compile launches for architectures; by the launch's key, so that each is done once."""
    unique = {launch.key(arch): (launch, arch) for launch, arch in todo}

    def one(job: tuple[Launch, int]) -> Compiled:
        launch, arch = job
        return Compiled(launch, arch, machine_code.read(launch.compile(arch)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(unique, pool.map(one, unique.values()), strict=True))


def code_gates(subject: str, part: Compiled) -> list[Gate]:
    """Judge one kernel's machine code."""
    code, place, kind = part.code, f"sm_{part.arch}", "row" if part.is_row else "sequence"
    if part.is_row and part.launch.arguments["logits"].element_size() == 4:
        kind = "fp32 row"
    gates = [
        Gate(subject, "registers", place, code.registers, "<=", MAX_REGISTERS[kind]),
        Gate(subject, "spills", place, code.num_spills, "==", 0),
        Gate(subject, "local bytes", place, code.local_bytes, "==", 0),
        Gate(subject, "shared bytes", place, code.shared_bytes, "<=", MAX_SHARED_BYTES),
    ]
    if part.is_row:
        over_vocabulary = [*_loops(code), *_zero_loops(code)]
        barriers = sum(loop.num("BAR") for loop in over_vocabulary)
        widths = [
            width for loop in over_vocabulary for op in ("LDG", "STG") for width in loop.widths(op)
        ]
        gates += [
            Gate(subject, "barriers in loops", place, barriers, "==", 0),
            Gate(subject, "narrowest access", place, min(widths, default=0), ">=", ACCESS_BITS),
        ]
    return gates


def _loops(code: MachineCode) -> list[Loop]:
    """The loops over the vocabulary, known by their exponentials."""
    return [loop for loop in code.loops if loop.num("MUFU.EX2") >= _EXPONENTIALS]


def _zero_loops(code: MachineCode) -> list[Loop]:
    """The loop that zeroes a row without gradient: it stores and loads nothing."""
    return [loop for loop in code.loops if loop.num("STG") and not loop.num("LDG")]


def _instruction_gates(path: RowPath, parts: Sequence[Compiled]) -> Iterable[Gate]:
    for arch in ARCHITECTURES:
        found = _instructions(part for part in parts if part.arch == arch)
        limit = MAX_INSTRUCTIONS[path.has_entropy]
        yield Gate(path.name, "instructions a logit", f"sm_{arch}", found, "<=", limit)


def _instructions(parts: Iterable[Compiled]) -> float:
    """Instructions a logit, forward and backward; inf when a loop of either is not found."""
    costs: dict[bool, float] = {}
    for part in parts:
        bits = 8 * part.launch.arguments["logits"].element_size()
        for loop in _loops(part.code):
            # The masked last tile has a loop or a branch of its own, which costs more.
            is_backward = loop.num("STG") > 0
            cost = len(loop.instructions) * bits / sum(loop.widths("LDG"))
            costs[is_backward] = min(cost, costs.get(is_backward, float("inf")))
    return sum(costs.values()) if len(costs) == 2 else float("inf")


def _one_compilation(paths: Iterable[Path]) -> Iterable[Gate]:
    """Judge how many compiled forms a kernel needs on a path for lengths that differ much."""
    kernels: dict[str, list[int]] = {}
    for path in paths:
        keys: dict[str, set[str]] = {}
        for size in _LENGTHS:
            for launch in launches_of(path, size):
                keys.setdefault(_name(launch), set()).add(launch.key(90))
        for name, found in keys.items():
            kernels.setdefault(name, []).append(len(found))
    for name, numbers in kernels.items():
        subject, place = f"{name} kernel, {len(numbers)} paths", f"{len(_LENGTHS)} lengths each"
        yield Gate(subject, "compilations", place, max(numbers), "==", 1)


def _name(launch: Launch) -> str:
    return launch.kernel.fn.__name__.removesuffix("_kernel")

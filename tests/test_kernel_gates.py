"""The gates on the Triton kernels' machine code, bytes and launches; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "check_kernel_gates.py"
LISTING = """
.text.some_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   IMAD.MOV.U32 R0, RZ, RZ, RZ ;
.L_x_1:
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/             @!UP1 LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/                   STL [R1], R6 ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
        /*00b0*/                   NOP;
"""


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every gate's result, as the tool writes it; it must end well."""
    folder = tmp_path_factory.mktemp("gates")
    run = subprocess.run(
        [sys.executable, str(TOOL), "--json", "gates.json", "--markdown", "gates.md"],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "FAIL**" not in (folder / "gates.md").read_text()
    return json.loads((folder / "gates.json").read_text())


def test_every_quantity_is_judged_on_every_architecture(gates: list[dict[str, Any]]):
    judged = {(g["name"], g["place"]) for g in gates if not g["is_control"]}
    on_code = {
        "registers", "spills", "local bytes", "shared bytes", "barriers in loops",
        "narrowest access", "instructions a logit",
    }  # fmt: skip
    assert {pair for pair in judged if pair[1].startswith("sm_")} == {
        (name, f"sm_{arch}") for name in on_code for arch in (80, 90, 100)
    }
    assert {name for name, place in judged if not place.startswith("sm_")} == {
        "compilations", "bytes a logit", "bytes a token", "launches",
    }  # fmt: skip
    assert all(g["is_good"] for g in gates)


def test_a_worsened_kernel_fails_each_gate_that_it_should(gates: list[dict[str, Any]]):
    caught = {g["name"] for g in gates if g["is_control"] and g["is_good"]}
    assert caught == {
        "registers", "spills", "local bytes", "barriers in loops", "narrowest access",
        "instructions a logit", "compilations", "bytes a logit", "launches",
    }  # fmt: skip


def test_the_disassembly_is_read():
    from megatron_mmr1.kernels.gates.machine_code import parse

    instructions, loops = parse(LISTING)
    assert len(instructions) == 12
    (loop,) = loops  # neither the outer one nor the endless one behind the kernel's end
    assert len(loop.instructions) == 6
    assert loop.widths("LDG") == [128, 16]
    assert loop.widths("STG") == [32]
    assert (loop.num("MUFU.EX2"), loop.num("BAR")) == (1, 1)


@pytest.mark.parametrize(
    ("sign", "found", "is_within"),
    [
        ("<=", 64, True),
        ("<=", 65, False),
        (">=", 63, False),
        ("==", 64, True),
        ("~", 64.5, True),
        ("~", 65, False),  # more than 1% above
        ("~", 63.9, False),  # less: not all was counted
    ],
)
def test_a_limit_holds_and_a_control_must_break_it(sign: str, found: float, is_within: bool):
    from megatron_mmr1.kernels.gates.table import Gate, as_markdown

    gate = Gate("kernel", "registers", "sm_90", found, sign, 64)
    assert gate.is_good == is_within
    assert ("FAIL" in as_markdown([gate], "")) != is_within
    control = Gate("kernel", "registers", "sm_90", found, sign, 64, is_control=True)
    assert control.is_good != is_within
    assert ("NOT CAUGHT" in as_markdown([control], "")) == is_within

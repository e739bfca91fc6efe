"""Are the kernels as lean as they should be? Compiles and counts, on a machine without a GPU.

    python tools/check_kernel_gates.py                                # prints the tables
    python tools/check_kernel_gates.py --markdown docs/kernel_gates.md   # `make kernel-gates`

Registers, spills, accesses, instructions and launches of the Triton kernels for sm_80, sm_90 and
sm_100, against limits. Exit status 1 when one is out of bounds or a negative control is not caught.
A minute; less when Triton's cache has the kernels.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megatron_mmr1.cli import run_main
from megatron_mmr1.kernels.gates.compiled import compiled_gates, versions
from megatron_mmr1.kernels.gates.counted import counted_gates
from megatron_mmr1.kernels.gates.table import as_markdown, summary


def main() -> None:
    """Judge all gates, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--json", type=Path, help="also write each gate's result to this file")
    options = parser.parse_args()
    compilers = versions()
    gates = [*compiled_gates(), *counted_gates()]
    text = as_markdown(gates, compilers)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        found = [{**asdict(gate), "is_good": gate.is_good} for gate in gates]
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    for gate in gates:
        if not gate.is_good:
            what = f"{gate.subject}, {gate.place}: {gate.name} {gate.found:g}"
            print(f"{gate.verdict}: {what}, must be {gate.bound}")
    print(summary(gates))
    raise SystemExit(0 if all(gate.is_good for gate in gates) else 1)


if __name__ == "__main__":
    run_main(main)

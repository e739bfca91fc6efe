"""Study FP8 training on the tiny model, on a CPU, by emulation: examples/fp8.

Usage: python tools/study_fp8.py [--seeds 3] [--out examples/fp8]

Each seed starts from its own cold start (outputs/digits_sft/learning_seedN, as `make learning`
leaves it). The runs that are not there yet are made in outputs/formats, one after the other, about
a minute and a half each; interrupt it at any time and start it again. Then errors are measured on
the responses of the float32 runs' first step, and study.json and README.md written.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from megatron_mmr1.bakeoff.formats import runs

_FOLDER = Path("outputs/formats")


def main() -> None:
    """Make what is missing, each dtype in a process of its own, then measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("examples/fp8"))
    parser.add_argument("--only", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cold_starts = [_cold_start(seed) for seed in range(arguments.seeds)]
    if arguments.only:
        runs.make(_FOLDER, arguments.only, cold_starts)
        return
    for dtype in ("float32", "bfloat16"):
        # An engine has one dtype.
        command = [sys.executable, __file__, "--seeds", str(arguments.seeds), "--only", dtype]
        subprocess.run(command, check=True)
    from megatron_mmr1.bakeoff.formats import errors, results

    arguments.out.mkdir(parents=True, exist_ok=True)
    measured = errors.measure(_FOLDER, cold_starts)
    results.write(arguments.out, _FOLDER, measured, arguments.seeds)
    print((arguments.out / "README.md").read_text(encoding="utf-8"))


def _cold_start(seed: int) -> Path:
    """Return the Hugging Face folder of a seed's cold start; made here if it is not there."""
    folder = Path(f"outputs/digits_sft/learning_seed{seed}/hf")
    if not folder.exists():
        run = [f"run=learning_seed{seed}", f"seed={seed}"]
        subprocess.run([sys.executable, "-m", "megatron_mmr1.sft", *run], check=True)
    return folder


if __name__ == "__main__":
    main()

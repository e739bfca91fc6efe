"""Convert a Megatron checkpoint to a Hugging Face model folder.

    python tools/convert_megatron_to_hf.py --megatron DIR --hf OUT [--template DIR] [--verify]
    torchrun --nproc-per-node 8 tools/convert_megatron_to_hf.py --megatron DIR --hf OUT

DIR is what convert_hf_to_megatron.py wrote, or a training checkpoint, RUN/checkpoints/step_N, saved
at any parallel layout; its optimizer is left out. Config, tokenizer, processor and the cut into
files come from DIR/hf, or from the run's model.path, unless --template names another model folder.
OUT must not exist yet. One parameter is in memory at a time; no GPU is needed. --verify reads both
sides again and compares them bit for bit; exit status 1 when something differs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conversion_command import finish, start, with_progress

from megatron_mmr1.cli import run_main


def main() -> None:
    """Convert, and verify if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megatron", type=Path, required=True, help="checkpoint to read")
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--template", type=Path, help="model folder for config and tokenizer")
    parser.add_argument("--verify", action="store_true", help="compare both sides bit for bit")
    args = parser.parse_args()
    start()
    from megatron_mmr1.backend.conversion import convert_megatron_to_hf

    report = with_progress(
        "converting",
        lambda on: convert_megatron_to_hf(args.megatron, args.hf, args.template, on),
    )
    raise SystemExit(finish(report, args.hf, args.hf, args.megatron, args.verify))


if __name__ == "__main__":
    run_main(main)

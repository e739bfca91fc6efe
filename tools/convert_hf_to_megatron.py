"""Convert a Hugging Face model folder to a Megatron checkpoint that loads at any parallel layout.

    python tools/convert_hf_to_megatron.py --hf DIR --megatron OUT [--verify]
    torchrun --nproc-per-node 8 tools/convert_hf_to_megatron.py --hf DIR --megatron OUT

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
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder to read")
    parser.add_argument("--megatron", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--verify", action="store_true", help="compare both sides bit for bit")
    args = parser.parse_args()
    start()
    from megatron_mmr1.backend.conversion import convert_hf_to_megatron

    report = with_progress(
        "converting", lambda on: convert_hf_to_megatron(args.hf, args.megatron, on)
    )
    raise SystemExit(finish(report, args.megatron, args.hf, args.megatron, args.verify))


if __name__ == "__main__":
    run_main(main)

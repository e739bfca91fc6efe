"""Entry point: `python -m megatron_mmr1.report RUN_DIR` writes a run's `report.html`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_mmr1.observability.report import write_report


def main() -> int:
    """Write the report and print its path; exit status 2 when the folder holds no run."""
    parser = argparse.ArgumentParser(prog="python -m megatron_mmr1.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="outputs/EXPERIMENT/RUN")
    run_dir: Path = parser.parse_args().run_dir
    if problem := _what_is_missing(run_dir):
        print(problem, file=sys.stderr)
        return 2
    print(write_report(run_dir))
    return 0


def _what_is_missing(run_dir: Path) -> str | None:
    if not run_dir.is_dir():
        return f"{run_dir} is not a folder; pass a run folder, outputs/EXPERIMENT/RUN"
    if (run_dir / "metrics.jsonl").is_file():
        return None
    runs = sorted(path.parent for path in run_dir.glob("**/metrics.jsonl"))
    remedy = f"pass {runs[-1]}" if runs else "pass a run folder, outputs/EXPERIMENT/RUN"
    return f"{run_dir} holds no metrics.jsonl, so it is not a run folder; {remedy}"


if __name__ == "__main__":
    sys.exit(main())

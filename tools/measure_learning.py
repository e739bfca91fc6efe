"""Measure what GRPO adds to the cold start on the embedded task, over seeds: the README's table.

Usage: python tools/measure_learning.py [--seeds 3] [--experiment digits] [--out FILE]

Each seed is a cold start and a GRPO run of its own, in folders under outputs/; finished ones are
reused, so an interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from megatron_mmr1.observability.metrics import read_metrics


def main() -> None:
    """Run the seeds, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--experiment", default="digits")
    parser.add_argument("--out", type=Path, default=Path("examples/digits/results.md"))
    arguments = parser.parse_args()
    rows = [_run_seed(arguments.experiment, seed) for seed in range(arguments.seeds)]
    table = _table(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(table, encoding="utf-8")
    print(table)


def _run_seed(experiment: str, seed: int) -> dict[str, float]:
    run = f"learning_seed{seed}"
    cold_start = Path("outputs/digits_sft") / run
    run_dir = Path("outputs") / experiment / run
    if not (cold_start / "hf").exists():
        shutil.rmtree(cold_start, ignore_errors=True)  # a cold start has no resume
        _python("megatron_mmr1.sft", f"run={run}", f"seed={seed}")
    if not (run_dir / "hf").exists():
        _python(
            "megatron_mmr1.train",
            f"experiment={experiment}",
            f"run={run}",
            f"seed={seed}",
            f"model.path={cold_start / 'hf'}",
            "resume=auto",
        )
    evaluated = [r for r in read_metrics(run_dir) if r.get("eval/accuracy_sampled") is not None]
    first, last = evaluated[0], evaluated[-1]
    minutes = [
        sum(row.get("time/step_s") or 0.0 for row in read_metrics(folder)) / 60
        for folder in (cold_start, run_dir)
    ]
    row = {"seed": seed, "cold start minutes": minutes[0], "GRPO minutes": minutes[1]}
    for name in ("sampled", "greedy"):
        row[f"{name} before"] = 100 * first[f"eval/accuracy_{name}"]
        row[f"{name} after"] = 100 * last[f"eval/accuracy_{name}"]
        row[f"{name} gain"] = row[f"{name} after"] - row[f"{name} before"]
    return row


def _python(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def _table(rows: list[dict[str, float]]) -> str:
    columns = [
        "sampled before", "sampled after", "sampled gain",
        "greedy before", "greedy after", "greedy gain",
        "cold start minutes", "GRPO minutes",
    ]  # fmt: skip
    lines = ["| seed | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for row in rows:
        lines.append(
            f"| {row['seed']:.0f} | " + " | ".join(f"{row[c]:.1f}" for c in columns) + " |"
        )
    if len(rows) > 1:
        values = {c: [row[c] for row in rows] for c in columns}
        for name, of in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
            lines.append(
                f"| {name} | " + " | ".join(f"{of(values[c]):.1f}" for c in columns) + " |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

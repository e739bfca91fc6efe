"""The short table at the end of a run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_mmr1.observability.metrics import read_metrics


def print_summary(run_dir: Path, report: Path) -> None:
    """Print held-out accuracy before and after, the run's time, and where report and model are."""
    rows = read_metrics(run_dir)
    evaluated = [row for row in rows if row.get("eval/accuracy_sampled") is not None]
    console = Console()
    if len(evaluated) > 1:
        first, last = evaluated[0], evaluated[-1]
        table = Table("held-out accuracy", "before", "after", "gain", title=str(run_dir))
        for name in ("sampled", "greedy"):
            before, after = (float(r[f"eval/accuracy_{name}"]) for r in (first, last))
            table.add_row(
                name, f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points"
            )
        console.print(table)
    minutes = sum(row.get("time/step_s") or 0.0 for row in rows) / 60
    console.print(f"{rows[-1]['step']} steps in {minutes:.1f} minutes", highlight=False)
    console.print(f"report: {report}\nmodel:  {run_dir / 'hf'}", highlight=False, soft_wrap=True)

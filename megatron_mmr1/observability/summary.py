"""The short table at the end of a run, and of an evaluation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_mmr1.observability.metrics import read_metrics
from megatron_mmr1.observability.report_evaluation import interval, percent


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


def print_evaluation(summary: dict[str, Any], report: Path) -> None:
    """Print an evaluation's accuracy, overall and by group, and where its report is."""
    how = "greedy" if not summary["temperature"] else f"sampled at T={summary['temperature']:g}"
    overall = summary["overall"]
    table = Table("", title=escape(f"{summary['name']} on {summary['benchmark']}, {how}"))
    for name in ("answers", "strict", "95%", "compat", "95%", "unscored", "cut off"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("overall", *_cells(overall), end_section=True)
    for group, values in summary["groups"].items():
        for value, numbers in values.items():
            table.add_row(escape(f"{group}: {value}"), *_cells(numbers))
        table.add_section()
    # A pipe is taken for 80 columns, which would cut the words.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for rule in ("strict", "compat"):
        accuracy = overall[rule]
        if accuracy["num_unscored"]:
            print(
                f"{rule}: {accuracy['num_unscored']} answers are unscored and in no denominator; "
                f"with them the accuracy lies between {accuracy['lowest']:.1%} and "
                f"{accuracy['highest']:.1%}"
            )
    for reason, count in summary["unscored_reasons"].items():
        print(f"  strict, {count} x {reason}")
    if summary["num_bad_rows"]:
        print(f"{summary['num_bad_rows']} rows were set aside, see bad_rows.jsonl")
    if summary["benchmark"] == "digits":
        print(f"{summary['num_well_formed']} of {overall['num_responses']} are well formed")
    print(f"report: {report}")


def _cells(numbers: dict[str, Any]) -> list[str]:
    cells = [f"{numbers['num_responses']:,}"]
    for rule in ("strict", "compat"):
        cells += [percent(numbers[rule]["value"]), interval(numbers[rule])]
    return [*cells, f"{numbers['strict']['num_unscored']:,}", f"{numbers['num_cut_off']:,}"]

"""Compare evaluations question by question, or lay several out as a table.

    python tools/compare_evaluations.py RUN_A RUN_B [--rule compat] [--out DIR]
    python tools/compare_evaluations.py RUN_A RUN_B RUN_C ... [--out DIR]

A RUN is an output folder of `python -m megatron_mmr1.evaluate`. Two runs of one benchmark: the
difference of accuracy, B minus A, on the questions that are scored in both, with a paired bootstrap
interval and a p-value; MathVerse's versions of a problem are drawn together. Three and more (or
--table): rows of models, columns of benchmarks, the average last, and the paired differences to the
first model. Printed, and written to DIR/comparison.md and DIR/comparison.html.
"""

from __future__ import annotations

import argparse
import math
from html import escape
from pathlib import Path

from megatron_mmr1.cli import run_main
from megatron_mmr1.evaluation.comparison import (
    Run,
    Table,
    compare_runs,
    read_run,
    table_of,
)
from megatron_mmr1.evaluation.questions import Answered
from megatron_mmr1.evaluation.statistics import Accuracy, Comparison, Rule, accuracy
from megatron_mmr1.observability.template import card, page

Rows = list[list[str]]  # the first one holds the headings


def main() -> None:
    """Read, compare, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="two or more evaluation folders")
    parser.add_argument("--rule", choices=("strict", "compat"), default="strict")
    parser.add_argument("--table", action="store_true", help="a table for two runs as well")
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluate/comparison"))
    args = parser.parse_args()
    if len(args.runs) < 2:
        raise ValueError("one run has nothing to be compared with; give two or more")
    runs = [read_run(folder) for folder in args.runs]
    if len(runs) == 2 and not args.table:
        title, parts = _pair(runs[0], runs[1], args.rule)
    else:
        title, parts = _table(table_of(runs, args.rule), args.rule)
    text = f"# {_plain(title)}\n\n" + "\n".join(
        f"## {_plain(heading)}\n\n{_markdown(rows)}\n{note}\n" for heading, rows, note in parts
    )
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "comparison.md").write_text(text, encoding="utf-8")
    body = f"<header><h1>{escape(title)}</h1></header>" + "".join(
        f'<h2></h2><div class="stack">{card(heading, _html(rows), note)}</div>'
        for heading, rows, note in parts
    )
    (args.out / "comparison.html").write_text(page(title, body), encoding="utf-8")
    print(f"written: {args.out / 'comparison.md'}, {args.out / 'comparison.html'}")


def _pair(first: Run, second: Run, rule: Rule) -> tuple[str, list[tuple[str, Rows, str]]]:
    whole = compare_runs(first, second, rule)
    parts = []
    for group, pairs in _by_group(first, second).items():
        rows = [["", first.name, second.name, "difference", "95%", "p", "questions"]]
        for value, (ours, theirs) in pairs.items():
            before, after = accuracy(ours, rule), accuracy(theirs, rule)
            try:
                comparison = compare_runs(_only(first, ours), _only(second, theirs), rule)
            except ValueError:  # a group in which no question is scored in both
                rows.append([value, _cell(before), _cell(after), "-", "-", "-", "0"])
                continue
            rows.append([value, _cell(before), _cell(after), *_difference(comparison)])
        parts.append((group, rows, _about(rule) if group == "Overall" else ""))
    if whole.num_left_out:
        heading, rows, note = parts[0]
        note += f" {whole.num_left_out} questions are set aside or unscored in a run: left out."
        parts[0] = (heading, rows, note)
    return f"{second.name} against {first.name} on {first.benchmark}", parts


def _by_group(
    first: Run, second: Run
) -> dict[str, dict[str, tuple[list[Answered], list[Answered]]]]:
    """Both runs' answers, overall and by each value of each group."""
    groups = {"Overall": {"all": (list(first.answered), list(second.answered))}}
    for side, run in enumerate((first, second)):
        for item in run.answered:
            for group, values in item.question.groups.items():
                for value in values:
                    groups.setdefault(group, {}).setdefault(value, ([], []))[side].append(item)
    return groups


def _only(run: Run, answered: list[Answered]) -> Run:
    """The run as if it had answered these alone, and set nothing else aside."""
    everything = frozenset(item.question.question_id for item in run.answered) | run.set_aside
    return Run(run.folder, run.summary, answered, everything)


def _table(table: Table, rule: Rule) -> tuple[str, list[tuple[str, Rows, str]]]:
    rows = [["", *table.benchmarks, "average"]]
    for model in table.models:
        cells = [
            _cell(table.cells[model, name]) if (model, name) in table.cells else "-"
            for name in table.benchmarks
        ]
        average = table.average(model)
        rows.append([model, *cells, "-" if math.isnan(average) else f"{100 * average:.1f}"])
    parts = [("Accuracy, %", rows, _about(rule))]
    if table.differences:
        rows = [["", "benchmark", "difference", "95%", "p", "questions"]]
        rows += [[model, name, *_difference(c)] for (model, name), c in table.differences.items()]
        parts.append((f"Against {table.models[0]}, paired by question", rows, ""))
    return "Evaluations", parts


def _about(rule: Rule) -> str:
    return f"Rule: {rule}. In brackets: unscored answers, which are in no denominator."


def _cell(value: Accuracy) -> str:
    number = "-" if math.isnan(value.value) else f"{100 * value.value:.1f}"
    return f"{number} ({value.num_unscored} unscored)" if value.num_unscored else number


def _difference(comparison: Comparison) -> list[str]:
    interval = "-"
    if not math.isnan(comparison.low):
        interval = f"{100 * comparison.low:+.1f} to {100 * comparison.high:+.1f}"
    return [
        f"{100 * comparison.difference:+.1f}",
        interval,
        f"{comparison.p_value:.3g}",
        f"{comparison.num_questions:,}",
    ]


def _markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines) + "\n"


def _plain(cell: str) -> str:
    """A cell that can't end its column or its line, nor become HTML where markdown is shown."""
    return escape(" ".join(cell.split()), quote=False).replace("|", "\\|")


def _html(rows: Rows) -> str:
    head = "".join(f'<th class="num">{escape(cell)}</th>' for cell in rows[0][1:])
    lines = [f"<tr><th></th>{head}</tr>"]
    for first, *others in rows[1:]:
        cells = "".join(f'<td class="num">{escape(cell)}</td>' for cell in others)
        lines.append(f"<tr><td>{escape(first)}</td>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


if __name__ == "__main__":
    run_main(main)

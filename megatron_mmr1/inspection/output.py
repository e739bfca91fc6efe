"""Findings to a terminal and to a folder: a table; `index.html` and JSON lines with all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from megatron_mmr1.inspection.charts import quartiles
from megatron_mmr1.inspection.findings import Findings
from megatron_mmr1.inspection.page import html
from megatron_mmr1.inspection.rows import Rows
from megatron_mmr1.inspection.samples import Sample

_MAX_REASONS = 12


def write(folder: Path, found: Findings, rows: Rows, samples: Sequence[Sample]) -> Path:
    """Write the page and the lists of bad rows, duplicates and benchmark questions.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    row_ids = {n: rows.row_id(n) for numbers in found.duplicates for n in numbers}
    _write_lines(folder / "bad_rows.jsonl", (asdict(bad) for bad in found.bad_rows))
    _write_lines(
        folder / "duplicates.jsonl",
        (
            {"rows": numbers, "row_ids": [row_ids[n] for n in numbers]}
            for numbers in found.duplicates
        ),
    )
    _write_lines(
        folder / "contamination.jsonl",
        ({"row": p.number, "row_id": p.row_id} | p.match._asdict() for p in found.pairs),
    )
    path = folder / "index.html"
    path.write_text(html(found, row_ids, samples), encoding="utf-8", errors="replace")
    return path


def table(found: Findings) -> Table:
    """Return the findings in short, for a terminal."""
    made = Table("", "rows", "", title=escape(found.source), title_justify="left")
    part = "" if found.num_inspected == found.num_rows else f"of {found.num_rows:,}"
    made.add_row("inspected", f"{found.num_inspected:,}", part)
    made.add_row("usable", f"{found.num_usable:,}", "")
    for reason, bad in found.reasons()[:_MAX_REASONS]:
        ids = ", ".join(row.row_id[:40] for row in bad[:3])
        made.add_row(f"  bad: {escape(reason[:80])}", f"{len(bad):,}", escape(ids))
    made.add_row("repeat an earlier row", f"{found.num_same:,}", f"{found.conflicts:,} conflicts")
    for name, (count, num_bad) in found.benchmarks.items():
        hit = len({p.number for p in found.pairs if p.match.benchmark == name})
        made.add_row(f"in {escape(name)}", f"{hit:,}", f"{count:,} questions, {num_bad:,} bad ones")
    for kind, count in found.answers.most_common():
        made.add_row(f"answer: {kind}", f"{count:,}", "")
    for name, values in found.sizes.items():
        if len(values):
            made.add_row(name, f"{len(values):,}", quartiles(values))
    return made


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

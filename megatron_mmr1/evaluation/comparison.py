"""Evaluations of several models side by side: which may be compared, and the numbers.

Owns what makes two runs comparable: the same questions (by digest, images included), of which a
model may lack only those that its run set aside by name, and as long a response. The paired test
is statistics.py's; pages and files are the tool's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mmr1.config.benchmarks import USUAL
from megatron_mmr1.evaluation.questions import Answered
from megatron_mmr1.evaluation.statistics import Accuracy, Comparison, Rule, accuracy, compare
from megatron_mmr1.evaluation.writers import read_samples


@dataclass(frozen=True, slots=True)
class Run:
    """One evaluation, read from its folder.

    Attributes:
        set_aside: ids of the rows and questions that it did not ask.
    """

    folder: Path
    summary: dict[str, Any]
    answered: list[Answered]
    set_aside: frozenset[str]

    @property
    def name(self) -> str:
        """What tables call the model."""
        return str(self.summary["name"])

    @property
    def benchmark(self) -> str:
        """Which one it answered."""
        return str(self.summary["benchmark"])


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of models, columns of benchmarks, as the paper's Table 2.

    Attributes:
        cells: by (model, benchmark); none where there is no run.
        differences: of every later model to the first one, by (model, benchmark).
    """

    models: list[str]
    benchmarks: list[str]
    cells: dict[tuple[str, str], Accuracy]
    differences: dict[tuple[str, str], Comparison]

    def average(self, model: str) -> float:
        """The mean of a model's accuracies; NaN where one is missing."""
        values = [
            self.cells[model, name].value if (model, name) in self.cells else math.nan
            for name in self.benchmarks
        ]
        return sum(values) / len(values)


def read_run(folder: Path) -> Run:
    """Read a finished evaluation.

    Raises:
        ValueError: the folder holds none.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no summary.json; give the output folder of a finished "
            "`python -m megatron_mmr1.evaluate`"
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        benchmark, _ = summary["benchmark"], summary["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); evaluate again") from error
    bad_rows = folder / "bad_rows.jsonl"
    set_aside: list[str] = []
    if bad_rows.is_file():
        with bad_rows.open("rb") as file:
            set_aside = [str(json.loads(line)["id"]) for line in file]
    answered = read_samples(folder / "samples.jsonl", benchmark)
    return Run(folder, summary, answered, frozenset(set_aside))


def check_comparable(first: Run, second: Run) -> None:
    """Refuse two runs that do not answer the same questions under the same limit.

    Raises:
        ValueError: names what differs and the remedy.
    """
    if first.benchmark != second.benchmark:
        raise ValueError(
            f"{first.folder} is of benchmark={first.benchmark}, {second.folder} of "
            f"benchmark={second.benchmark}; give two runs of one benchmark, or three and more for "
            "a table"
        )
    ours, theirs = _digests(first), _digests(second)
    for question_id in sorted(ours.keys() & theirs.keys()):
        if ours[question_id] != theirs[question_id]:
            raise ValueError(
                f"question {question_id!r} of {first.folder} and of {second.folder} are not the "
                "same (text, answer or image differ); evaluate both on the same data="
            )
    for run, others, other in ((first, theirs, second), (second, ours, first)):
        missing = sorted(others.keys() - _digests(run).keys() - run.set_aside)
        if missing:
            raise ValueError(
                f"{run.folder} lacks {len(missing)} questions of {other.folder}, as "
                f"{missing[0]!r}; evaluate both on the same data="
            )
    for key in ("max_response_tokens", "samples_per_prompt"):
        values = first.summary.get(key), second.summary.get(key)
        if values[0] != values[1]:
            raise ValueError(
                f"{first.folder} has {key}={values[0]}, {second.folder} {key}={values[1]}; "
                "evaluate both with the same"
            )


def compare_runs(first: Run, second: Run, rule: Rule) -> Comparison:
    """Return the paired difference, second minus first.

    Raises:
        ValueError: the runs are not comparable.
    """
    check_comparable(first, second)
    return compare(first.answered, second.answered, rule)


def table_of(runs: Sequence[Run], rule: Rule) -> Table:
    """Lay out runs by model and benchmark, both in the order in which they come.

    Raises:
        ValueError: two runs take the same place, or those of a column are not comparable.
    """
    placed: dict[tuple[str, str], Run] = {}
    for run in runs:
        other = placed.setdefault((run.name, run.benchmark), run)
        if other is not run:
            raise ValueError(
                f"{other.folder} and {run.folder} are both {run.name} on {run.benchmark}; "
                "leave one out, or evaluate with another name="
            )
    models = list(dict.fromkeys(run.name for run in runs))
    given = {run.benchmark for run in runs}
    benchmarks = [name for name in USUAL if name in given]
    cells = {place: accuracy(run.answered, rule) for place, run in placed.items()}
    differences = {}
    for (model, benchmark), run in placed.items():
        column = [placed[name, benchmark] for name in models if (name, benchmark) in placed]
        check_comparable(column[0], run)
        if model != models[0] and (models[0], benchmark) in placed:
            differences[model, benchmark] = compare_runs(column[0], run, rule)
    return Table(models, benchmarks, cells, differences)


def _digests(run: Run) -> dict[str, str]:
    return {item.question.question_id: item.digest for item in run.answered}

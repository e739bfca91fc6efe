"""Measure the verifier on labelled answers: false positives, false negatives, and what it can't do.

Usage: python tools/measure_verifier.py [FILE.jsonl ...] [--deadline 3] [--wrong]

A line is {"id", "kind", "gold", "response", "expected"}; without a file, the adversarial set of the
tests. Prints a table by kind, with the released reward's rules beside ours. `--wrong` lists every
verdict of ours that differs from its label. Then answers a second: the ordinary ones of the file
(judged without a worker), and all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as DeadlineError
from pathlib import Path
from typing import Any

from pebble import ProcessPool
from rich.console import Console
from rich.table import Table

from megatron_mmr1.rewards import accuracy, released_code
from megatron_mmr1.rewards.pool import WORKER_MEMORY_BYTES, WorkerContext, prepare_worker

ADVERSARIAL = Path(__file__).resolve().parents[1] / "tests" / "data" / "adversarial_answers.jsonl"
Row = dict[str, Any]


def main() -> None:
    """Judge, count, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, default=[ADVERSARIAL])
    parser.add_argument("--deadline", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--wrong", action="store_true")
    arguments = parser.parse_args()
    lines = [line for path in arguments.files for line in path.read_text("utf-8").split("\n")]
    rows = [json.loads(line) for line in lines if line.strip()]
    ours = judged(rows, accuracy.judge, arguments.deadline, arguments.workers)
    theirs = judged(rows, released_code.judge, arguments.deadline, arguments.workers)
    Console().print(table(rows, ours, theirs))
    if arguments.wrong:
        for row, (outcome, reason) in zip(rows, ours, strict=True):
            if outcome != row["expected"]:
                gold, box = row["gold"][:60], row["response"][-80:]
                print(f"{row['id']}: {outcome} ({reason}), not {row['expected']}: {gold!r} {box!r}")
    print(speed(rows))


def judged(
    rows: Sequence[Row],
    judge: Callable[[str, str], tuple[str, str]],
    deadline_s: float,
    num_workers: int,
) -> list[tuple[str, str]]:
    """Return (outcome, reason) of every row, in processes that are killed at the deadline."""
    found = []
    with ProcessPool(
        max_workers=num_workers,
        initializer=prepare_worker,
        initargs=(WORKER_MEMORY_BYTES,),
        context=WorkerContext(),
    ) as pool:
        futures = [
            pool.schedule(judge, args=(row["response"], row["gold"]), timeout=deadline_s)
            for row in rows
        ]
        for future in futures:
            try:
                found.append(future.result())
            except DeadlineError:
                found.append(("could_not_judge", "deadline"))
            except Exception as error:  # the worker died, or the rules failed
                found.append(("could_not_judge", type(error).__name__))
    return found


def table(
    rows: Sequence[Row], ours: Sequence[tuple[str, str]], theirs: Sequence[tuple[str, str]]
) -> Table:
    """Count by kind: credit for what is not correct; correct ones refused or not judged."""
    ours_header = ("ours: false +", "false -", "not judged")
    result = Table("kind", "rows", *ours_header, "released: false +", "false -")
    kinds = [*dict.fromkeys(row["kind"] for row in rows), "all"]
    for kind in kinds:
        places = [i for i, row in enumerate(rows) if kind in (row["kind"], "all")]
        labels = Counter(rows[i]["expected"] for i in places)
        cells = [kind, str(len(places))]
        for verdicts in (ours, theirs):
            false_positives = sum(
                verdicts[i][0] == "correct" != rows[i]["expected"] for i in places
            )
            false_negatives = sum(
                rows[i]["expected"] == "correct" != verdicts[i][0] for i in places
            )
            cells += [
                _share(false_positives, len(places) - labels["correct"]),
                _share(false_negatives, labels["correct"]),
            ]
            if verdicts is ours:
                not_judged = [i for i in places if verdicts[i][0] == "could_not_judge"]
                right = sum(rows[i]["expected"] == "could_not_judge" for i in not_judged)
                cells.append(f"{len(not_judged)}, {right} of {labels['could_not_judge']} rightly")
        result.add_row(*cells, end_section=kind == kinds[-2])
    return result


def speed(rows: Sequence[Row]) -> str:
    """Time the rows that need no algebra, in this process."""
    start, num_easy = time.perf_counter(), 0
    for row in rows:
        num_easy += accuracy.judge_quickly(row["response"], row["gold"]) is not None
    seconds = time.perf_counter() - start
    return (
        f"{num_easy} of {len(rows)} answers need no algebra; looking at all of them takes "
        f"{1e6 * seconds / len(rows):.0f} us each on one core"
    )


def _share(number: int, total: int) -> str:
    return f"{number} of {total} ({number / total:.1%})" if total else "-"


if __name__ == "__main__":
    main()

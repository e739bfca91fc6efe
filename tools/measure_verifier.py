"""Measure the verifier on labelled answers: false positives, false negatives, what it can't judge.

Usage: python tools/measure_verifier.py [FILE.jsonl ...] [--cpu-limit 2] [--wrong]

A line is {"id", "kind", "gold", "response", "expected"}; without a file, the two sets of the tests.
For each set a table by kind, with the released reward's rules beside ours
(rewards/released_code.py); `--wrong` lists every verdict of ours that differs from its label. Then
answers a second through the pool, and what hostile answers cost.

The adversarial set was used while the rules were written. The held-out set was labelled without
sight of the rules and judged once before anything was changed for it: see FIRST_SIGHT.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
from pebble import ProcessExpired, ProcessPool
from rich.console import Console
from rich.table import Table

from megatron_mmr1.config.schema import RewardConfig
from megatron_mmr1.rewards import VerifierPool, accuracy, released_code
from megatron_mmr1.rewards.pool import (
    WORKER_MEMORY_BYTES,
    WorkerContext,
    prepare_worker,
    run_bounded,
)

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
ADVERSARIAL, HELD_OUT = DATA / "adversarial_answers.jsonl", DATA / "heldout_answers.jsonl"
FIRST_SIGHT = (
    "first sight of this set, before anything was changed for it: ours 1 of 231 false + and 13 of "
    "210 false -; released 74 of 231 and 95 of 210. The table is today's, after changes."
)
NOT_ORDINARY = ("pathological", "broken_gold")
HOSTILE = ("9^{9^{9}}", "8^{9^{9}}", "7^{9^{9}}", "6^{9^{9}}")
Row = dict[str, Any]
Verdicts = Sequence[tuple[str, str]]


class Rates(NamedTuple):
    """Counts over some rows; a share is of the rows with that label."""

    num_rows: int
    false_positives: int  # credit for what is not correct
    num_not_correct: int
    false_negatives: int  # correct answers that were refused, or not judged
    num_correct: int
    num_unjudged: int
    num_rightly_unjudged: int


def main() -> None:
    """Judge, count, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, default=[ADVERSARIAL, HELD_OUT])
    parser.add_argument("--cpu-limit", type=float, default=2.0, help="seconds of one answer")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--wrong", action="store_true")
    arguments = parser.parse_args()
    console, all_rows = Console(), []
    for path in arguments.files:
        rows = read_rows(path)
        all_rows += rows
        ours = judged(rows, accuracy.judge, arguments.cpu_limit, arguments.workers)
        theirs = judged(rows, released_code.judge, arguments.cpu_limit, arguments.workers)
        console.print(table(path.stem, rows, ours, theirs))
        reasons = Counter(reason for outcome, reason in ours if outcome == "could_not_judge")
        print("could not judge: " + (", ".join(f"{n} {r}" for r, n in reasons.items()) or "none"))
        if path == HELD_OUT:
            print(FIRST_SIGHT)
        if arguments.wrong:
            print_wrong(rows, ours)
    print(speed([row for row in all_rows if row["kind"] not in NOT_ORDINARY], arguments.workers))


def read_rows(path: Path) -> list[Row]:
    """Read labelled answers, one JSON object a line."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]


def judged(
    rows: Sequence[Row],
    judge: Callable[[str, str], tuple[Any, str]],
    cpu_s: float,
    num_workers: int,
) -> list[tuple[str, str]]:
    """Return (outcome, reason) of every row, in processes that end after `cpu_s` on one answer.

    CPU time, and not the clock as in training: a busy machine changes no figure.
    """
    found = []
    with ProcessPool(
        max_workers=num_workers,
        initializer=prepare_worker,
        initargs=(WORKER_MEMORY_BYTES,),
        context=WorkerContext(),
    ) as pool:
        futures = [
            pool.schedule(run_bounded, args=(judge, row["response"], row["gold"], cpu_s))
            for row in rows
        ]
        for future in futures:
            try:
                found.append(future.result())
            except ProcessExpired:
                found.append(("could_not_judge", "CPU limit"))
            except Exception as error:  # the rules failed
                found.append(("could_not_judge", type(error).__name__))
    return found


def rates(rows: Sequence[Row], verdicts: Verdicts) -> Rates:
    """Compare verdicts with labels."""
    pairs = [(o, row["expected"]) for row, (o, _) in zip(rows, verdicts, strict=True)]
    num_correct = sum(label == "correct" for _, label in pairs)
    return Rates(
        num_rows=len(pairs),
        false_positives=sum(outcome == "correct" != label for outcome, label in pairs),
        num_not_correct=len(pairs) - num_correct,
        false_negatives=sum(label == "correct" != outcome for outcome, label in pairs),
        num_correct=num_correct,
        num_unjudged=sum(outcome == "could_not_judge" for outcome, _ in pairs),
        num_rightly_unjudged=pairs.count(("could_not_judge", "could_not_judge")),
    )


def table(name: str, rows: Sequence[Row], ours: Verdicts, theirs: Verdicts) -> Table:
    """Count by kind."""
    header = ("rows", "ours: false +", "false -", "not judged", "released: false +", "false -")
    result = Table("kind", *header, title=name)
    kinds = [*dict.fromkeys(row["kind"] for row in rows), "all"]
    for kind in kinds:
        places = [i for i, row in enumerate(rows) if kind in (row["kind"], "all")]
        some = [rows[i] for i in places]
        mine, other = (rates(some, [of[i] for i in places]) for of in (ours, theirs))
        result.add_row(
            *(kind, str(mine.num_rows)),
            _share(mine.false_positives, mine.num_not_correct),
            _share(mine.false_negatives, mine.num_correct),
            f"{mine.num_unjudged} ({mine.num_rightly_unjudged} rightly)",
            _share(other.false_positives, other.num_not_correct),
            _share(other.false_negatives, other.num_correct),
            end_section=kind == kinds[-2],
        )
    return result


def print_wrong(rows: Sequence[Row], verdicts: Verdicts) -> None:
    """List the verdicts that differ from their labels."""
    for row, (outcome, reason) in zip(rows, verdicts, strict=True):
        if outcome != row["expected"]:
            gold, box = row["gold"][:60], row["response"][-80:]
            print(f"{row['id']}: {outcome} ({reason}), not {row['expected']}: {gold!r} {box!r}")


def speed(rows: Sequence[Row], num_workers: int) -> str:
    """Time ordinary answers through the pool, each once and in groups of 8; then hostile ones."""
    by_gold: dict[str, list[str]] = {}
    for row in rows:
        by_gold.setdefault(row["gold"], []).append(row["response"])
    groups = [(gold, [texts[i % len(texts)] for i in range(8)]) for gold, texts in by_gold.items()]
    num_easy = sum(accuracy.judge_quickly(r["response"], r["gold"]) is not None for r in rows)
    hostile = [("5", [f"<answer>\\boxed{{{text}}}</answer>"]) for text in HOSTILE]
    once_s, once_cpu_s = _seconds([(r["gold"], [r["response"]]) for r in rows], num_workers)
    groups_s, groups_cpu_s = _seconds(groups, num_workers)
    hostile_s, _ = _seconds(hostile, num_workers, deadline_s=1.0)
    num_grouped = 8 * len(groups)
    return (
        f"{num_easy} of {len(rows)} ordinary answers need no worker. With {num_workers} workers: "
        f"{len(rows) / once_s:.0f} answers/s, each once; {num_grouped / groups_s:.0f}/s in groups "
        f"of 8. A second of CPU time, of all processes, judges {len(rows) / once_cpu_s:.0f} and "
        f"{num_grouped / groups_cpu_s:.0f}: twice that on two idle cores. {len(hostile)} hostile "
        f"ones took {hostile_s:.1f} s at a deadline of 1 s."
    )


def _seconds(
    groups: Sequence[tuple[str, Sequence[str]]], num_workers: int, deadline_s: float = 10.0
) -> tuple[float, float]:
    """Time (gold, responses) through a new pool whose workers have started: clock, CPU time."""
    with VerifierPool(RewardConfig(num_workers=num_workers, deadline_s=deadline_s)) as pool:
        _submit(pool, "2x", [f"<answer>\\boxed{{x+{i}x}}</answer>" for i in range(8)])
        list(pool.results())
        start, cpu_start = time.perf_counter(), _cpu_s()
        for gold, texts in groups:
            _submit(pool, gold, texts)
        list(pool.results())
        return time.perf_counter() - start, _cpu_s() - cpu_start


def _cpu_s() -> float:
    """CPU time of this process and of those below it."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(of.user + of.system for of in times)


def _submit(pool: VerifierPool, gold: str, texts: Sequence[str]) -> None:
    rollouts = [SimpleNamespace(text=text, token_ids=()) for text in texts]
    group: Any = SimpleNamespace(prompt=SimpleNamespace(answer=gold), rollouts=rollouts)
    pool.submit(group)


def _share(number: int, total: int) -> str:
    return f"{number} of {total} ({number / total:.1%})" if total else "-"


if __name__ == "__main__":
    main()

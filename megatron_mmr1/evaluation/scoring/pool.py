"""Many responses scored in worker processes that can be killed when one hangs them.

Owns the deadline. The workers are those of rewards/pool.py: spawned, capped in memory, torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from pebble import ProcessExpired, ProcessPool

from megatron_mmr1.evaluation.questions import Extracted, Question, Score, Scores
from megatron_mmr1.evaluation.scoring.scorers import score
from megatron_mmr1.rewards.pool import (
    START_LIMIT_S,
    WORKER_MEMORY_BYTES,
    WorkerContext,
    prepare_worker,
)


def score_all(
    answers: Iterable[tuple[Extracted, Question]], deadline_s: float = 10.0, num_workers: int = 1
) -> list[Scores]:
    """Score answers in order; one that takes longer than `deadline_s` is unscored, with the reason.

    Args:
        answers: what was extracted from each response, and its question. Images are not sent.
        deadline_s: of one answer; its worker is killed.
        num_workers: processes.
    """
    tasks = [(extracted, replace(question, images=())) for extracted, question in answers]
    scores: list[Scores] = []
    while len(scores) < len(tasks):  # once more only when a pool broke
        scores += _score_until_broken(tasks[len(scores) :], deadline_s, num_workers)
    return scores


def _score_until_broken(
    tasks: list[tuple[Extracted, Question]], deadline_s: float, num_workers: int
) -> list[Scores]:
    """Score tasks in order, at least one: the one at which the pool breaks is unscored."""
    scores = []
    with ProcessPool(
        max_workers=num_workers,
        initializer=prepare_worker,
        initargs=(WORKER_MEMORY_BYTES,),
        context=WorkerContext(),
    ) as pool:
        futures = [pool.schedule(score, args=task, timeout=deadline_s) for task in tasks]
        for future in futures:
            try:
                # The first that is not done is running, or next.
                scores.append(future.result(timeout=deadline_s + START_LIMIT_S))
            except TimeoutError:
                scores.append(_unscored(f"deadline of {deadline_s:g} s passed"))
                if not future.done():  # pebble lost it
                    break
            except ProcessExpired:
                scores.append(_unscored("scoring worker died"))
            except BrokenProcessPool:
                scores.append(_unscored("scoring workers died"))
                break
        pool.stop()
    return scores


def _unscored(reason: str) -> Scores:
    return Scores(Score("unscored", reason), Score("unscored", reason))

"""Rewards for rollout groups, in worker processes that can be killed when an answer hangs them.

Owns the hard deadline and the reward formula; the rules of judgement are in `accuracy.py` and
`format.py`. An answer that needs no mathematics (nearly all on simple tasks) is judged here,
without a worker.

Workers are forked from a small process of their own (multiprocessing's fork server), never from the
trainer, which has torch and gloo threads. That process has math-verify loaded and nothing else, so
that a worker that was killed is replaced in milliseconds; it ends with the trainer. Workers import
neither torch nor the trainer's `__main__`, can't take more than `WORKER_MEMORY_BYTES`, and are
ended by the kernel at twice their deadline in CPU time, whatever became of the trainer.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.machinery import ModuleSpec
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import set_forkserver_preload
from typing import TYPE_CHECKING, Self

from pebble import ProcessExpired, ProcessPool

from megatron_mmr1.rewards.accuracy import judge_mathematics, judge_quickly
from megatron_mmr1.rewards.format import extract_answer, is_well_formed
from megatron_mmr1.rewards.judge import Judge, is_for_judge
from megatron_mmr1.rewards.penalties import overlong_share, repetition_share

if TYPE_CHECKING:  # at run time these would import torch or omegaconf into every worker
    from megatron_mmr1.config.schema import RewardConfig
    from megatron_mmr1.types import Outcome, Rollout, RolloutGroup, ScoredGroup, ScoredRollout

WORKER_MEMORY_BYTES = 4 * 2**30
START_LIMIT_S = 120.0  # the first worker starts in 3 s; on a busy machine in more

_start_lock = threading.Lock()


class _WorkerProcess(ForkServerProcess):
    """A process that doesn't import the parent's `__main__`."""

    def start(self) -> None:
        """Start, with `__main__` named so that it is skipped, as any `package.__main__` is.

        Otherwise each worker would import the whole trainer: seconds, and a gigabyte.
        """
        main = sys.modules["__main__"]
        with _start_lock:
            spec = main.__spec__
            main.__spec__ = ModuleSpec("megatron_mmr1.rewards.__main__", None)
            # Of use to the first worker, which starts the server; another user of a fork server may
            # have started it before: then workers load math-verify themselves.
            set_forkserver_preload(["megatron_mmr1.rewards.warm"])
            try:
                super().start()
            finally:
                main.__spec__ = spec


class WorkerContext(ForkServerContext):
    """How verifier workers start: forked from a warm process, without the parent's `__main__`."""

    Process = _WorkerProcess


def prepare_worker(memory_bytes: int) -> None:
    """In a new worker: be warm before any deadline, cap memory, die when told to."""
    import resource
    import signal

    import megatron_mmr1.rewards.warm  # noqa: F401

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # pebble's handler is Python code: it would wait for the big-integer power that it has to stop.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_bounded(
    judge: Callable[[str, str], tuple[Outcome, str]], response: str, gold: str, cpu_s: float
) -> tuple[Outcome, str]:
    """In a worker: judge, and be ended by the kernel after `cpu_s` of CPU time, rounded up."""
    import resource

    end_s = math.ceil(time.process_time() + cpu_s)
    resource.setrlimit(resource.RLIMIT_CPU, (end_s, resource.RLIM_INFINITY))
    return judge(response, gold)


class _Judgement:
    """One answer on its way to a verdict: `verdict` if it was easy, else a `future` of `pool`.

    `second` is the judge's, where it is asked.
    """

    future: Future[tuple[Outcome, str]]
    pool: ProcessPool
    second: Future[tuple[Outcome, str]] | None = None

    def __init__(self, response: str, gold: str) -> None:
        self.response = response
        self.gold = gold
        self.verdict = judge_quickly(response, gold)


class VerifierPool:
    """Scores rollout groups in the background, in the order of submission.

    Use as a context manager: `pool.submit(group)` for each group as the engine finishes it, then
    `for scored in pool.results()`. Not thread-safe: one thread submits and collects.

    Args:
        config: weights of the reward, deadline of one response in seconds, number of workers.
        max_response_tokens: rollout.max_response_tokens; needed by the overlong penalty alone.
    """

    def __init__(self, config: RewardConfig, max_response_tokens: int = 0) -> None:
        assert max_response_tokens > 0 or config.overlong_weight == 0
        self._config = config
        self._max_response_tokens = max_response_tokens
        self._judge = Judge(config) if config.judge_url else None
        self._pool: ProcessPool | None = None  # started by the first answer that needs it
        self._submitted: deque[tuple[RolloutGroup, list[_Judgement]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def submit(self, group: RolloutGroup) -> None:
        """Start judging all responses of a group; returns at once.

        A response with finish_reason "length" is judged as it stands: an unfinished answer has no
        complete `<answer>` block, so it is wrong and not well formed.
        """
        gold = group.prompt.answer
        by_answer: dict[str | None, _Judgement] = {}
        judgements: list[_Judgement] = []
        for rollout in group.rollouts:
            answer = extract_answer(rollout.text)
            if answer in by_answer:  # a group often has one answer several times
                judgements.append(by_answer[answer])
                continue
            judgement = by_answer[answer] = _Judgement(rollout.text, gold)
            judgements.append(judgement)
            if judgement.verdict is None:
                self._schedule(judgement)
            else:
                self._ask_judge(judgement, group)
        self._submitted.append((group, judgements))

    def results(self) -> Iterator[ScoredGroup]:
        """Yield each group submitted and not yet collected, in order of submission, waiting for it.

        Equation (arXiv:2509.21268, Table 6): reward = format_weight * is_well_formed +
        accuracy_weight * correct, less repetition_weight * repetition_share and overlong_weight *
        overlong_share (penalties.py); NaN where the verdict is could_not_judge.
        """
        from megatron_mmr1.types import ScoredGroup

        while self._submitted:
            group, judgements = self._submitted[0]
            for judgement in judgements:
                if judgement.verdict is None:
                    judgement.verdict = self._wait(judgement)
                    self._ask_judge(judgement, group)
            scores = tuple(
                self._score(judgement, rollout)
                for judgement, rollout in zip(judgements, group.rollouts, strict=True)
            )
            self._submitted.popleft()
            yield ScoredGroup(group, scores)

    def close(self) -> None:
        """Kill the workers and forget what was not collected."""
        self._submitted.clear()
        self._stop_workers()
        if self._judge:
            self._judge.close()

    def _ask_judge(self, judgement: _Judgement, group: RolloutGroup) -> None:
        """Ask the judge what the rules leave to it; the answer is collected with the group."""
        assert judgement.verdict
        if self._judge and is_for_judge(*judgement.verdict, judgement.gold):
            answer = extract_answer(judgement.response) or ""
            judgement.second = self._judge.submit(group.prompt.question, judgement.gold, answer)

    def _score(self, judgement: _Judgement, rollout: Rollout) -> ScoredRollout:
        from megatron_mmr1.types import ScoredRollout, Verdict

        assert judgement.verdict
        outcome, reason = judgement.verdict
        if self._judge and judgement.second:
            outcome, reason = self._judge.result(judgement.second)
        repetition, overlong = self._penalties(rollout)
        formatted = is_well_formed(rollout.text)
        reward = self._config.format_weight * formatted
        reward += self._config.accuracy_weight * (outcome == "correct")
        reward -= repetition + overlong
        if outcome == "could_not_judge":
            reward = math.nan
        return ScoredRollout(Verdict(outcome, reason), formatted, reward, repetition, overlong)

    def _penalties(self, rollout: Rollout) -> tuple[float, float]:
        """Return what repetition and length take off a response's reward."""
        config, token_ids = self._config, rollout.token_ids
        repetition = overlong = 0.0
        if config.repetition_weight:
            share = repetition_share(token_ids, config.repetition_ngram)
            repetition = config.repetition_weight * share
        if config.overlong_weight:
            cache = config.overlong_cache_tokens
            share = overlong_share(len(token_ids), self._max_response_tokens, cache)
            overlong = config.overlong_weight * share
        return repetition, overlong

    def _wait(self, judgement: _Judgement) -> tuple[Outcome, str]:
        for _ in range(2):
            if not self._is_done(judgement):
                if judgement.pool is self._pool:
                    self._stop_workers()
                self._schedule(judgement)
                continue
            try:
                return judgement.future.result()
            except TimeoutError:
                return "could_not_judge", f"deadline of {self._config.deadline_s:g} s passed"
            except ProcessExpired:
                return "could_not_judge", "verifier worker died"
            except BrokenProcessPool:
                self._schedule(judgement)
        return "could_not_judge", "verifier workers keep dying"

    def _is_done(self, judgement: _Judgement) -> bool:
        """Wait for a judgement; False when its pool is gone or has stalled, so that it never comes.

        When an idle worker dies, pebble gives its pool up and can forget a task that it had just
        been handed. The first uncollected answer is next in the queue or running: hence the limit.
        """
        give_up_at = time.monotonic() + self._config.deadline_s + START_LIMIT_S
        while time.monotonic() < give_up_at:
            if wait([judgement.future], timeout=0.5).done:
                return True
            if judgement.pool is not self._pool or not judgement.pool.active:
                return False
        return False

    def _schedule(self, judgement: _Judgement) -> None:
        try:
            self._send(judgement)
        except RuntimeError:  # pebble's word for a pool that broke: once more, in a new one
            self._stop_workers()
            self._send(judgement)

    def _send(self, judgement: _Judgement) -> None:
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self._config.num_workers,
                initializer=prepare_worker,
                initargs=(WORKER_MEMORY_BYTES,),
                context=WorkerContext(),
            )
        judgement.pool = self._pool
        judgement.future = self._pool.schedule(
            run_bounded,
            args=(
                *(judge_mathematics, judgement.response, judgement.gold),
                2 * self._config.deadline_s,
            ),
            timeout=self._config.deadline_s,
        )

    def _stop_workers(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

"""Policy and engine take turns on the GPU that they share (`rollout.takes_turns`).

    engine's turn    generates, evaluates, takes weights; gradients and optimizer states are away
    trainer's turn   learns, saves, loads; the engine is asleep, without weights and caches

The policy's weights stay on the GPU all the time. An engine that was asleep gets weights first,
then room for its cache: so a trainer's turn ends with `WeightSync.push`, or `wake`. Every rank has
an engine, or a part of one (`rollout.tp_size`), so all take their turns together. On a CPU the same
steps are gone through; vLLM's sleep gives back nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.observability.timers import PhaseTimers
from megatron_mmr1.rollout.engine import RolloutEngine


class Turns:
    """Says whose turn it is; the engine's at first.

    Args:
        policy: has stepped aside, if turns are taken.
        are_taken: False: both stay where they are.
        timers: what a change of turns takes is `time/turns_s`.
    """

    def __init__(
        self, policy: MegatronPolicy, engine: RolloutEngine, are_taken: bool, timers: PhaseTimers
    ) -> None:
        self._policy, self._engine = policy, engine
        self._are_taken, self._timers = are_taken, timers

    @contextmanager
    def training(self) -> Iterator[None]:
        """The trainer's turn. After it the engine sleeps until weights are pushed."""
        if not self._are_taken:
            yield
            return
        with self._timers.phase("turns"):
            self._engine.sleep()
            self._policy.come_back()
        yield
        with self._timers.phase("turns"):
            self._policy.step_aside()

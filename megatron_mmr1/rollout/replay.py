"""A rollout engine that hands out what an earlier run recorded: to compare layouts,
losses and kernels on equal data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from megatron_mmr1.rollout.engine import Sampling
from megatron_mmr1.types import Prompt, Rollout, RolloutGroup


class ReplayEngine:
    """Serves recorded groups by step and prompt; samples nothing.

    Args:
        read_step: returns the recorded groups of a step (rows of the run's rollouts/ files).
    """

    def __init__(self, read_step: Callable[[int], list[dict[str, Any]]]) -> None:
        self._read_step = read_step
        self.weight_version = 0
        self.is_asleep = False

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[RolloutGroup]:
        """Yield the recorded group of every prompt.

        Raises:
            ValueError: the recorded step doesn't hold one of the prompts, or holds groups of
                another size.
        """
        rows = self._read_step(sampling.step)
        recorded = {(row["prompt_id"], row.get("occurrence", 0)): row for row in rows}
        for prompt in prompts:
            row = recorded.get(prompt.key)
            if row is None or len(row["rollouts"]) != sampling.group_size:
                raise ValueError(
                    f"replay: step {sampling.step} of the recorded run has no group of "
                    f"{sampling.group_size} for prompt {prompt.prompt_id!r}; replay with the "
                    "recorded run's own seed, data, sampler and group size"
                )
            rollouts = tuple(
                Rollout(
                    r["sample_index"],
                    tuple(r["token_ids"]),
                    tuple(r["rollout_logprobs"]),
                    r["finish_reason"],
                    r["text"],
                )
                for r in row["rollouts"]
            )
            yield RolloutGroup(prompt.without_images(), rollouts, self.weight_version)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Note the version; recorded rollouts need no weights."""
        self.weight_version = version
        self.is_asleep = False

    def sleep(self) -> None:
        """Note it; recorded rollouts take no memory of a GPU."""
        self.is_asleep = True

"""From scored groups to what a sampler may learn of their prompts: a few numbers a group.

Diversities are measured in a thread of their own, which numba leaves free of the interpreter's
lock: while the engine still generates other groups.

K groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np

from megatron_mmr1.sampling.diversity import DIVERSITY_MEASURES, padded_self_bleu
from megatron_mmr1.types import GroupKey, RolloutGroup, ScoredGroup

NUM_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class GroupStats:
    """What a step's groups taught; a prompt may have several.

    Attributes:
        index_K: int64, of the prompt in the data set.
        num_correct_K, num_judged_K: int64, verdicts (could_not_judge is in neither).
        diversity_K: float64, TDS in [0, 1].
        num_wrong_choices_K: int64, wrong answers where the gold one is an option's letter: MMR1's
            released code gives them 0.1.
    """

    index_K: np.ndarray
    num_correct_K: np.ndarray
    num_judged_K: np.ndarray
    diversity_K: np.ndarray
    num_wrong_choices_K: np.ndarray

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> GroupStats:
        """Read float64 [K, NUM_COLUMNS], as `to_rows` makes them; exact for whole numbers."""
        index, correct, judged, diversity, wrong_choices = rows.reshape(-1, NUM_COLUMNS).T
        return cls(
            index.astype(np.int64),
            correct.astype(np.int64),
            judged.astype(np.int64),
            diversity.astype(np.float64),
            wrong_choices.astype(np.int64),
        )

    def to_rows(self) -> np.ndarray:
        """Return float64 [K, NUM_COLUMNS], which ranks can exchange."""
        columns = (
            *(self.index_K, self.num_correct_K, self.num_judged_K),
            *(self.diversity_K, self.num_wrong_choices_K),
        )
        return np.stack([column.astype(np.float64) for column in columns], axis=1)

    @property
    def is_mixed_K(self) -> np.ndarray:
        """Whether a group has both verdicts."""
        return (self.num_correct_K > 0) & (self.num_correct_K < self.num_judged_K)

    def judged(self) -> GroupStats:
        """Leave out the groups that no answer could be judged of: they taught nothing."""
        return self.take(self.num_judged_K > 0)

    def take(self, which: np.ndarray) -> GroupStats:
        """Return some of the groups."""
        return GroupStats.of_rows(self.to_rows()[which])


class Statistician:
    """Measures groups as they are finished; use as a context manager.

    Args:
        measure: a name in diversity.DIVERSITY_MEASURES.
        max_response_tokens: what padded_self_bleu pads to, as the released code does; None = the
            longest of the group. Other measures pad nothing.
    """

    def __init__(self, measure: str, max_response_tokens: int | None = None) -> None:
        self._measure = DIVERSITY_MEASURES[measure]
        if measure == "padded_self_bleu":  # with a token that no response has
            self._measure = partial(padded_self_bleu, pad_id=-1, length=max_response_tokens)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="diversity")
        self._diversity: dict[GroupKey, Future[float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def submit(self, group: RolloutGroup) -> None:
        """Start measuring a group; returns at once."""
        responses = [rollout.token_ids for rollout in group.rollouts]
        if len(responses) > 1:
            self._diversity[group.prompt.key] = self._thread.submit(self._measure, responses)

    def collect(self, groups: Sequence[ScoredGroup], indices: Sequence[int]) -> GroupStats:
        """Return the statistics of groups that were submitted, and forget all that were.

        Args:
            indices: of their prompts in the data set.
        """
        rows = np.zeros((len(groups), NUM_COLUMNS))
        for row, scored, index in zip(rows, groups, indices, strict=True):
            outcomes = [score.verdict.outcome for score in scored.scores]
            num_judged = len(outcomes) - outcomes.count("could_not_judge")
            measured = self._diversity.get(scored.group.prompt.key)
            is_choice = _is_option_letter(scored.group.prompt.answer)
            row[:] = (
                index,
                outcomes.count("correct"),
                num_judged,
                measured.result() if measured else 0.0,  # one response: no pair to compare
                outcomes.count("wrong") if is_choice else 0,
            )
        self._diversity.clear()
        return GroupStats.of_rows(rows)


def _is_option_letter(answer: str) -> bool:
    text = answer.strip().strip("()").strip()
    return len(text) == 1 and "A" <= text <= "Z"

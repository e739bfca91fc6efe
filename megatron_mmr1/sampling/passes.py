"""Uniform draws as whole passes over the prompts, each in its own order, for up to 100M prompts.

Owns the order of a pass and the place in it. Does not draw by weight: weight_tree.py does.

Departure from the released MMR1 code, which shuffles once and drops the tail at each wrap: here
every pass is shuffled anew, and a batch may span two passes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np


class UniformPasses:
    """Every prompt once a pass.

    The order of a pass follows from the seed and the number of the pass, so the state is small. It
    also follows from numpy's `Generator.shuffle`: continue from a state with the same numpy, or
    some prompts of the pass under way come twice and others not at all.

    It holds 4 bytes a prompt (8 from 2**31 prompts on), and twice that while it begins a pass,
    which alone costs O(P).
    """

    def __init__(self, num_prompts: int, seed: int):
        self.num_prompts = num_prompts
        self.seed = seed
        self.deferred: list[int] = []  # before the cursor and not drawn yet, in the pass's order
        self._begin_pass(0)

    def _begin_pass(self, number: int) -> None:
        self.pass_number, self.cursor = number, 0
        self._order = np.arange(self.num_prompts, dtype=_index_type(self.num_prompts))
        np.random.Generator(np.random.PCG64([self.seed, number])).shuffle(self._order)

    def take(self, num: int, taken: Collection[int] = ()) -> list[int]:
        """Take the next `num` different prompts that are not in `taken`, the rest of the batch.

        A prompt already in the batch (in `taken`, or from the tail of the previous pass) is not
        skipped: it keeps its place and comes first in the next call. Only when nothing else is left
        of a pass does the next one begin; what is left over then is in this very batch.

        O(num + len(taken)), but for the shuffle of a new pass: what a call defers is in its batch,
        so there is never more of it than the largest batch had.

        Raises:
            ValueError: there are fewer prompts than `taken` and `num` need.
        """
        batch = set(taken)
        if num + len(batch) > self.num_prompts:
            raise ValueError(
                f"{num} prompts that are not among {len(batch)} taken ones exceed the"
                f" {self.num_prompts} prompts of the data set; take at most"
                f" {max(0, self.num_prompts - len(batch))}, or add prompts"
            )
        drawn: list[int] = []
        waiting, self.deferred = self.deferred, []
        self._sort(waiting, num, batch, drawn)
        while len(drawn) < num:
            if self.cursor == self.num_prompts:
                self.deferred = []  # all of them are in this batch
                self._begin_pass(self.pass_number + 1)
            upcoming = self._order[self.cursor : self.cursor + num - len(drawn)].tolist()
            self.cursor += len(upcoming)
            self._sort(upcoming, num, batch, drawn)
        return drawn

    def _sort(self, prompts: list[int], num: int, batch: set[int], drawn: list[int]) -> None:
        """Draw those of `prompts` that are not in the batch, up to `num`, and defer the others."""
        for prompt in prompts:
            if len(drawn) == num or prompt in batch:
                self.deferred.append(prompt)
            else:
                drawn.append(prompt)
                batch.add(prompt)

    def state_dict(self) -> dict[str, Any]:
        """Return what later draws depend on, as integers and a list of them."""
        return {
            "num_prompts": self.num_prompts,
            "seed": self.seed,
            "pass_number": self.pass_number,
            "cursor": self.cursor,
            "deferred": list(self.deferred),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, with its seed; the order of its pass is shuffled again, in O(P).

        Raises:
            ValueError: `state` was saved for another number of prompts.
        """
        if state["num_prompts"] != self.num_prompts:
            raise ValueError(
                f"the state was saved for {state['num_prompts']} prompts and the data set has"
                f" {self.num_prompts}; resume with the same data set"
            )
        self.seed = state["seed"]
        self._begin_pass(state["pass_number"])
        self.cursor = state["cursor"]
        self.deferred = list(state["deferred"])


def _index_type(num_prompts: int) -> type[np.signedinteger]:
    return np.int32 if num_prompts < 2**31 else np.int64

"""What the trainer asks of a rollout engine, and how a request's random seed is made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_mmr1.types import GroupKey, Prompt, RolloutGroup


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one batch.

    Attributes:
        group_size: responses a prompt.
        temperature: 0 = greedy (then group_size must be 1).
        max_response_tokens: a longer response is cut, and marked by its finish reason "length".
        seed, step, is_scoring: with the prompt's key and the sample's index they fix every random
            number.
        ignores_end: every response goes on to `max_response_tokens`.
    """

    group_size: int
    temperature: float
    max_response_tokens: int
    seed: int
    step: int
    is_scoring: bool = False  # only to score prompts, before the step
    ignores_end: bool = False


class RolloutEngine(Protocol):
    """A sampler of responses that always knows which weights it holds."""

    weight_version: int
    is_asleep: bool

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[RolloutGroup]:
        """Yield one finished group a prompt, as they finish (not in the order of the prompts).

        Prompts are taken as there is room for their pixels; a group's has none.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights (Hugging Face names), drop every cache that the old ones filled.

        Wakes an engine that is asleep.
        """
        ...

    def sleep(self) -> None:
        """Leave the GPU's memory to others, weights and caches included, until new weights come.

        The caller has read every `generate` to its end.
        """
        ...


def request_seed(sampling: Sampling, key: GroupKey) -> int:
    """Return the seed of a group's first sample; sample i uses seed + i.

    A pure function of (seed, step, key): a resumed run, or one on another number of ranks, draws
    the same responses.
    """
    prompt_id, occurrence = key
    text = f"{sampling.seed}/{sampling.step}/{prompt_id}"
    # NUL: no part may be read as the end of an id.
    text += f"\0{occurrence}" if occurrence else ""
    text += "\0scoring" if sampling.is_scoring else ""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

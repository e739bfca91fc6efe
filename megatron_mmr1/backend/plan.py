"""Who trains what, and in which micro-batch: pure numbers, the same on every rank.

Owns the plan of one optimizer step: which data-parallel rank trains which sample, which samples
share a micro-batch, how they are padded there, and the loss's one global denominator. Builds no
batch (batching.py) and runs no collective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_mmr1.algorithms.grpo_loss import loss_counts
from megatron_mmr1.backend.cost import StepCost
from megatron_mmr1.backend.packing import balance, first_fit_decreasing, pad_to
from megatron_mmr1.config.layout import sequence_multiple, total_multiple
from megatron_mmr1.config.schema import ParallelConfig, PrecisionConfig
from megatron_mmr1.types import GroupKey

_FLOAT32 = PrecisionConfig()


@dataclass(frozen=True, slots=True)
class SampleSize:
    """What the plan knows of a sample.

    Attributes:
        key: of the prompt; the samples of a GRPO group stay on one data-parallel rank, so that its
            images are encoded once.
        num_prompt_tokens, num_response_tokens: in tokens, visual ones included.
        patches: of each image of the prompt.
        reward: NaN = could not judge: such a sample carries no loss and counts in no denominator.
            0 where nothing is rewarded (cold start).
    """

    key: GroupKey
    num_prompt_tokens: int
    num_response_tokens: int
    patches: tuple[int, ...]
    reward: float = 0.0

    @property
    def is_kept(self) -> bool:
        """Whether it could be judged."""
        return not math.isnan(self.reward)

    @property
    def num_tokens(self) -> int:
        """Prompt and response."""
        return self.num_prompt_tokens + self.num_response_tokens


@dataclass(frozen=True, slots=True)
class Packing:
    """How sequences lie in micro-batches at one parallel layout.

    Attributes:
        max_tokens: of a micro-batch, padding included; a multiple of `total_multiple`.
        sequence_multiple: each sequence is padded to it: context parallelism cuts it into
            2 * cp_size chunks.
        total_multiple: of a micro-batch's tokens: sequence parallelism cuts a rank's chunk again,
            and FP8 wants multiples of 16, or whole blocks.
        count_multiple: of the number of micro-batches: the interleaved pipeline schedule takes
            them in rounds of pp_size.
        is_fixed_length: all micro-batches of a step are as long as the longest one: pipeline stages
            then exchange no shapes.
    """

    max_tokens: int
    sequence_multiple: int = 1
    total_multiple: int = 1
    count_multiple: int = 1
    is_fixed_length: bool = False

    @classmethod
    def at(
        cls, layout: ParallelConfig, max_tokens: int, precision: PrecisionConfig = _FLOAT32
    ) -> Packing:
        """Return the packing rules of a layout and a number format."""
        return cls(
            max_tokens,
            sequence_multiple=sequence_multiple(layout),
            total_multiple=total_multiple(layout, precision),
            count_multiple=layout.pp_size if layout.vpp_size > 1 else 1,
            is_fixed_length=layout.pp_size > 1,
        )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step, for all data-parallel ranks.

    Attributes:
        micro_batches: for each data-parallel rank, the samples of each of its micro-batches; all
            ranks have equally many, the last ones possibly empty.
        groups: the samples of each prompt: a GRPO group, wherever its samples are trained.
        num_tokens, num_sequences: the loss's denominators over the whole step.
        costs: FLOPs of each rank's share.
        waste: share of the micro-batches' tokens that is padding.
    """

    micro_batches: list[list[list[int]]]
    groups: list[list[int]]
    num_tokens: int
    num_sequences: int
    costs: list[float]
    waste: float

    def metrics(self) -> dict[str, float]:
        """Return numbers for the log, keys "packing/..."; imbalance is 1 at best.

        Imbalance is the costliest rank's FLOPs over the mean: what all ranks wait for.
        """
        mean = sum(self.costs) / len(self.costs)
        return {
            "packing/micro_batches": float(len(self.micro_batches[0])),
            "packing/waste": self.waste,
            "packing/imbalance": max(self.costs) / mean if mean else 1.0,
        }


def plan_step(
    sizes: Sequence[SampleSize], packing: Packing, cost: StepCost, dp_size: int
) -> StepPlan:
    """Share a step's samples over ranks and micro-batches; pure, the same on every rank.

    Raises:
        ValueError: a sample is longer than a micro-batch.
    """
    groups: dict[GroupKey, list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size.key, []).append(index)
    members = list(groups.values())
    costs = [_group_cost([sizes[i] for i in group], cost) for group in members]
    shares = balance(costs, dp_size)
    bins = []
    for share in shares:
        mine = [i for g in share for i in members[g]]
        lengths = [pad_to(sizes[i].num_tokens, packing.sequence_multiple) for i in mine]
        packed = first_fit_decreasing(lengths, packing.max_tokens)
        bins.append([[mine[i] for i in members_of_bin] for members_of_bin in packed])
    count = pad_to(max(1, *(len(rank) for rank in bins)), packing.count_multiple)
    bins = [rank + [[] for _ in range(count - len(rank))] for rank in bins]
    lengths = torch.tensor([size.num_response_tokens for size in sizes])
    num_tokens, num_sequences = loss_counts(lengths, torch.tensor([s.is_kept for s in sizes]))
    real = sum(size.num_tokens for size in sizes)
    padded = sum(sum(padded_lengths(rank, sizes, packing)) for rank in bins)
    return StepPlan(
        bins,
        members,
        num_tokens,
        num_sequences,
        [sum(costs[g] for g in share) for share in shares],
        1 - real / padded if padded else 0.0,
    )


def padded_lengths(
    bins: Sequence[Sequence[int]], sizes: Sequence[SampleSize], packing: Packing
) -> list[int]:
    """Tokens of each micro-batch, padding included."""
    lengths = [
        pad_to(
            max(1, sum(pad_to(sizes[i].num_tokens, packing.sequence_multiple) for i in indices)),
            packing.total_multiple,
        )
        for indices in bins
    ]
    return [max(lengths)] * len(lengths) if packing.is_fixed_length else lengths


def _group_cost(sizes: Sequence[SampleSize], cost: StepCost) -> float:
    """FLOPs of a prompt's responses, its images counted once."""
    text = sum(cost.sequence(size.num_tokens, size.num_response_tokens) for size in sizes)
    return text + cost.images(sizes[0].patches)

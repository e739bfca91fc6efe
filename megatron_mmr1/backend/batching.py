"""From prompts and responses to right-padded micro-batches.

A prompt's images are encoded once a micro-batch, however many of its responses are in it. A step's
losses carry one global denominator, counted here over the whole optimizer step before it is cut
into micro-batches.

N sequences, S sequence length (longest of the micro-batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched

import torch
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.algorithms.advantages import group_advantages
from megatron_mmr1.algorithms.grpo_loss import loss_counts, token_weights
from megatron_mmr1.backend import parallel
from megatron_mmr1.types import Demonstration, MicroBatch, Prompt, ScoredGroup


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to learn from.

    Attributes:
        response_token_ids: int64 [R].
        rollout_logprobs: float32 [R]; zeros for a demonstration.
        is_kept: False for a response that could not be judged: it carries no loss and counts in no
            denominator.
    """

    prompt: Prompt
    response_token_ids: Tensor
    rollout_logprobs: Tensor
    advantage: float
    is_kept: bool


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """What inserting images needs to know of a model."""

    token_id: int
    spatial_merge_size: int


def samples_of_groups(groups: Sequence[ScoredGroup]) -> list[Sample]:
    """Turn scored groups into samples, advantages included
    (group-normalised: algorithms.advantages).
    """
    rewards_PG = torch.tensor([[score.reward for score in g.scores] for g in groups])
    advantages_PG = group_advantages(rewards_PG)
    return [
        Sample(
            group.group.prompt,
            torch.tensor(rollout.token_ids, dtype=torch.long),
            torch.tensor(rollout.rollout_logprobs, dtype=torch.float32),
            advantage,
            score.verdict.outcome != "could_not_judge",
        )
        for group, advantages in zip(groups, advantages_PG.tolist(), strict=True)
        for rollout, score, advantage in zip(
            group.group.rollouts, group.scores, advantages, strict=True
        )
    ]


def samples_of_demonstrations(demonstrations: Sequence[Demonstration]) -> list[Sample]:
    """Turn demonstrations into samples; the advantage is not used."""
    return [
        Sample(d.prompt, d.response_token_ids, torch.zeros(len(d.response_token_ids)), 0.0, True)
        for d in demonstrations
    ]


def num_tokens(samples: Sequence[Sample]) -> int:
    """Count prompt and response tokens, padding not included."""
    return sum(len(s.prompt.token_ids) + len(s.response_token_ids) for s in samples)


def micro_batches(
    samples: Sequence[Sample], micro_batch_size: int, aggregation: str, images: ImageTokens
) -> list[MicroBatch]:
    """Cut one optimizer step's samples (of this rank) into micro-batches.

    Token weights are made with the step's token and sequence counts over all data-parallel ranks,
    so that the step's loss does not change with `micro_batch_size` or with the number of ranks. One
    all-reduce.
    """
    lengths_N = torch.tensor([len(s.response_token_ids) for s in samples])
    mask_NS = torch.arange(int(lengths_N.max())) < lengths_N.unsqueeze(1)
    mine = loss_counts(mask_NS, torch.tensor([s.is_kept for s in samples]))
    counts = parallel.sum_over_dp({"tokens": mine[0], "sequences": mine[1]})
    totals = int(counts["tokens"]), int(counts["sequences"])
    return [
        _micro_batch(part, aggregation, *totals, images)
        for part in batched(samples, micro_batch_size)
    ]


def _micro_batch(
    samples: Sequence[Sample],
    aggregation: str,
    num_tokens: int,
    num_sequences: int,
    images: ImageTokens,
) -> MicroBatch:
    num_rows = len(samples)
    length = max(len(s.prompt.token_ids) + len(s.response_token_ids) for s in samples)
    token_ids_NS = torch.zeros(num_rows, length, dtype=torch.long)
    position_ids_3NS = torch.zeros(3, num_rows, length, dtype=torch.long)
    mask_NS = torch.zeros(num_rows, length, dtype=torch.bool)
    rollout_logprobs_NS = torch.zeros(num_rows, length)
    for row, sample in enumerate(samples):
        start = len(sample.prompt.token_ids)
        end = start + len(sample.response_token_ids)
        token_ids_NS[row, :start] = sample.prompt.token_ids
        token_ids_NS[row, start:end] = sample.response_token_ids
        position_ids_3NS[:, row, :start] = sample.prompt.position_ids
        # Text goes on from the largest position of the prompt, the same on all three axes.
        first = int(sample.prompt.position_ids.max()) + 1
        position_ids_3NS[:, row, start:end] = torch.arange(first, first + end - start)
        mask_NS[row, start:end] = True
        rollout_logprobs_NS[row, start:end] = sample.rollout_logprobs
    pixel_values, image_grid_thw, visual_index = _images(samples, images)
    is_kept_N = torch.tensor([s.is_kept for s in samples])
    weights_NS = token_weights(mask_NS, is_kept_N, aggregation, num_tokens, num_sequences)
    target = device.device()
    return MicroBatch(
        token_ids_NS=token_ids_NS.to(target),
        position_ids_3NS=position_ids_3NS.to(target),
        pixel_values=None if pixel_values is None else pixel_values.to(target),
        image_grid_thw=None if image_grid_thw is None else image_grid_thw.to(target),
        visual_index=visual_index.to(target),
        response_mask_NS=mask_NS.to(target),
        token_weights_NS=weights_NS.to(target),
        advantages_N=torch.tensor([s.advantage for s in samples]).to(target),
        rollout_logprobs_NS=rollout_logprobs_NS.to(target),
    )


def _images(
    samples: Sequence[Sample], images: ImageTokens
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gather the distinct prompts' pixels, and say which feature each image token takes."""
    pixels: list[Tensor] = []
    grids: list[Tensor] = []
    first_feature: dict[str, int] = {}
    num_features = 0
    index: list[Tensor] = []
    for sample in samples:
        prompt = sample.prompt
        count = int((prompt.token_ids == images.token_id).sum())
        if prompt.pixel_values is None or prompt.image_grid_thw is None:
            continue
        if prompt.prompt_id not in first_feature:
            made = int(prompt.image_grid_thw.prod(-1).sum()) // images.spatial_merge_size**2
            if made != count:
                raise ValueError(
                    f"prompt {prompt.prompt_id!r} has {count} image tokens, but its images make "
                    f"{made} features; process text and images with the model's own processor"
                )
            first_feature[prompt.prompt_id] = num_features
            num_features += made
            pixels.append(prompt.pixel_values)
            grids.append(prompt.image_grid_thw)
        start = first_feature[prompt.prompt_id]
        index.append(torch.arange(start, start + count))
    if not pixels:
        return None, None, torch.zeros(0, dtype=torch.long)
    return torch.cat(pixels), torch.cat(grids), torch.cat(index)

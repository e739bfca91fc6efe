"""From prompts and responses to packed micro-batches: a rank's share of a planned step.

The plan (plan.py) needs numbers only and is the same on every rank; a rank then builds the tensors
of its own share.

N samples, T packed tokens, R response tokens, M image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.algorithms.advantages import group_advantages
from megatron_mmr1.algorithms.grpo_loss import token_weights
from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.packing import StepCost, pad_to
from megatron_mmr1.backend.plan import Packing, SampleSize, StepPlan, padded_lengths, plan_step
from megatron_mmr1.types import (
    Demonstration,
    PackedBatch,
    Prompt,
    PromptImages,
    ResponseRows,
    ScoredGroup,
    StepBatch,
)

_PAD_SEQUENCE_TOKENS = 64  # padding at the end is cut into short sequences: attention is quadratic


class _Processor(Protocol):
    """What of data.processor.PromptProcessor the model's image tokens depend on."""

    image_token_id: int
    spatial_merge_size: int


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
    """What inserting images needs to know of a model, and of this rank.

    Attributes:
        are_encoded_here: this rank is on the first pipeline stage, where the vision tower is.
    """

    token_id: int
    spatial_merge_size: int
    are_encoded_here: bool

    @classmethod
    def of(cls, processor: _Processor) -> ImageTokens:
        """Read a model's processor, and this rank's pipeline stage."""
        return cls(
            processor.image_token_id, processor.spatial_merge_size, parallel.is_first_stage()
        )

    def check(self, prompt: Prompt) -> int:
        """Count the features that a prompt's images make.

        Raises:
            ValueError: the prompt has another number of image tokens.
        """
        assert prompt.image_grid_thw is not None
        made = int(prompt.image_grid_thw.prod(-1).sum()) // self.spatial_merge_size**2
        count = int((prompt.token_ids == self.token_id).sum())
        if made != count:
            raise ValueError(
                f"prompt {prompt.prompt_id!r} has {count} image tokens, but its images "
                f"(image_grid_thw={prompt.image_grid_thw.tolist()}) make {made} features; process "
                "text and images with the model's own processor"
            )
        return made


@dataclass(frozen=True, slots=True)
class StepBuilder:
    """Makes this rank's share of an optimizer step.

    Attributes:
        cost: balances data-parallel ranks.
        aggregation: see algorithms.grpo_loss.token_weights.
    """

    packing: Packing
    cost: StepCost
    aggregation: str
    images: ImageTokens

    def build(
        self, sizes: Sequence[SampleSize], sample: Callable[[int], Sample]
    ) -> tuple[StepBatch, StepPlan]:
        """Plan the step over all ranks and build the tensors of this one.

        Args:
            sizes: of all samples of the step, the same on every rank.
            sample: makes sample `index`; called for this rank's share only. On ranks that encode
                images its prompt holds pixels.

        Raises:
            ValueError: a sample is longer than a micro-batch, or a prompt's image tokens are not
                those of its images.
        """
        plan = plan_step(sizes, self.packing, self.cost, parallel.dp_size())
        args = self.packing, self.aggregation, self.images
        return _build(plan, parallel.dp_rank(), sizes, sample, *args), plan


def size_of(sample: Sample) -> SampleSize:
    """Measure a sample; its pixels are not needed."""
    grid = sample.prompt.image_grid_thw
    return SampleSize(
        sample.prompt.prompt_id,
        len(sample.prompt.token_ids),
        len(sample.response_token_ids),
        () if grid is None else tuple(grid.prod(-1).tolist()),
        sample.is_kept,
    )


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


def sample_of_demonstration(demonstration: Demonstration) -> Sample:
    """Turn a demonstration into a sample; the advantage is not used."""
    response = demonstration.response_token_ids
    return Sample(demonstration.prompt, response, torch.zeros(len(response)), 0.0, True)


def with_logprobs(
    step: StepBatch, old: Sequence[Tensor] | None = None, ref: Sequence[Tensor] | None = None
) -> StepBatch:
    """Return the step with frozen log-probs, one [R] tensor a micro-batch."""
    batches = []
    for index, batch in enumerate(step.micro_batches):
        rows = batch.rows
        if old is not None:
            rows = replace(rows, old_logprobs_R=old[index])
        if ref is not None:
            rows = replace(rows, ref_logprobs_R=ref[index])
        batches.append(replace(batch, rows=rows))
    return replace(step, micro_batches=tuple(batches))


def _build(
    plan: StepPlan,
    dp_rank: int,
    sizes: Sequence[SampleSize],
    sample: Callable[[int], Sample],
    packing: Packing,
    aggregation: str,
    images: ImageTokens,
) -> StepBatch:
    """Build the tensors of one data-parallel rank's share."""
    bins = plan.micro_batches[dp_rank]
    lengths = padded_lengths(bins, sizes, packing)
    samples = {index: sample(index) for indices in bins for index in indices}
    first_feature: dict[str, int] = {}
    encoded: list[PromptImages] = []
    num_features = 0
    for index in sorted(samples):
        prompt = samples[index].prompt
        if prompt.image_grid_thw is None or prompt.prompt_id in first_feature:
            continue
        first_feature[prompt.prompt_id] = num_features
        num_features += images.check(prompt)
        if images.are_encoded_here:
            assert prompt.pixel_values is not None
            encoded.append(PromptImages(prompt.pixel_values, prompt.image_grid_thw))
    kept_N = torch.tensor([size.is_kept for size in sizes])
    responses_N = torch.tensor([size.num_response_tokens for size in sizes])
    weights_N = token_weights(
        responses_N, kept_N, aggregation, plan.num_tokens, plan.num_sequences
    ).tolist()
    micro_batches = tuple(
        _micro_batch(
            [(i, samples[i], weights_N[i]) for i in indices], length, packing, first_feature, images
        )
        for indices, length in zip(bins, lengths, strict=True)
    )
    return StepBatch(micro_batches, tuple(encoded))


def _micro_batch(
    samples: Sequence[tuple[int, Sample, float]],
    length: int,
    packing: Packing,
    first_feature: dict[str, int],
    images: ImageTokens,
) -> PackedBatch:
    """Lay (index, sample, token weight) end to end in `length` tokens."""
    token_ids_T = torch.zeros(length, dtype=torch.long)
    position_ids_3T = torch.zeros(3, length, dtype=torch.long)
    boundaries, predicts = [0], [torch.zeros(0, dtype=torch.long)]
    visual_positions, visual_features = list(predicts), list(predicts)
    for _, sample, _ in samples:
        prompt, response = sample.prompt, sample.response_token_ids
        start = boundaries[-1]
        middle, end = start + len(prompt.token_ids), start + len(prompt.token_ids) + len(response)
        token_ids_T[start:middle] = prompt.token_ids
        token_ids_T[middle:end] = response
        position_ids_3T[:, start:middle] = prompt.position_ids
        # Text goes on from the largest position of the prompt, the same on all three axes.
        first = int(prompt.position_ids.max()) + 1
        position_ids_3T[:, middle:end] = torch.arange(first, first + len(response))
        predicts.append(torch.arange(middle - 1, end - 1))
        if prompt.prompt_id in first_feature:
            here = (prompt.token_ids == images.token_id).nonzero().flatten()
            visual_positions.append(start + here)
            visual_features.append(first_feature[prompt.prompt_id] + torch.arange(len(here)))
        boundaries.append(start + pad_to(end - start, packing.sequence_multiple))
    piece = pad_to(_PAD_SEQUENCE_TOKENS, packing.sequence_multiple)
    while boundaries[-1] < length:
        boundaries.append(min(boundaries[-1] + piece, length))

    def each(values: list[float]) -> Tensor:
        counts = torch.tensor([len(s.response_token_ids) for _, s, _ in samples], dtype=torch.long)
        return torch.tensor(values).repeat_interleave(counts)

    rows = ResponseRows(
        target_ids_R=_joined([s.response_token_ids for _, s, _ in samples], torch.long),
        sample_R=each([i for i, _, _ in samples]).long(),
        token_weights_R=each([weight for _, _, weight in samples]),
        advantages_R=each([s.advantage for _, s, _ in samples]),
        rollout_logprobs_R=_joined([s.rollout_logprobs for _, s, _ in samples], torch.float32),
    )
    batch = PackedBatch(
        token_ids_T,
        position_ids_3T,
        tuple(boundaries),
        torch.cat(visual_positions),
        torch.cat(visual_features),
        torch.cat(predicts),
        rows,
    )
    return _on_device(batch)


def _joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(tensors).to(dtype) if tensors else torch.zeros(0, dtype=dtype)


def _on_device(batch: PackedBatch) -> PackedBatch:
    target = device.device()
    rows = batch.rows
    return replace(
        batch,
        token_ids_T=batch.token_ids_T.to(target),
        position_ids_3T=batch.position_ids_3T.to(target),
        visual_position_M=batch.visual_position_M.to(target),
        visual_feature_M=batch.visual_feature_M.to(target),
        predicts_R=batch.predicts_R.to(target),
        rows=ResponseRows(
            rows.target_ids_R.to(target),
            rows.sample_R.to(target),
            rows.token_weights_R.to(target),
            rows.advantages_R.to(target),
            rows.rollout_logprobs_R.to(target),
        ),
    )

"""From prompts and responses to packed micro-batches: a rank's share of a planned step.

The plan (plan.py) needs numbers only and is the same on every rank; a rank then builds the tensors
of its own share.

N samples, T packed tokens, R response tokens, M image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.algorithms.grpo_loss import token_weights
from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.cost import StepCost
from megatron_mmr1.backend.packing import pad_to
from megatron_mmr1.backend.plan import Packing, SampleSize, StepPlan, padded_lengths, plan_step
from megatron_mmr1.kernels.sequences import pack_sequences
from megatron_mmr1.types import (
    Demonstration,
    PackedBatch,
    PackedSequences,
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
        reward: see `SampleSize`.
    """

    prompt: Prompt
    response_token_ids: Tensor
    rollout_logprobs: Tensor
    reward: float = 0.0


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
        aggregation, fixed_length: see algorithms.grpo_loss.token_weights.
    """

    packing: Packing
    cost: StepCost
    images: ImageTokens
    aggregation: str = "token_mean"
    fixed_length: int = 0

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
        return self._build(plan, parallel.dp_rank(), sizes, sample), plan

    def _build(
        self,
        plan: StepPlan,
        dp_rank: int,
        sizes: Sequence[SampleSize],
        sample: Callable[[int], Sample],
    ) -> StepBatch:
        """Build the tensors of one data-parallel rank's share."""
        bins = plan.micro_batches[dp_rank]
        lengths = padded_lengths(bins, sizes, self.packing)
        samples = {index: sample(index) for indices in bins for index in indices}
        first_feature: dict[str, int] = {}
        encoded: list[PromptImages] = []
        num_features = 0
        for index in sorted(samples):
            prompt = samples[index].prompt
            if prompt.image_grid_thw is None or prompt.prompt_id in first_feature:
                continue
            first_feature[prompt.prompt_id] = num_features
            num_features += self.images.check(prompt)
            if self.images.are_encoded_here:
                assert prompt.pixel_values is not None
                encoded.append(PromptImages(prompt.pixel_values, prompt.image_grid_thw))
        worth = self._worth(plan, sizes)
        micro_batches = tuple(
            _micro_batch(
                [(i, samples[i]) for i in indices],
                length,
                self.packing,
                worth,
                first_feature,
                self.images,
            )
            for indices, length in zip(bins, lengths, strict=True)
        )
        return StepBatch(micro_batches, tuple(encoded))

    def _worth(self, plan: StepPlan, sizes: Sequence[SampleSize]) -> _Worth:
        """Put the rewards of the whole step in groups; give each sample its token weight."""
        order = [index for group in plan.groups for index in group]
        weights_N = token_weights(
            torch.tensor([size.num_response_tokens for size in sizes]),
            torch.tensor([size.is_kept for size in sizes]),
            self.aggregation,
            plan.num_tokens,
            plan.num_sequences,
            self.fixed_length,
        )
        return _Worth(
            torch.tensor([sizes[index].reward for index in order], dtype=torch.float32),
            list(accumulate((len(group) for group in plan.groups), initial=0)),
            {index: place for place, index in enumerate(order)},
            weights_N.tolist(),
        )


@dataclass(frozen=True, slots=True)
class _Worth:
    """What the step's samples, on all ranks, are worth.

    Attributes:
        rewards_N: float32, group by group; `group_offsets` says where each begins, and N.
        place: where a sample has its reward.
        weights: of each token of a sample, by sample.
    """

    rewards_N: Tensor
    group_offsets: list[int]
    place: dict[int, int]
    weights: list[float]


def size_of(sample: Sample) -> SampleSize:
    """Measure a sample; its pixels are not needed."""
    grid = sample.prompt.image_grid_thw
    return SampleSize(
        sample.prompt.key,
        len(sample.prompt.token_ids),
        len(sample.response_token_ids),
        () if grid is None else tuple(grid.prod(-1).tolist()),
        sample.reward,
    )


def samples_of_groups(groups: Sequence[ScoredGroup]) -> list[Sample]:
    """Turn scored groups into samples; their advantages are made with the loss."""
    return [
        Sample(
            group.group.prompt,
            torch.tensor(rollout.token_ids, dtype=torch.long),
            torch.tensor(rollout.rollout_logprobs, dtype=torch.float32),
            score.reward,
        )
        for group in groups
        for rollout, score in zip(group.group.rollouts, group.scores, strict=True)
    ]


def sample_of_demonstration(demonstration: Demonstration) -> Sample:
    """Turn a demonstration into a sample; the reward is not used."""
    response = demonstration.response_token_ids
    return Sample(demonstration.prompt, response, torch.zeros(len(response)))


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


def _micro_batch(
    samples: Sequence[tuple[int, Sample]],
    length: int,
    packing: Packing,
    worth: _Worth,
    first_feature: dict[str, int],
    images: ImageTokens,
) -> PackedBatch:
    """Lay (index, sample) end to end in `length` tokens."""
    token_ids_T = torch.zeros(length, dtype=torch.long)
    position_ids_3T = torch.zeros(3, length, dtype=torch.long)
    boundaries, predicts = [0], [torch.zeros(0, dtype=torch.long)]
    visual_positions, visual_features = list(predicts), list(predicts)
    for _, sample in samples:
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

    lengths = [len(sample.response_token_ids) for _, sample in samples]
    rows = ResponseRows(
        target_ids_R=_joined([s.response_token_ids for _, s in samples], torch.long),
        rollout_logprobs_R=_joined([s.rollout_logprobs for _, s in samples], torch.float32),
        sequences=pack_sequences(
            list(accumulate(lengths, initial=0)),
            sum(lengths),
            sample=[index for index, _ in samples],
            weight=[worth.weights[index] for index, _ in samples],
            reward_index=[worth.place[index] for index, _ in samples],
            group_offsets=worth.group_offsets,
            rewards_N=worth.rewards_N,
        ),
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
        rows=replace(
            rows,
            target_ids_R=rows.target_ids_R.to(target),
            rollout_logprobs_R=rows.rollout_logprobs_R.to(target),
            sequences=PackedSequences(
                **{
                    f.name: getattr(rows.sequences, f.name).to(target)
                    for f in fields(PackedSequences)
                }
            ),
        ),
    )

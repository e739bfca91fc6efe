"""The values that flow through one training step. Small, frozen, and free of behaviour.

Letters used in names: P prompts, G responses a prompt, N = P*G sequences, S sequence length in
tokens, V vocabulary, I images. Group membership is the prompt's `key`, never a row position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

FinishReason = Literal["stop", "length"]
Outcome = Literal["correct", "wrong", "could_not_judge"]
GroupKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The canonical multimodal record: the result of ONE processor call,
    fed to rollout and training alike.

    Attributes:
        prompt_id: unique in its data set.
        token_ids: int64 [S], chat template applied, image placeholders expanded.
        position_ids: int64 [3, S], multimodal rotary positions (temporal, height, width). All three
            count from 0 where the model has only one kind.
        pixel_values: float32 [patches, patch_dim] of all images in order, or None without images.
            InternVL: [tiles, 3, height, width].
        image_grid_thw: int64 [I, 3], patches along (time, height, width) of each image, or None.
            InternVL: of each tile.
        answer: the gold answer.
        category: what the data set calls this kind of question ("" when it has no name for it).
        images: the encoded image files, for the report's table (not for the model).
        occurrence: which of a step's draws of this prompt it is; each has random numbers of its
            own.
    """

    prompt_id: str
    token_ids: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    answer: str
    category: str = ""
    question: str = ""
    images: tuple[bytes, ...] = ()
    occurrence: int = 0

    @property
    def key(self) -> GroupKey:
        """Names a GRPO group within a step."""
        return self.prompt_id, self.occurrence

    def without_images(self) -> Prompt:
        """Return it without pixels and image files, which are large and can be read again."""
        return replace(self, pixel_values=None, images=())

    @property
    def pixel_bytes(self) -> int:
        """Memory of its pixels."""
        return 0 if self.pixel_values is None else self.pixel_values.nbytes


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the response to imitate (cold start).

    Attributes:
        response_token_ids: int64 [R], ending in the end-of-turn token; the loss covers exactly
            these.
    """

    prompt: Prompt
    response_token_ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response.

    Attributes:
        sample_index: 0..G-1 inside the group.
        token_ids: the sampled tokens, the end-of-turn token included when `finish_reason` is
            "stop".
        rollout_logprobs: the engine's log-probability (nats, after temperature and bans) of each
            token.
        finish_reason: "stop", or "length" when cut at the limit.
        text: decoded `token_ids` without special tokens.
    """

    sample_index: int
    token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    text: str


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All G responses to one prompt, sampled by the weights of `weight_version`."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    weight_version: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier says of one answer; the three outcomes are never mixed.

    Attributes:
        reason: one short phrase for people ("equal", "no boxed answer", "deadline of 5 s passed").
    """

    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A verdict, the format check, and the scalar reward made of the two.

    Attributes:
        reward: format_weight * is_well_formed + accuracy_weight * (outcome == "correct") less the
            penalties. NaN when the verdict is could_not_judge: such a response has no reward,
            leaves its group's statistics and carries no loss.
        repetition_penalty, overlong_penalty: what they took off the reward (config.reward).
    """

    verdict: Verdict
    is_well_formed: bool
    reward: float
    repetition_penalty: float = 0.0
    overlong_penalty: float = 0.0

    @property
    def reward_before_penalties(self) -> float:
        """The reward without penalties, rounded so that equal ones are equal."""
        return round(self.reward + self.repetition_penalty + self.overlong_penalty, 6)


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A rollout group with one `ScoredRollout` for each rollout, in the same order."""

    group: RolloutGroup
    scores: tuple[ScoredRollout, ...]


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """The responses of a micro-batch, end to end, and what each is worth; S of them.

    Made and checked by `kernels.sequences.pack_sequences`.

    Attributes:
        offsets_S1: int32, ascending; sequence s has the rows from offsets[s] to offsets[s + 1].
        sample_S: int64, which of the step's samples each is.
        weight_S: float32, the share of the loss that each of its tokens has, so that the loss of a
            step is the plain sum of weight * token loss over micro-batches and ranks, whatever the
            split (see algorithms.grpo_loss.token_weights).
        reward_S: int32, its place in `rewards_N`.
        group_S2: int32, where its GRPO group begins and ends in `rewards_N`.
        rewards_N: float32, of the step's samples on all data-parallel ranks, group by group; NaN =
            could not judge.
    """

    offsets_S1: torch.Tensor
    sample_S: torch.Tensor
    weight_S: torch.Tensor
    reward_S: torch.Tensor
    group_S2: torch.Tensor
    rewards_N: torch.Tensor


@dataclass(frozen=True, slots=True)
class ResponseRows:
    """What the loss knows of each response token; R of them, in packed order.

    Attributes:
        target_ids_R: int64, the token that was sampled (or is to be imitated).
        rollout_logprobs_R: float32.
        sequences: which response each belongs to.
        old_logprobs_R, ref_logprobs_R: float32, or None where the step doesn't need them.
    """

    target_ids_R: torch.Tensor
    rollout_logprobs_R: torch.Tensor
    sequences: PackedSequences
    old_logprobs_R: torch.Tensor | None = None
    ref_logprobs_R: torch.Tensor | None = None

    @property
    def sequence_R(self) -> torch.Tensor:
        """Which of the micro-batch's sequences each row belongs to, int32."""
        row_R = torch.arange(len(self.target_ids_R), device=self.target_ids_R.device)
        ends_S = self.sequences.offsets_S1[1:]
        return torch.searchsorted(ends_S, row_R.int(), right=True, out_int32=True)

    @property
    def sample_R(self) -> torch.Tensor:
        """Which of the step's samples each row belongs to, int64."""
        return self.sequences.sample_S[self.sequence_R]

    @property
    def token_weights_R(self) -> torch.Tensor:
        """Each row's share of the loss, float32."""
        return self.sequences.weight_S[self.sequence_R]

    def take(self, index_R: torch.Tensor) -> ResponseRows:
        """Return the rows at `index_R` (int64, ascending); a sequence may be left without any."""
        old, ref = self.old_logprobs_R, self.ref_logprobs_R
        offsets_S1 = torch.searchsorted(index_R, self.sequences.offsets_S1.long(), out_int32=True)
        return ResponseRows(
            target_ids_R=self.target_ids_R[index_R],
            rollout_logprobs_R=self.rollout_logprobs_R[index_R],
            sequences=replace(self.sequences, offsets_S1=offsets_S1),
            old_logprobs_R=None if old is None else old[index_R],
            ref_logprobs_R=None if ref is None else ref[index_R],
        )


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences end to end (THD) for one forward and backward pass: T tokens, R response tokens.

    The same on every tensor-, pipeline- and context-parallel rank of a replica; backend/layout.py
    says which of it a rank computes. Padding lies to the right of each sequence and, as sequences
    of its own, at the end; causal attention keeps it from real tokens and no row points to it.

    Attributes:
        token_ids_T: int64; padding is 0.
        position_ids_3T: int64 multimodal rotary positions.
        boundaries: where each padded sequence starts, and T.
        visual_position_M, visual_feature_M: int64; the packed positions of image tokens, and which
            row of the step's visual features each takes.
        predicts_R: int64, the packed position whose logits predict each response token.
        rows: what the loss needs of them.
    """

    token_ids_T: torch.Tensor
    position_ids_3T: torch.Tensor
    boundaries: tuple[int, ...]
    visual_position_M: torch.Tensor
    visual_feature_M: torch.Tensor
    predicts_R: torch.Tensor
    rows: ResponseRows


@dataclass(frozen=True, slots=True)
class PromptImages:
    """All images of one prompt, encoded once a step however many responses use them.

    Attributes:
        pixel_values: float32 [patches, patch_dim].
        image_grid_thw: int64 [I, 3].
    """

    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step's share of a data-parallel rank.

    Attributes:
        micro_batches: as many on every data-parallel rank; one without rows only keeps the
            collectives in step.
        images: of each distinct prompt; the step's visual features are theirs in this order. Empty
            on ranks that encode nothing.
    """

    micro_batches: tuple[PackedBatch, ...]
    images: tuple[PromptImages, ...]

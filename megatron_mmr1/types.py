"""The values that flow through one training step. Small, frozen, and free of behaviour.

Letters used in names: P prompts, G responses a prompt, N = P*G sequences, S sequence length in
tokens, V vocabulary, I images. Group membership is the `prompt_id`, never a row position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

FinishReason = Literal["stop", "length"]
Outcome = Literal["correct", "wrong", "could_not_judge"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The canonical multimodal record: the result of ONE processor call,
    fed to rollout and training alike.

    Attributes:
        prompt_id: unique in its data set; the GRPO group's name.
        token_ids: int64 [S], chat template applied, image placeholders expanded.
        position_ids: int64 [3, S], multimodal rotary positions (temporal, height, width).
        pixel_values: float32 [patches, patch_dim] of all images in order, or None without images.
        image_grid_thw: int64 [I, 3], patches along (time, height, width) of each image, or None.
        answer: the gold answer.
        category: what the data set calls this kind of question ("" when it has no name for it).
        images: the encoded image files, for the report's table (not for the model).
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
        reward: format_weight * is_well_formed + accuracy_weight * (outcome == "correct"). NaN when
            the verdict is could_not_judge: such a response has no reward, leaves its group's
            statistics and carries no loss.
    """

    verdict: Verdict
    is_well_formed: bool
    reward: float


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A rollout group with one `ScoredRollout` for each rollout, in the same order."""

    group: RolloutGroup
    scores: tuple[ScoredRollout, ...]


@dataclass(frozen=True, slots=True)
class PromptStats:
    """What one training group taught about its prompt; plain numbers,
    so that ranks can exchange them.

    Attributes:
        num_correct, num_judged: verdict counts (could_not_judge is in neither).
        diversity: TDS in [0, 1], 1 = the responses share no n-gram.
    """

    prompt_id: str
    num_correct: int
    num_judged: int
    diversity: float


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Right-padded sequences for one forward and backward pass. R is the response part of S.

    Attributes:
        token_ids_NS: int64; padding is 0 and lies to the right, so that causal attention never sees
            it.
        position_ids_3NS: int64 multimodal rotary positions.
        pixel_values, image_grid_thw: of the batch's distinct prompts, each encoded once; None
            without images.
        visual_index: int64 [number of image tokens in token_ids_NS, row by row]: which visual
            feature of the encoded prompts each one takes.
        response_mask_NS: bool; True where the token at that position was sampled (or is to be
            imitated).
        advantages_N, rollout_logprobs_NS, token_weights_NS: float32. A token's weight is its share
            of the loss, so that the loss of a step is the plain sum of weight * token loss over
            micro-batches and ranks, whatever the split (see algorithms.grpo_loss.token_weights).
        old_logprobs_NS, ref_logprobs_NS: float32, or None where the step doesn't need them.
    """

    token_ids_NS: torch.Tensor
    position_ids_3NS: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    visual_index: torch.Tensor
    response_mask_NS: torch.Tensor
    token_weights_NS: torch.Tensor
    advantages_N: torch.Tensor | None = None
    rollout_logprobs_NS: torch.Tensor | None = None
    old_logprobs_NS: torch.Tensor | None = None
    ref_logprobs_NS: torch.Tensor | None = None

"""Ways through triton_form.py: each a call that launches what the trainer would, on CPU tensors.

R response tokens (rows), S sequences, N rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist

from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels import contract, triton_form
from megatron_mmr1.kernels.contract import Given, SoftmaxRule, TokenGrpo, Vocabulary
from megatron_mmr1.kernels.sequences import pack_sequences
from megatron_mmr1.types import ResponseRows


@dataclass(frozen=True, slots=True)
class Size:
    """Lengths of one call. `first_row` rows of the micro-batch come before this chunk."""

    num_rows: int = 4
    num_tokens: int = 8203  # no multiple of 16, as with most tokenizers
    num_sequences: int = 2
    num_rewards: int = 8
    num_banned: int = 2
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class RowPath:
    """Logits to log-probs, and to their gradient.

    Attributes:
        is_parallel: the vocabulary is cut over the world's ranks.
        upstream: none (log-probs only), given, grpo, or on_policy (GRPO without old, ref, tis).
        has_entropy: of its gradient, or without a gradient of the entropy itself.
    """

    is_parallel: bool
    upstream: str
    has_entropy: bool
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """For a table."""
        words = [_UPSTREAM[self.upstream], "TP" if self.is_parallel else "TP1"]
        words += ["entropy"] * self.has_entropy
        words += ["fp32"] * (self.dtype == torch.float32)
        return ", ".join(words)

    def call(self, size: Size) -> torch.Tensor:
        """Make logits and launch; return the logits."""
        logits = contract.padded_logits(
            size.num_rows, size.num_tokens, torch.empty(0, dtype=self.dtype)
        ).fill_(1.0)
        first_target = 1 + size.num_banned  # a banned target would leave a row without gradient
        targets_R = first_target + torch.arange(size.num_rows) % (size.num_tokens - first_target)
        rule = SoftmaxRule(0.7, tuple(range(1, first_target)))
        group = dist.group.WORLD if self.is_parallel else None
        vocabulary = Vocabulary(rule, 0, size.num_tokens, group)
        ones_R = torch.ones(size.num_rows)
        if self.upstream == "none":
            triton_form.logprobs_(logits, targets_R, vocabulary, self.has_entropy)
        elif self.upstream == "given":
            given = Given(ones_R, ones_R if self.has_entropy else None)
            triton_form.loss_gradient_(logits, targets_R, vocabulary, given)
        else:
            is_full = self.upstream == "grpo"
            config = _config(kl=is_full, tis=is_full, entropy=self.has_entropy)
            rows = rows_of(size, config, has_old=is_full)
            grpo = TokenGrpo(rows, rows.sequence_R, config, size.first_row)
            triton_form.loss_gradient_(logits, targets_R, vocabulary, grpo)
        return logits


@dataclass(frozen=True, slots=True)
class SequencePath:
    """Log-probs of a micro-batch to loss, gradients and metrics."""

    ratio: str
    has_old: bool
    has_ref: bool
    has_tis: bool
    has_entropy: bool

    @property
    def name(self) -> str:
        """For a table."""
        options = ("old", "ref", "tis", "entropy")
        words = [f"{self.ratio} ratio", *(o for o in options if getattr(self, f"has_{o}"))]
        return ", ".join(words)

    def call(self, size: Size) -> None:
        """Make rows and launch."""
        config = _config(kl=self.has_ref, tis=self.has_tis, entropy=self.has_entropy)
        config.ratio = self.ratio
        rows = rows_of(size, config, has_old=self.has_old)
        num_rows = len(rows.target_ids_R)
        values_2R = torch.ones(2, num_rows)  # the second one begins anywhere, as in the trainer
        triton_form.sequence_loss(values_2R[0], values_2R[1], rows, config)


Path = RowPath | SequencePath

_BOOLS = (False, True)
_UPSTREAM = {
    "none": "log-probs",
    "given": "given gradient",
    "on_policy": "on-policy GRPO",
    "grpo": "GRPO",
}
ROW_PATHS = (
    *(RowPath(*options) for options in product(_BOOLS, ("given", "on_policy", "grpo"), _BOOLS)),
    *(RowPath(tp, "grpo", True, torch.float32) for tp in _BOOLS),
    *(RowPath(True, "none", entropy) for entropy in _BOOLS),
)
SEQUENCE_PATHS = tuple(
    SequencePath(ratio, *options)
    for ratio, options in product(("token", "sequence"), product(_BOOLS, repeat=4))
)


def rows_of(size: Size, config: AlgorithmConfig, *, has_old: bool) -> ResponseRows:
    """Return a micro-batch of `first_row + num_rows` rows, in sequences of like lengths."""
    num_rows, num = size.first_row + size.num_rows, size.num_sequences
    sequences = pack_sequences(
        [i * num_rows // num for i in range(num + 1)],
        num_rows,
        sample=range(num),
        weight=[1 / num_rows] * num,
        reward_index=[i % size.num_rewards for i in range(num)],
        group_offsets=[0, size.num_rewards],
        rewards_N=torch.arange(size.num_rewards, dtype=torch.float32),
    )
    # Parts of longer vectors, as the policy's frozen log-probs are.
    old_R, ref_R, rollout_R = torch.zeros(3 * num_rows).split(num_rows)
    return ResponseRows(
        target_ids_R=torch.zeros(num_rows, dtype=torch.int64),
        rollout_logprobs_R=rollout_R,
        sequences=sequences,
        old_logprobs_R=old_R if has_old else None,
        ref_logprobs_R=ref_R if config.kl_coefficient else None,
    )


def _config(*, kl: bool, tis: bool, entropy: bool) -> AlgorithmConfig:
    return AlgorithmConfig(
        kl_coefficient=0.1 * kl, tis_cap=2.0 * tis, entropy_coefficient=0.01 * entropy
    )

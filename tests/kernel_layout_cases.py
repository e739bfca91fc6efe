"""A vocabulary that is cut over ranks equals a whole one: four processes, both forms.

Run by test_kernels.py in a process of its own. R rows, V columns, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from kernel_batches import (
    ALL,
    FLOAT32,
    NAN,
    Batch,
    Stored,
    definition_of_rows,
    leaf_of,
    make_batch,
    make_logits,
)
from torch import Tensor

from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels import closed_form, triton_form
from megatron_mmr1.kernels.contract import Form, Given, SoftmaxRule, TokenGrpo, Vocabulary
from megatron_mmr1.kernels.head import OutputHead

NUM_RANKS, NUM_TOKENS = 4, 250
# Columns a rank: over four, the third has padding too and the fourth nothing else.
COLUMNS = {2: 128, 4: 96}
WIDTH = 384  # of all ranks together, at most
RULE = SoftmaxRule(0.7, (3, 120, 249))
WHOLE = Vocabulary(RULE, 0, NUM_TOKENS)
TARGETS = (0, 95, 96, 248, 120, 130)  # on every rank that has tokens; the fifth is banned
NOT_FINITE = 5  # a row with a NaN among its logits
LIVE = [0, 1, 2, 3]


def test_a_cut_vocabulary_equals_a_whole_one(tmp_path: Path):
    torch.multiprocessing.spawn(_on_rank, (str(tmp_path / "store"),), nprocs=NUM_RANKS)


def _on_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS)
    for tp_size, num_columns in COLUMNS.items():
        group, _ = dist.new_subgroups(tp_size)
        first = rank % tp_size * num_columns
        num_tokens = max(0, min(num_columns, NUM_TOKENS - first))
        vocabulary = Vocabulary(RULE, first, num_tokens, group)
        mine = slice(first, first + num_columns)
        for kernels, form in (("torch", closed_form), ("triton", triton_form)):
            _check_rows(form, vocabulary, mine)
            _check_head(kernels, vocabulary, mine)
    dist.destroy_process_group()


def _check_rows(form: Form, vocabulary: Vocabulary, mine: slice) -> None:
    """Log-probs, entropies and this rank's part of the gradient; given ones and GRPO's."""
    targets_R = torch.tensor(TARGETS)
    logits = make_logits(len(TARGETS), WIDTH)
    logits[NOT_FINITE, 100] = NAN
    leaf = leaf_of(logits)
    logprobs_R, entropy_R = definition_of_rows(leaf, targets_R, WHOLE)
    batch = make_batch(sequences=[(0, 0, 3), (0, 1, 3)], left_out=[])
    batch = batch.of_policy(targets_R, logprobs_R.nan_to_num(neginf=-9.0))
    d_logprobs_R, d_entropy_R = torch.linspace(0.5, 1.0, 6), torch.linspace(-1.0, -0.5, 6)
    loss = (d_logprobs_R * logprobs_R)[LIVE].sum()
    for upstream, of_definition in (
        (Given(d_logprobs_R), loss),
        (Given(d_logprobs_R, d_entropy_R), loss + (d_entropy_R * entropy_R)[LIVE].sum()),
        *(
            (
                TokenGrpo(one.rows, one.rows.sequence_R, config),
                one.definition(logprobs_R, entropy_R, config).loss,
            )
            for one, config in _with_options(batch)
        ),
    ):
        (expected,) = torch.autograd.grad(of_definition, leaf, retain_graph=True)
        stored = Stored(logits[:, mine])
        found = form.loss_gradient_(stored.logits, targets_R, vocabulary, upstream)
        _check_values(found, (logprobs_R, entropy_R), vocabulary)
        _assert_close(stored.logits[LIVE], expected[LIVE, mine])
        assert (stored.logits[[4, NOT_FINITE]] == 0).all() and stored.is_intact_behind()
    for needs_entropy in (False, True):
        stored = Stored(logits[:, mine])
        found = form.logprobs_(stored.logits, targets_R, vocabulary, needs_entropy)
        _check_values(found, (logprobs_R, entropy_R), vocabulary)
        assert (found[1] is not None) == needs_entropy and stored.is_intact_behind()


def _with_options(batch: Batch) -> Iterator[tuple[Batch, AlgorithmConfig]]:
    """All options of the loss at once; none of them; and a policy that has not moved."""
    yield batch, ALL
    yield batch, AlgorithmConfig()
    yield batch, AlgorithmConfig(advantage_scale="none", tis_cap=1.1)
    yield batch.with_rows(old_logprobs_R=None), AlgorithmConfig()


def _check_values(
    found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor], vocabulary: Vocabulary
) -> None:
    """Equal to the definition, and the same bits on every rank of the group."""
    for found_R, expected_R in zip(found, expected, strict=True):
        if found_R is None:
            continue
        _assert_close(found_R, expected_R)
        assert vocabulary.tp_group is not None
        everywhere = [torch.empty_like(found_R) for _ in range(vocabulary.tp_group.size())]
        dist.all_gather(everywhere, found_R, group=vocabulary.tp_group)
        assert all(torch.equal(everywhere[0].nan_to_num(), r.nan_to_num()) for r in everywhere)


def _check_head(kernels: str, vocabulary: Vocabulary, mine: slice) -> None:
    """All of d hidden, and this rank's part of d weight."""
    generator = torch.Generator().manual_seed(4)
    hidden_RD = torch.randn(len(TARGETS), 16, generator=generator)
    weight = 0.5 * torch.randn(WIDTH, 16, generator=generator)
    targets_R = torch.tensor(TARGETS)
    leaves = leaf_of(hidden_RD), leaf_of(weight)
    logprobs_R, entropy_R = definition_of_rows(leaves[0] @ leaves[1].t(), targets_R, WHOLE)
    batch = make_batch(sequences=[(0, 0, 3), (0, 1, 3)], left_out=[])
    batch = batch.of_policy(targets_R, logprobs_R.nan_to_num(neginf=-9.0))
    hidden_RD.requires_grad_()
    local_weight = weight[mine].clone().requires_grad_()
    output = OutputHead(local_weight, vocabulary, kernels)
    for one, config in _with_options(batch):
        result = one.definition(logprobs_R, entropy_R, config)
        expected = torch.autograd.grad(result.loss, leaves, retain_graph=True)
        loss, _ = output.grpo_loss(hidden_RD, one.rows, config)
        d_hidden_RD, d_local_weight = torch.autograd.grad(loss, (hidden_RD, local_weight))
        _assert_close(loss, result.loss)
        _assert_close(d_hidden_RD, expected[0])
        _assert_close(d_local_weight, expected[1][mine])


def _assert_close(found: Tensor, expected: Tensor) -> None:
    """Without torch.testing, whose import takes two seconds on each of the processes."""
    found, expected = found.detach().double(), expected.detach()
    assert torch.allclose(found, expected, equal_nan=True, **FLOAT32), (found, expected)

"""The output layer and the loss in one: chunks, autograd and main_grad, against the definition.

Run by test_kernels.py in a process of its own. R rows, V columns, D hidden.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_batches import (
    ALL,
    Batch,
    definition_of_rows,
    leaf_of,
    make_batch,
)
from torch import Tensor

from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels import head
from megatron_mmr1.kernels.contract import SUMS, Given, SoftmaxRule, Vocabulary
from megatron_mmr1.kernels.head import OutputHead, form_of

VOCABULARY = Vocabulary(SoftmaxRule(0.7, (3, 5)), first=0, num_tokens=243)
NUM_COLUMNS, NUM_HIDDEN = 250, 24
SEQUENCES = ((3, 2, 4), (0, 1, 5), (4, 39, 3), (0, 2, 2), (0, 0, 6))  # 20 rows: 16 and 4
# Float32 logits carry errors of 1e-6 into probabilities. In float64 the gradients that are given
# are exact, while advantages and token weights stay float32.
GIVEN = {torch.float32: {"rtol": 1e-5, "atol": 3e-6}, torch.float64: {"rtol": 1e-12, "atol": 1e-14}}
GRPO = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float64: {"rtol": 1e-6, "atol": 1e-8}}
every_form = pytest.mark.parametrize(
    ("kernels", "dtype"),
    [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)],
    ids=["torch-float64", "torch-float32", "triton-float32"],
)

torch_form = pytest.mark.parametrize(  # where nothing depends on the form
    ("kernels", "dtype"), [("torch", torch.float64), ("torch", torch.float32)]
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)  # a chunk has at least 16 rows


def make_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Batch]:
    """Hidden states, weight, and rows with log-probs around theirs."""
    generator = torch.Generator().manual_seed(3)
    batch = make_batch(sequences=SEQUENCES, left_out=[3])
    num_rows = len(batch.logprobs_R)
    hidden_RD = torch.randn(num_rows, NUM_HIDDEN, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(NUM_COLUMNS, NUM_HIDDEN, generator=generator)).to(dtype)
    targets_R = torch.arange(num_rows) * 12 % VOCABULARY.num_tokens
    logprobs_R, _ = definition_of_rows(hidden_RD @ weight.t(), targets_R, VOCABULARY)
    batch = batch.of_policy(targets_R, logprobs_R)
    return hidden_RD.requires_grad_(), weight.requires_grad_(), batch


class Definition:
    """In float64, from hidden states and weight on."""

    def __init__(self, hidden_RD: Tensor, weight: Tensor, targets_R: Tensor) -> None:
        self._leaves = leaf_of(hidden_RD), leaf_of(weight)
        self.logprobs_R, self.entropy_R = definition_of_rows(
            self._leaves[0] @ self._leaves[1].t(), targets_R, VOCABULARY
        )

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """By hidden states and weight."""
        return torch.autograd.grad(loss, self._leaves)


def assert_gradients(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: dict[str, float]
) -> None:
    for gradient, of_definition in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.double(), of_definition, **tolerance)


@every_form
@pytest.mark.parametrize("config", [AlgorithmConfig(), ALL], ids=["grpo", "all"])
def test_grpo_loss_and_gradients_equal_the_definition(
    kernels: str, dtype: torch.dtype, config: AlgorithmConfig
):
    hidden_RD, weight, batch = make_case(dtype)
    loss, sums = OutputHead(weight, VOCABULARY, kernels).grpo_loss(hidden_RD, batch.rows, config)
    definition = Definition(hidden_RD, weight, batch.rows.target_ids_R)
    result = batch.definition(definition.logprobs_R, definition.entropy_R, config)
    for name, value in zip(SUMS, sums.tolist(), strict=True):
        assert value == pytest.approx(getattr(result, name).item(), rel=1e-5, abs=2e-6), name
    assert torch.equal(loss, sums[0])
    found = torch.autograd.grad(loss, (hidden_RD, weight))
    assert_gradients(found, definition.gradients(result.loss), GRPO[dtype])
    assert (found[1][VOCABULARY.num_tokens :] == 0).all()


@every_form
def test_the_sequence_ratio_in_two_passes_equals_the_definition(kernels: str, dtype: torch.dtype):
    config = replace(ALL, ratio="sequence", clip_low=0.05, clip_high=0.05)
    hidden_RD, weight, batch = make_case(dtype)
    output, rows = OutputHead(weight, VOCABULARY, kernels), batch.rows
    logprobs_R, entropy_R = output.logprobs(hidden_RD, rows.target_ids_R, needs_entropy=True)
    assert entropy_R is not None
    form = form_of(kernels, hidden_RD.device)
    made = form.sequence_loss(logprobs_R, entropy_R, rows, config)
    upstream = Given(made.d_logprobs_R, made.d_entropy_R)
    loss, again_R = output.given_loss(hidden_RD, rows.target_ids_R, made.sums[0], upstream)
    assert torch.equal(loss, made.sums[0]) and torch.equal(again_R, logprobs_R)
    definition = Definition(hidden_RD, weight, rows.target_ids_R)
    result = batch.definition(definition.logprobs_R, definition.entropy_R, config)
    found = torch.autograd.grad(loss, (hidden_RD, weight))
    assert_gradients(found, definition.gradients(result.loss), GRPO[dtype])


@every_form
@pytest.mark.parametrize("has_entropy", [False, True])
def test_given_gradients_reach_hidden_states_and_weight(
    kernels: str, dtype: torch.dtype, has_entropy: bool
):
    hidden_RD, weight, batch = make_case(dtype)
    targets_R = batch.rows.target_ids_R.clone()
    targets_R[7] = 3  # banned: its log-prob of -inf stays out of a loss that gives it no gradient
    given_R = torch.linspace(-1, 1, len(targets_R)).to(dtype)
    given_R[7] = 0.0
    upstream = Given(given_R, given_R.flip(0).contiguous() if has_entropy else None)
    output = OutputHead(weight, VOCABULARY, kernels)
    loss, logprobs_R = output.given_loss(hidden_RD, targets_R, None, upstream)
    definition = Definition(hidden_RD, weight, targets_R)
    used = (given_R != 0).nonzero().flatten()
    linear = (given_R.double() * definition.logprobs_R)[used].sum()
    # A log-prob of some tens is a float32 number; a sum of 20 of them.
    assert loss.item() == pytest.approx(linear.item(), rel=1e-5)
    torch.testing.assert_close(
        logprobs_R, definition.logprobs_R.to(dtype), **GIVEN[dtype], check_dtype=True
    )
    expected = linear
    if upstream.d_entropy_R is not None:
        # A row whose log-prob is not finite has no gradient by its entropy either.
        expected = expected + (upstream.d_entropy_R.double() * definition.entropy_R)[used].sum()
    found = torch.autograd.grad(loss, (hidden_RD, weight))
    assert_gradients(found, definition.gradients(expected), GIVEN[dtype])


@every_form
def test_logprobs_equal_the_definition_and_have_no_gradient(kernels: str, dtype: torch.dtype):
    hidden_RD, weight, batch = make_case(dtype)
    output, targets_R = OutputHead(weight, VOCABULARY, kernels), batch.rows.target_ids_R
    definition = Definition(hidden_RD, weight, targets_R)
    logprobs_R, nothing = output.logprobs(hidden_RD, targets_R)
    assert nothing is None and not logprobs_R.requires_grad
    torch.testing.assert_close(logprobs_R, definition.logprobs_R.to(dtype), **GIVEN[dtype])
    again_R, entropy_R = output.logprobs(hidden_RD, targets_R, needs_entropy=True)
    assert torch.equal(again_R, logprobs_R) and entropy_R is not None
    torch.testing.assert_close(entropy_R, definition.entropy_R.to(dtype), **GIVEN[dtype])


@every_form
def test_a_weight_with_main_grad_gets_its_gradient_added_there(kernels: str, dtype: torch.dtype):
    hidden_RD, weight, batch = make_case(dtype)
    plain, _ = OutputHead(weight, VOCABULARY, kernels).grpo_loss(hidden_RD, batch.rows, ALL)
    expected = torch.autograd.grad(plain, (hidden_RD, weight))
    before = torch.ones_like(weight.detach())
    weight.main_grad = before.clone()
    loss, _ = OutputHead(weight, VOCABULARY, kernels).grpo_loss(hidden_RD, batch.rows, ALL)
    loss.backward()
    assert weight.grad is None and torch.equal(hidden_RD.grad, expected[0])
    # float32 rounds next to the 1 that was there, at each of two chunks
    torch.testing.assert_close(weight.main_grad - before, expected[1], rtol=0, atol=4e-7)
    scaled, _ = OutputHead(weight, VOCABULARY, kernels).grpo_loss(hidden_RD, batch.rows, ALL)
    with pytest.raises(RuntimeError, match="nonzero"):
        (2 * scaled).backward()


@torch_form
def test_the_gradient_follows_the_factor_on_the_loss(kernels: str, dtype: torch.dtype):
    hidden_RD, weight, batch = make_case(dtype)
    gradients = []
    for factor in (1, 2):
        loss, _ = OutputHead(weight, VOCABULARY, kernels).grpo_loss(hidden_RD, batch.rows, ALL)
        gradients.append(torch.autograd.grad(factor * loss, (hidden_RD, weight)))
    for once, twice in zip(*gradients, strict=True):
        assert torch.equal(2 * once, twice)  # exact: a power of two


@torch_form
def test_a_frozen_weight_gets_no_gradient_and_hidden_states_get_theirs(
    kernels: str, dtype: torch.dtype
):
    hidden_RD, weight, batch = make_case(dtype)
    loss, _ = OutputHead(weight, VOCABULARY, kernels).grpo_loss(hidden_RD, batch.rows, ALL)
    (expected,) = torch.autograd.grad(2 * loss, hidden_RD)
    weight.requires_grad_(False)
    weight.main_grad = torch.zeros_like(weight)
    loss, _ = OutputHead(weight, VOCABULARY, kernels).grpo_loss(hidden_RD, batch.rows, ALL)
    (2 * loss).backward()
    assert torch.equal(hidden_RD.grad, expected)
    assert weight.grad is None and (weight.main_grad == 0).all()


@every_form
def test_no_rows_give_a_loss_of_zero_with_gradients_of_zero(kernels: str, dtype: torch.dtype):
    _, weight, _ = make_case(dtype)
    hidden_RD = torch.empty(0, NUM_HIDDEN, dtype=dtype, requires_grad=True)
    batch = make_batch(sequences=[(0, 0, 0)], left_out=[])
    output = OutputHead(weight, VOCABULARY, kernels)
    loss, sums = output.grpo_loss(hidden_RD, batch.rows, ALL)
    assert loss == 0 and (sums == 0).all()
    d_hidden_RD, d_weight = torch.autograd.grad(loss, (hidden_RD, weight))
    assert d_hidden_RD.shape == (0, NUM_HIDDEN) and (d_weight == 0).all()
    logprobs_R, entropy_R = output.logprobs(hidden_RD, batch.rows.target_ids_R, needs_entropy=True)
    assert logprobs_R.shape == (0,) and entropy_R is not None and entropy_R.shape == (0,)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_bfloat16_adds_its_weight_gradient_to_a_float32_main_grad(kernels: str):
    hidden_RD, weight, batch = make_case(torch.bfloat16)
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    output, targets_R = OutputHead(weight, VOCABULARY, kernels), batch.rows.target_ids_R
    upstream = Given(torch.ones(len(targets_R)))
    loss, _ = output.given_loss(hidden_RD, targets_R, None, upstream)
    loss.backward()
    definition = Definition(hidden_RD, weight, targets_R)
    expected = definition.gradients(definition.logprobs_R.sum())
    # Logits and their gradients are rounded to bfloat16: 2^-8 each, of logits of some tens.
    for found, of_definition in zip((hidden_RD.grad, weight.main_grad), expected, strict=True):
        error = (found.double() - of_definition).norm() / of_definition.norm()
        assert error < 0.02

"""Log-probs of rows of logits and the gradient in place: both forms against the definition.

Run by test_kernels.py in a process of its own. R rows, V columns.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_batches import (
    ALL,
    FLOAT32,
    NAN,
    Batch,
    Stored,
    any_form,
    definition_of_rows,
    leaf_of,
    make_batch,
    make_logits,
)
from torch import Tensor

from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels import closed_form, contract, triton_form
from megatron_mmr1.kernels.contract import SUMS, Form, Given, SoftmaxRule, TokenGrpo, Vocabulary
from megatron_mmr1.kernels.head import form_of

# The gradient's own rounding: half an ulp, and a whole one in Triton's interpreter, which cuts.
BFLOAT16 = {closed_form: 2**-8 + 1e-5, triton_form: 2**-7 + 1e-5}
BANNED = (3, 5)
HUGE = {"rtol": 2e-3, "atol": 2e-3}  # an ulp of 2e4 in float32, by which log-probs are off


def make_targets(num_rows: int, num_tokens: int) -> Tensor:
    """Tokens that are not banned, the first and the last among them."""
    return torch.linspace(0, num_tokens - 1, num_rows).long()


def make_vocabulary(
    num_tokens: int, temperature: float = 0.7, banned: tuple[int, ...] = BANNED
) -> Vocabulary:
    return Vocabulary(SoftmaxRule(temperature, banned), 0, num_tokens)


def tolerance_of(form: Form, dtype: torch.dtype) -> dict[str, float]:
    return FLOAT32 if dtype == torch.float32 else FLOAT32 | {"rtol": BFLOAT16[form]}


def assert_rows_equal_definition(
    form: Form,
    logits: Tensor,
    targets_R: Tensor,
    vocabulary: Vocabulary,
    tolerance: dict[str, float],
    values: dict[str, float] = FLOAT32,
) -> None:
    """Log-probs, entropies and gradients, without and with a gradient by the entropy."""
    d_logprobs_R, d_entropy_R = torch.randn(
        2, len(targets_R), generator=torch.Generator().manual_seed(2)
    )
    for has_entropy in (False, True):
        leaf = leaf_of(logits)
        logprobs_R, entropy_R = definition_of_rows(leaf, targets_R, vocabulary)
        loss = (d_logprobs_R.double() * logprobs_R).sum()
        if has_entropy:
            loss = loss + (d_entropy_R.double() * entropy_R).sum()
        (expected,) = torch.autograd.grad(loss, leaf)
        forward, backward = Stored(logits), Stored(logits)
        upstream = Given(d_logprobs_R, d_entropy_R if has_entropy else None)
        for found_R, found_entropy_R in (
            form.logprobs_(forward.logits, targets_R, vocabulary, has_entropy),
            form.loss_gradient_(backward.logits, targets_R, vocabulary, upstream),
        ):
            assert found_R.dtype == torch.float32
            torch.testing.assert_close(found_R.double(), logprobs_R.detach(), **values)
            assert (found_entropy_R is not None) == has_entropy
            if found_entropy_R is not None:
                torch.testing.assert_close(found_entropy_R.double(), entropy_R.detach(), **values)
        torch.testing.assert_close(backward.logits.double(), expected, **tolerance)
        assert (backward.logits[:, vocabulary.num_tokens :] == 0).all()
        assert forward.is_intact_behind() and backward.is_intact_behind()


@any_form
@pytest.mark.parametrize(("num_tokens", "num_columns"), [(250, 250), (997, 1000), (1000, 1000)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_equal_the_definition(
    form: Form, num_tokens: int, num_columns: int, temperature: float, dtype: torch.dtype
):
    logits = make_logits(4, num_columns, dtype)
    vocabulary = make_vocabulary(num_tokens, temperature)
    tolerance = tolerance_of(form, dtype)
    assert_rows_equal_definition(form, logits, make_targets(4, num_tokens), vocabulary, tolerance)


@pytest.mark.parametrize(
    ("block", "num_tokens", "num_columns"),
    [
        (512, 511, 512),
        (512, 512, 512),  # whole tiles only
        (512, 512, 600),  # padding alone in the last tile
        (512, 513, 513),
        (512, 1000, 1000),
        (512, 1024, 1040),
        (512, 100, 1200),  # padding over several tiles
        (triton_form.ROW_BLOCK, triton_form.ROW_BLOCK + 1000, triton_form.ROW_BLOCK + 1000),
    ],
)
def test_rows_of_any_number_of_tiles_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, block: int, num_tokens: int, num_columns: int
):
    monkeypatch.setattr(triton_form, "ROW_BLOCK", block)
    logits = make_logits(3, num_columns)
    # The largest logit in each place that a seam could lose.
    logits[torch.arange(3), torch.tensor([0, num_tokens - 1, num_tokens // 2])] = 12.0
    targets_R, vocabulary = make_targets(3, num_tokens), make_vocabulary(num_tokens)
    assert_rows_equal_definition(triton_form, logits, targets_R, vocabulary, FLOAT32)


@any_form
def test_huge_logits_stay_finite(form: Form):
    logits = torch.full((3, 250), -1e4)
    logits[:, 7] = logits[:, 200] = 1e4
    logits[2] = -logits[2]
    targets_R, vocabulary = torch.tensor([7, 0, 1]), make_vocabulary(250)
    assert_rows_equal_definition(form, logits, targets_R, vocabulary, HUGE, values=HUGE)


@any_form
@pytest.mark.parametrize("has_entropy", [False, True])
def test_a_row_without_a_finite_logprob_has_gradient_zero_and_leaves_others_alone(
    form: Form, has_entropy: bool
):
    logits, targets_R = make_logits(8, 250), make_targets(8, 250)
    alone = logits.clone()
    logits[1, 100] = NAN
    logits[2, 100] = math.inf
    logits[3, targets_R[3]] = -math.inf
    logits[4] = -math.inf
    logits[5] = NAN
    targets_R[6] = BANNED[0]
    alone[7, 100] = logits[7, 100] = -math.inf  # nothing wrong: a token that can't be sampled
    vocabulary, good = make_vocabulary(250), [0, 7]
    upstream = Given(torch.ones(8), torch.ones(8) if has_entropy else None)
    one, other = Stored(logits), Stored(alone)
    logprobs_R, _ = form.loss_gradient_(one.logits, targets_R, vocabulary, upstream)
    form.loss_gradient_(other.logits, targets_R, vocabulary, upstream)
    assert (one.logits[1:7] == 0).all()
    assert not logprobs_R[1:7].isfinite().any() and logprobs_R[[3, 6]].isneginf().all()
    assert torch.equal(one.logits[good], other.logits[good])
    leaf = leaf_of(alone[good])
    expected_R, entropy_R = definition_of_rows(leaf, targets_R[good], vocabulary)
    loss = expected_R.sum() + (entropy_R.sum() if has_entropy else 0.0)
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(one.logits[good].double(), expected, **FLOAT32)


@any_form
def test_a_row_without_upstream_gradient_has_gradient_zero_whatever_its_logits(form: Form):
    logits = make_logits(3, 250)
    logits[1] = NAN
    stored = Stored(logits)
    upstream = Given(torch.tensor([0.0, 0.0, 1.0]))
    form.loss_gradient_(stored.logits, make_targets(3, 250), make_vocabulary(250), upstream)
    assert (stored.logits[:2] == 0).all() and (stored.logits[2] != 0).any()


@any_form
def test_a_gradient_by_the_entropy_alone_reaches_the_logits(form: Form):
    logits, targets_R, vocabulary = make_logits(2, 250), make_targets(2, 250), make_vocabulary(250)
    stored = Stored(logits)
    form.loss_gradient_(stored.logits, targets_R, vocabulary, Given(torch.zeros(2), torch.ones(2)))
    leaf = leaf_of(logits)
    _, entropy_R = definition_of_rows(leaf, targets_R, vocabulary)
    (expected,) = torch.autograd.grad(entropy_R.sum(), leaf)
    torch.testing.assert_close(stored.logits.double(), expected, **FLOAT32)


def grpo_case(
    dtype: torch.dtype = torch.float32, has_old: bool = True, has_ref: bool = True
) -> tuple[Tensor, Vocabulary, Batch]:
    """Logits, and rows with log-probs around theirs; one target is banned."""
    batch = make_batch(
        sequences=[(3, 2, 3), (0, 1, 4), (3, 1, 1), (4, 39, 2), (0, 2, 2), (0, 0, 2)],
        left_out=[4],
        has_old=has_old,
        has_ref=has_ref,
    )
    num_rows = len(batch.logprobs_R)
    logits, vocabulary = make_logits(num_rows, 250, dtype), make_vocabulary(243)
    targets_R = make_targets(num_rows, 243)
    targets_R[1] = BANNED[1]
    logprobs_R, _ = definition_of_rows(logits, targets_R, vocabulary)
    return logits, vocabulary, batch.of_policy(targets_R, logprobs_R.nan_to_num(neginf=-9.0))


def upstream_of(batch: Batch, config: AlgorithmConfig) -> TokenGrpo:
    return TokenGrpo(batch.rows, batch.rows.sequence_R, config)


@any_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("has_old", [True, False], ids=["old", "no_old"])
@pytest.mark.parametrize(
    "config",
    [
        AlgorithmConfig(),
        AlgorithmConfig(advantage_scale="none"),
        AlgorithmConfig(clip_low=0.1, clip_high=0.15, dual_clip=1.2),
        AlgorithmConfig(tis_cap=1.1),
        AlgorithmConfig(kl_coefficient=0.3),
        AlgorithmConfig(entropy_coefficient=0.1),
        ALL,
    ],
    ids=["grpo", "no_scale", "dual_clip", "tis", "kl", "entropy", "all"],
)
def test_grpo_from_logits_to_their_gradient_equals_the_definition(
    form: Form, config: AlgorithmConfig, has_old: bool, dtype: torch.dtype
):
    logits, vocabulary, batch = grpo_case(dtype, has_old, has_ref=config.kl_coefficient > 0)
    targets_R, stored = batch.rows.target_ids_R, Stored(logits)
    found_R, found_entropy_R = form.loss_gradient_(
        stored.logits, targets_R, vocabulary, upstream_of(batch, config)
    )
    leaf = leaf_of(logits)
    logprobs_R, entropy_R = definition_of_rows(leaf, targets_R, vocabulary)
    torch.testing.assert_close(found_R.double(), logprobs_R.detach(), **FLOAT32)
    assert found_entropy_R is not None
    torch.testing.assert_close(found_entropy_R.double(), entropy_R.detach(), **FLOAT32)
    result = batch.definition(logprobs_R, entropy_R, config)
    # Weights of a 13th make gradients that much smaller than those the tolerance is for.
    tolerance = tolerance_of(form, dtype) | {"atol": FLOAT32["atol"] / 10}
    (expected,) = torch.autograd.grad(result.loss, leaf)
    torch.testing.assert_close(stored.logits.double(), expected, **tolerance)
    assert (stored.logits[1] == 0).all() and found_R[1] == -math.inf
    sums = form.sequence_loss(found_R, found_entropy_R, batch.rows, config).sums
    assert sums[SUMS.index("num_nonfinite")] == result.num_nonfinite == 1


@any_form
def test_grpo_in_chunks_gives_the_bits_of_one_piece(form: Form):
    logits, vocabulary, batch = grpo_case()
    targets_R, upstream = batch.rows.target_ids_R, upstream_of(batch, ALL)
    whole, again = Stored(logits), Stored(logits)
    logprobs_R, entropy_R = form.loss_gradient_(whole.logits, targets_R, vocabulary, upstream)
    form.loss_gradient_(again.logits, targets_R, vocabulary, upstream)
    assert torch.equal(whole.logits, again.logits)  # and two runs the same
    for part in (slice(0, 5), slice(5, 6), slice(6, len(targets_R))):
        chunk = Stored(logits[part])
        found_R, found_entropy_R = form.loss_gradient_(
            chunk.logits, targets_R[part], vocabulary, upstream.take(part)
        )
        assert torch.equal(chunk.logits, whole.logits[part])
        assert torch.equal(found_R, logprobs_R[part])
        assert torch.equal(found_entropy_R, entropy_R[part])


@any_form
def test_given_gradients_in_chunks_are_those_of_one_piece(form: Form):
    logits, targets_R, vocabulary = make_logits(5, 250), make_targets(5, 250), make_vocabulary(250)
    upstream = Given(torch.arange(1.0, 6.0), torch.arange(5.0))
    whole = Stored(logits)
    form.loss_gradient_(whole.logits, targets_R, vocabulary, upstream)
    for part in (slice(0, 2), slice(2, 5)):
        chunk = Stored(logits[part])
        form.loss_gradient_(chunk.logits, targets_R[part], vocabulary, upstream.take(part))
        assert torch.equal(chunk.logits, whole.logits[part])


@any_form
def test_no_rows_give_nothing(form: Form):
    logits, targets_R = contract.padded_logits(0, 250, torch.empty(0)), torch.empty(0).long()
    vocabulary, nothing = make_vocabulary(250), torch.empty(0)
    found_R, entropy_R = form.logprobs_(logits, targets_R, vocabulary, True)
    assert found_R.shape == (0,) and entropy_R is not None and entropy_R.shape == (0,)
    upstream = Given(nothing, nothing)
    found_R, entropy_R = form.loss_gradient_(logits, targets_R, vocabulary, upstream)
    assert found_R.shape == (0,) and entropy_R is not None and entropy_R.shape == (0,)


@any_form
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(3, 250)}, r"strides \(250, 1\).*contract\.padded_logits"),
        ({"logits": torch.zeros(256, 16).t()[:3]}, r"strides \(1, 16\)"),
        ({"logits": torch.zeros(3, 256)[:, 1:]}, r"multiples of 16 elements and of 16 bytes"),
        ({"logits": torch.zeros(3 * 256)}, r"local_logits has shape \(768,\)"),
        ({"logits": torch.zeros(3, 256).half()}, r"local_logits has dtype torch\.float16"),
        ({"targets": torch.zeros(4).long()}, r"targets_R \(4,\); they must be \[R, columns\]"),
        ({"targets": torch.zeros(3).int()}, r"targets_R has dtype torch\.int32; use int64"),
        ({"targets": torch.zeros(3, device="meta").long()}, r"targets_R is on meta"),
        ({"targets": torch.zeros(6).long()[::2]}, r"targets_R has strides \(2,\), with gaps"),
        ({"num_tokens": 257}, r"num_tokens=257 is not within the 256 columns"),
        ({"num_tokens": -1}, r"num_tokens=-1 is not within the 256 columns"),
    ],
)
def test_logits_that_do_not_fit_are_refused(form: Form, changes: dict[str, Any], message: str):
    given = {"logits": torch.zeros(3, 256), "targets": torch.zeros(3).long(), "num_tokens": 200}
    given |= changes
    vocabulary = replace(make_vocabulary(1), num_tokens=given["num_tokens"])
    with pytest.raises(ValueError, match=message):
        form.logprobs_(given["logits"], given["targets"], vocabulary, False)
    with pytest.raises(ValueError, match=message):
        form.loss_gradient_(given["logits"], given["targets"], vocabulary, Given(torch.ones(3)))


def grpo_of(options: dict[str, Any], **vectors: Tensor | None) -> TokenGrpo:
    rows = make_batch(sequences=[(0, 0, 3)], left_out=[]).with_rows(**vectors).rows
    return TokenGrpo(rows, rows.sequence_R, AlgorithmConfig(**options))


@any_form
@pytest.mark.parametrize("target", [-1, 250, 255, 1000])
def test_a_target_that_is_no_token_is_not_finite(form: Form, target: int):
    logits, targets_R = make_logits(2, 250), torch.tensor([7, target])
    rows = make_batch(sequences=[(0, 0, 2)], left_out=[]).rows
    for upstream in (Given(torch.ones(2)), TokenGrpo(rows, rows.sequence_R, ALL)):
        stored = Stored(logits)
        logprobs_R, _ = form.loss_gradient_(
            stored.logits, targets_R, make_vocabulary(250), upstream
        )
        assert logprobs_R[0].isfinite() and logprobs_R[1] == -math.inf
        assert stored.logits[0].any() and not stored.logits[1].any()
    logprobs_R, _ = form.logprobs_(Stored(logits).logits, targets_R, make_vocabulary(250), False)
    assert logprobs_R[0].isfinite() and logprobs_R[1] == -math.inf


@any_form
@pytest.mark.parametrize(
    ("upstream", "message"),
    [
        (Given(torch.ones(2)), r"d_logprobs_R has shape \(2,\).*targets_R asks for \(3,\)"),
        (Given(torch.ones(3).half()), r"d_logprobs_R has .*torch\.float16"),
        (Given(torch.ones(3), torch.ones(4)), r"d_entropy_R has shape \(4,\)"),
        (Given(torch.ones(3, device="meta")), r"d_logprobs_R is on meta, targets_R on cpu"),
        (Given(torch.ones(6)[::2]), r"d_logprobs_R has strides \(2,\), with gaps"),
        (Given(torch.ones(()).expand(3)), r"d_logprobs_R has strides \(0,\)"),
        (grpo_of({"ratio": "sequence"}), r"algorithm\.ratio='sequence' with old_logprobs_R"),
        (grpo_of({"ratio": "sequence", "tis_cap": 2.0}, old_logprobs_R=None), r"or tis_cap"),
        (grpo_of({"kl_coefficient": 0.1}, ref_logprobs_R=None), r"kl_coefficient=0\.1 needs ref"),
        (replace(grpo_of({}), start=1), r"start=1 with 3 rows of logits is not within the 3"),
        (replace(grpo_of({}), sequence_R=torch.zeros(3)), r"sequence_R has .*torch\.float32"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(form: Form, upstream: Given, message: str):
    logits, targets_R = torch.zeros(3, 256), torch.zeros(3).long()
    with pytest.raises(ValueError, match=message):
        form.loss_gradient_(logits, targets_R, make_vocabulary(256), upstream)
    assert not logits.any()


def test_float64_is_for_the_torch_form_only():
    logits, targets_R = torch.zeros(3, 256).double(), torch.zeros(3).long()
    with pytest.raises(ValueError, match=r"local_logits is float64; use model\.kernels='torch'"):
        triton_form.logprobs_(logits, targets_R, make_vocabulary(256), False)
    with pytest.raises(ValueError, match=r"local_logits is float64"):
        triton_form.loss_gradient_(logits, targets_R, make_vocabulary(256), Given(torch.ones(3)))


def test_logits_without_room_for_a_whole_last_row_are_refused():
    short = torch.zeros(2 * 256 + 250).as_strided((3, 250), (256, 1))
    with pytest.raises(ValueError, match=r"contract\.padded_logits"):
        triton_form.logprobs_(short, torch.zeros(3).long(), make_vocabulary(250), False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_that_were_allocated_for_the_kernels_fit(dtype: torch.dtype):
    kept = []  # so that no address is used twice
    for num_rows in range(1, 40):
        kept.append(contract.padded_logits(num_rows, 250, torch.empty(0, dtype=dtype)))
        contract.check_logits(kept[-1], torch.zeros(num_rows).long(), make_vocabulary(250))


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_a_temperature_of_zero_is_refused(temperature: float):
    with pytest.raises(ValueError, match=f"temperature={temperature} is not above 0"):
        SoftmaxRule(temperature, ())


def test_the_form_follows_setting_and_device(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    assert form_of("triton", cpu).__name__.endswith("triton_form")
    assert form_of("auto", cpu).__name__.endswith("closed_form")
    assert form_of("torch", torch.device("cuda")).__name__.endswith("closed_form")
    assert form_of("auto", torch.device("cuda")).__name__.endswith("triton_form")
    with pytest.raises(ValueError, match=r"model\.kernels='cuda' is unknown"):
        form_of("cuda", cpu)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"model\.kernels='triton' needs a GPU"):
        form_of("triton", cpu)

"""The loss of packed sequences: both forms against the definition in float64.

Run by test_kernels.py in a process of its own.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from kernel_batches import ALL, LEFT_OUT, NAN, any_form, assert_close, make_batch

from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels import closed_form, triton_form
from megatron_mmr1.kernels.contract import SUMS, Form
from megatron_mmr1.kernels.sequences import pack_sequences

ALL_GSPO = replace(ALL, ratio="sequence")


@any_form
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("has_old", [True, False], ids=["old", "no_old"])
def test_every_combination_of_options_equals_the_definition(
    form: Form, scale: str, ratio: str, has_old: bool
):
    aggregations = itertools.cycle(["token_mean", "sequence_mean", "fixed_length"])
    for has_dual, has_tis, has_kl, has_bonus in itertools.product([False, True], repeat=4):
        # A sequence's ratio moves less, and so do its clips.
        clips = (0.2, 0.28, 1.4) if ratio == "token" else (0.01, 0.02, 1.03)
        config = AlgorithmConfig(
            advantage_scale=scale,
            ratio=ratio,
            clip_low=clips[0],
            clip_high=clips[1],
            dual_clip=clips[2] if has_dual else 0.0,
            tis_cap=1.1 if has_tis else 0.0,
            kl_coefficient=0.1 if has_kl else 0.0,
            entropy_coefficient=0.02 if has_bonus else 0.0,
            aggregation=next(aggregations),
        )
        batch = make_batch(aggregation=config.aggregation, has_old=has_old, has_ref=has_kl)
        found, expected = batch.found(form, config), batch.expected(config)
        assert_close(found, expected)
        assert (found.d_entropy_R is not None) == has_bonus
        sums = dict(zip(SUMS, expected.sums.tolist(), strict=True))
        assert (sums["clip_fraction"] > 0) == has_old and (sums["tis_truncated"] > 0) == has_tis


@any_form
def test_more_sequences_than_are_added_up_at_once_all_count(form: Form):
    sequences = [(0, i % 3, 1 + i % 2) for i in range(70)]
    batch = make_batch(groups=[(1.0, 0.0, 2.0)], sequences=sequences, left_out=[])
    batch.rows.rollout_logprobs_R[0] += 3.0  # the largest difference is in the first block
    assert_close(batch.found(form, ALL), batch.expected(ALL))


@any_form
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("gap", [40.0, -40.0])
@pytest.mark.parametrize("between", ["old", "ref", "rollout"])
def test_log_ratios_beyond_the_clamp_are_constant(form: Form, ratio: str, gap: float, between: str):
    # A whole sequence, so that its mean is beyond it too, and alone: exp(20) would hide others in
    # the sums. Of both signs of the advantage.
    config = AlgorithmConfig(ratio=ratio, tis_cap=1e9, kl_coefficient=0.1, entropy_coefficient=0.1)
    for member in (0, 1):
        batch = make_batch(groups=[(1.0, 0.0)], sequences=[(0, member, 3)], left_out=[])
        assert batch.rows.old_logprobs_R is not None and batch.rows.ref_logprobs_R is not None
        if between == "rollout":
            batch = batch.with_rows(rollout_logprobs_R=batch.rows.old_logprobs_R - gap)
        elif between == "old":
            # with the engine's, so that only the ratio is far away
            batch = batch.with_rows(
                old_logprobs_R=batch.logprobs_R - gap, rollout_logprobs_R=batch.logprobs_R - gap
            )
        else:
            batch = batch.with_rows(ref_logprobs_R=batch.logprobs_R + gap)
        found = batch.found(form, config)
        assert_close(found, batch.expected(config))
        assert found.sums.isfinite().all()


@any_form
@pytest.mark.parametrize("x", [1e-3, -1e-3, 0.12, -0.3, 0.49, -0.49, 0.51, -0.51, 3.0])
def test_k3_keeps_its_leading_digits_on_both_sides_of_its_switch(form: Form, x: float):
    batch = make_batch(groups=[(0.0,)], sequences=[(0, 0, 1)], left_out=[])
    batch.logprobs_R[:] = 0.0
    x_R = torch.tensor([x])  # exact in float32, as the differences with 0 are
    batch = batch.with_rows(old_logprobs_R=-x_R, ref_logprobs_R=x_R)
    config = AlgorithmConfig(kl_coefficient=0.1)
    found, expected = batch.found(form, config), batch.expected(config)
    # A few roundings; exp(x) - 1 - x would lose 1e-1 of it at 1e-3, and 1e-6 beyond the switch.
    torch.testing.assert_close(found.sums[2:4].double(), expected.sums[2:4], rtol=2e-6, atol=0)


@any_form
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logprobs", "old", "ref", "rollout", "entropy"])
@pytest.mark.parametrize("config", [ALL, ALL_GSPO], ids=["token", "sequence"])
def test_a_non_finite_token_is_counted_and_not_spread(
    form: Form, bad: float, where: str, config: AlgorithmConfig
):
    def with_bad(place: str, value: float):
        batch = make_batch(
            groups=[(2.0, 0.0, 1.0)], sequences=[(0, 0, 3), (0, 1, 4), (0, 2, 2)], left_out=[2]
        )
        rows = batch.rows
        tensors = {
            "logprobs": batch.logprobs_R,
            "old": rows.old_logprobs_R,
            "ref": rows.ref_logprobs_R,
            "rollout": rows.rollout_logprobs_R,
            "entropy": batch.entropy_R,
        }
        tensors[place][1] = value
        tensors[place][-2:] = value  # of weight 0: these may hold anything
        return batch

    batch = with_bad(where, bad)
    found = batch.found(form, config)
    assert_close(found, batch.expected(config))
    assert found.sums[SUMS.index("num_nonfinite")] == 1
    assert found.d_logprobs_R[1] == 0 and found.d_entropy_R[1] == 0
    # Whatever is wrong with the token, the others get the same bits.
    other = with_bad("logprobs", NAN).found(form, config)
    assert torch.equal(found.sums[:7], other.sums[:7])
    assert torch.equal(found.d_logprobs_R, other.d_logprobs_R)
    assert torch.equal(found.d_entropy_R, other.d_entropy_R)


@any_form
@pytest.mark.parametrize("where", ["rollout", "entropy"])
def test_what_no_option_uses_may_be_non_finite(form: Form, where: str):
    config = AlgorithmConfig(kl_coefficient=0.1)
    batch = make_batch()
    clean = batch.found(form, config)
    tensor = batch.rows.rollout_logprobs_R if where == "rollout" else batch.entropy_R
    tensor[::2] = NAN
    found = batch.found(form, config)
    assert_close(found, batch.expected(config))
    assert found.sums[SUMS.index("num_nonfinite")] == 0
    assert torch.equal(found.d_logprobs_R, clean.d_logprobs_R)


@any_form
@pytest.mark.parametrize("config", [ALL, ALL_GSPO], ids=["token", "sequence"])
def test_nothing_to_learn_from_gives_zeros(form: Form, config: AlgorithmConfig):
    batch = make_batch(left_out=range(9))
    batch.logprobs_R[:] = NAN
    found = batch.found(form, config)
    assert (found.sums[:7] == 0).all() and found.sums[7] == len(batch.logprobs_R)
    assert (found.d_logprobs_R == 0).all() and (found.d_entropy_R == 0).all()
    for groups in ([], [(1.0, 0.0)]):
        found = make_batch(groups=groups, sequences=[], left_out=[]).found(form, config)
        assert (found.sums == 0).all() and len(found.d_logprobs_R) == len(found.d_entropy_R) == 0
    found = make_batch(groups=[(1.0, 0.0)], sequences=[(0, 0, 0)], left_out=[]).found(form, config)
    assert (found.sums == 0).all()


@any_form
def test_equal_rewards_have_advantage_exactly_zero_where_the_naive_formula_has_not(form: Form):
    groups = [((0.1, 1 / 3, 0.7)[size % 3],) * size for size in range(2, 65)]
    sequences = [(p, 0, 1) for p in range(len(groups))]
    batch = make_batch(
        groups=groups, sequences=sequences, left_out=[], has_old=False, has_ref=False
    )
    assert (batch.found(form, AlgorithmConfig()).d_logprobs_R == 0).all()
    naive = []
    for group in groups:
        rewards = torch.tensor(group)
        naive.append((rewards - rewards.mean()) / (rewards.std() + 1e-6))
    assert torch.cat(naive).abs().max() > 1e-2  # negative control: the rule is needed


@any_form
def test_advantages_survive_a_large_offset(form: Form):
    def gradient(offset: float):
        batch = make_batch(
            groups=[tuple(offset + r for r in (0.0, 1.0, 0.0, 1.0))],
            sequences=[(0, 0, 2), (0, 1, 2)],
            left_out=[],
        )
        return batch.found(form, AlgorithmConfig()).d_logprobs_R

    # exact in float32: two passes, where E[x^2] - E[x]^2 would lose everything
    assert torch.equal(gradient(4096.0), gradient(0.0))


@any_form
@pytest.mark.parametrize("config", [ALL, ALL_GSPO], ids=["token", "sequence"])
def test_two_runs_give_the_same_bits(form: Form, config: AlgorithmConfig):
    one, two = (make_batch().found(form, config) for _ in range(2))
    assert torch.equal(one.sums, two.sums)
    assert torch.equal(one.d_logprobs_R, two.d_logprobs_R)
    assert torch.equal(one.d_entropy_R, two.d_entropy_R)


PACKED = {
    "cu_seqlens": [0, 2, 2, 5],
    "num_rows": 5,
    "sample": [0, 1, 2],
    "weight": [0.1, 0.2, 0.0],
    "reward_index": [0, 1, 3],
    "group_offsets": [0, 2, 4],
    "rewards_N": torch.tensor([1.0, 0.0, 1.0, NAN]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": [0, 2, 3, 4]}, r"cu_seqlens=\[0, 2, 3, 4\] does not ascend from 0 to 5"),
        ({"cu_seqlens": [0, 3, 2, 5]}, r"cu_seqlens=\[0, 3, 2, 5\] does not ascend"),
        ({"cu_seqlens": [1, 2, 3, 5]}, r"cu_seqlens=\[1, 2, 3, 5\] does not ascend from 0"),
        ({"cu_seqlens": [0, 5]}, r"cu_seqlens is for 1 sequences, sample for 3"),
        ({"cu_seqlens": []}, r"cu_seqlens=\[\] does not ascend"),
        ({"weight": [0.1]}, r"weight is for 1 sequences, sample for 3"),
        ({"weight": [0.1, NAN, 0.1]}, r"weight=nan of a sequence"),
        ({"weight": [0.1, -1.0, 0.1]}, r"weight=-1\.0 of a sequence"),
        ({"group_offsets": [0, 2, 3]}, r"group_offsets=\[0, 2, 3\] does not ascend from 0 to 4"),
        ({"group_offsets": [0, 2, 2, 4]}, r"group_offsets=\[0, 2, 2, 4\] does not ascend"),
        ({"reward_index": [0, 1, 4]}, r"reward_index=4 is outside rewards_N, which has 4"),
        ({"reward_index": [0, -1, 1]}, r"reward_index=-1 is outside rewards_N"),
        ({"rewards_N": torch.zeros(4).double()}, r"rewards_N has dtype torch\.float64"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(changes: dict, message: str):
    pack_sequences(**PACKED)
    with pytest.raises(ValueError, match=message):
        pack_sequences(**(PACKED | changes))


@any_form
@pytest.mark.parametrize("name", ["rollout_logprobs_R", "old_logprobs_R", "ref_logprobs_R"])
def test_vectors_that_do_not_fit_are_refused(form: Form, name: str):
    batch = make_batch(sequences=[(0, 0, 3)], left_out=[])
    vector = getattr(batch.rows, name)
    for changed, message in (
        (
            vector.bfloat16(),
            r"dtype torch\.bfloat16; target_ids_R asks for \(3,\) and torch\.float32",
        ),
        (vector[:2], r"shape \(2,\)"),
        (vector.to("meta"), r"is on meta, target_ids_R on cpu"),
    ):
        with pytest.raises(ValueError, match=rf"{name} (has )?.*{message}"):
            batch.with_rows(**{name: changed}).found(form, ALL)
    for changes, message in (
        ({"logprobs_R": batch.logprobs_R[:2]}, r"logprobs_R has shape \(2,\)"),
        ({"entropy_R": batch.entropy_R.half()}, r"entropy_R has .*torch\.float16"),
        ({"entropy_R": batch.entropy_R.to("meta")}, r"entropy_R is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(batch, **changes).found(form, ALL)
    sequences = replace(batch.rows.sequences, rewards_N=torch.ones(53, device="meta"))
    with pytest.raises(ValueError, match="rewards_N is on meta"):
        replace(batch, rows=replace(batch.rows, sequences=sequences)).found(form, ALL)
    sequences = batch.rows.sequences
    for changes, message in (
        ({"weight_S": torch.ones(2)}, r"weight_S has shape \(2,\).* 1 sequences .*ask for \(1,\)"),
        ({"group_S2": torch.ones(1).int()}, r"group_S2 has shape \(1,\).*ask for \(1, 2\)"),
        ({"reward_S": torch.zeros(1).long()}, r"reward_S has .*int64.*ask for .*int32"),
        ({"rewards_N": torch.zeros(106)[::2]}, r"rewards_N has strides \(2,\), with gaps"),
        ({"offsets_S1": torch.tensor([0, 4]).int()}, "offsets_S1 ends at 4, target_ids_R at 3"),
    ):
        wrong = replace(batch.rows, sequences=replace(sequences, **changes))
        with pytest.raises(ValueError, match=message):
            replace(batch, rows=wrong).found(form, ALL)
    ids = batch.rows.target_ids_R.int()
    with pytest.raises(ValueError, match=r"target_ids_R has .*torch\.int32"):
        batch.with_rows(target_ids_R=ids).found(form, ALL)


@any_form
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coefficient": 0.1}, r"algorithm\.kl_coefficient=0\.1 needs ref_logprobs_R"),
        ({"entropy_coefficient": -0.1}, r"algorithm\.entropy_coefficient=-0\.1 is below 0"),
        ({"tis_cap": -1.0}, r"algorithm\.tis_cap=-1\.0 is below 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(form: Form, options: dict, message: str):
    batch = make_batch(has_ref=False)
    batch.found(form, AlgorithmConfig())
    with pytest.raises(ValueError, match=message):
        batch.found(form, AlgorithmConfig(**options))


def test_float64_vectors_are_for_the_torch_form_only():
    batch = make_batch(sequences=[(0, 0, 3)], left_out=[])
    wide = batch.rows.rollout_logprobs_R.double()
    batch.with_rows(rollout_logprobs_R=wide).found(closed_form, ALL)
    with pytest.raises(ValueError, match="rollout_logprobs_R is float64"):
        batch.with_rows(rollout_logprobs_R=wide).found(triton_form, ALL)


def test_the_batch_has_what_its_comments_say():
    batch = make_batch()
    assert batch.rows.sequences.weight_S[LEFT_OUT] == 0
    assert batch.rows.sequences.offsets_S1.diff().max() > 256

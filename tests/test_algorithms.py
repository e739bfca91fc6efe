"""Advantages, token weights and losses against hand-written loops in float64."""

import math

import pytest
import torch

from megatron_mmr1.algorithms.advantages import group_advantages
from megatron_mmr1.algorithms.grpo_loss import (
    grpo_loss,
    k3,
    loss_counts,
    selective_logprobs,
    supervised_loss,
    token_weights,
)

NAN = math.nan


def test_advantages_are_centred_over_ddof_one_std_of_the_judged_rewards():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 2.0], [1.0, NAN, 0.0, NAN], [2.0, 1.0, 1.0, 1.0]])
    for row, advantages in zip(rewards.tolist(), group_advantages(rewards).tolist(), strict=True):
        judged = [r for r in row if not math.isnan(r)]
        mean = sum(judged) / len(judged)
        std = math.sqrt(sum((r - mean) ** 2 for r in judged) / (len(judged) - 1))
        expected = [0.0 if math.isnan(r) else (r - mean) / (std + 1e-6) for r in row]
        assert advantages == pytest.approx(expected, abs=1e-6)  # float32 against float64


def test_advantages_are_exactly_zero_in_constant_groups_where_the_naive_formula_is_not():
    naive_worst = 0.0
    for size in (3, 5, 6, 7, 8, 16):
        for value in (0.1, 0.3, 0.7, 1.1, 1.9):
            rewards = torch.full((4, size), value)
            rewards[1, 0] = NAN
            assert (group_advantages(rewards) == 0.0).all()
            naive = (rewards[0] - rewards[0].mean()) / (rewards[0].std() + 1e-6)
            naive_worst = max(naive_worst, naive.abs().max().item())
    assert naive_worst > 1e-2  # negative control: the rule above is needed


def test_advantages_without_two_judged_rewards_are_zero():
    rewards = torch.tensor([[NAN, NAN, NAN], [1.0, NAN, NAN]])
    assert group_advantages(rewards).tolist() == [[0.0] * 3] * 2
    assert group_advantages(torch.tensor([[1.0]])).tolist() == [[0.0]]


def test_advantages_survive_a_large_offset():
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    # exact in float32: two passes, where E[x^2] - E[x]^2 would lose everything
    assert torch.equal(group_advantages(rewards + 4096.0), group_advantages(rewards))


def test_an_unjudged_reward_does_not_change_the_others():
    with_nan = group_advantages(torch.tensor([[1.0, NAN, 0.0, 0.0]], dtype=torch.float64))
    without = group_advantages(torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64))
    assert with_nan[0, 1] == 0.0
    torch.testing.assert_close(with_nan[:, [0, 2, 3]], without, rtol=0, atol=1e-15)


def test_logprobs_are_those_of_the_softmax_with_banned_ids_and_temperature():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 1, 4], [6, 5, 0]])
    banned, temperature = [2, 3], 0.6
    logprobs, entropy = selective_logprobs(logits, tokens, temperature, banned)
    for n in range(2):
        for s in range(3):
            allowed = [v for v in range(7) if v not in banned]
            scores = {v: math.exp(logits[n, s, v].item() / temperature) for v in allowed}
            total = sum(scores.values())
            p = {v: score / total for v, score in scores.items()}
            assert logprobs[n, s].item() == pytest.approx(math.log(p[int(tokens[n, s])]))
            expected = -sum(q * math.log(q) for q in p.values())
            assert entropy[n, s].item() == pytest.approx(expected)
    gradient = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)[0]
    assert gradient.isfinite().all() and (gradient[..., banned] == 0).all()
    assert torch.autograd.gradcheck(
        lambda x: selective_logprobs(x, tokens, temperature, banned), logits
    )


def test_logprobs_of_impossible_tokens_and_of_half_precision_logits():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], dtype=torch.bfloat16)
    logprobs, entropy = selective_logprobs(logits, torch.tensor([1]), 1.0, [])
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.item() == -math.inf
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-6)


def _case(seed=0, num=6, length=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(num, length, generator=generator) < 0.6
    mask[1] = False  # an empty response
    kept = torch.ones(num, dtype=torch.bool)
    kept[2] = False  # could not be judged
    old = randn(num, length) - 2
    now = (old + 0.3 * randn(num, length)).requires_grad_()
    advantages = randn(num, 1)  # of a sequence, for each of its tokens
    return now, old, advantages, mask, kept, old + 0.3 * randn(num, length)


def _weights(mask, kept, aggregation, counts=None):
    """Each sequence's token weight at its response tokens, 0 elsewhere."""
    lengths = mask.sum(dim=1)
    counts = counts or loss_counts(lengths, kept)
    weight_N = token_weights(lengths, kept, aggregation, *counts)
    return torch.where(mask, weight_N.unsqueeze(1), 0.0)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_loss_and_metrics_equal_the_hand_written_loop(aggregation):
    now, old, advantages, mask, kept, ref = _case()
    result = grpo_loss(
        now,
        old,
        advantages,
        _weights(mask, kept, aggregation),
        clip_low=0.2,
        clip_high=0.28,
        kl_coefficient=0.01,
        ref_logprobs=ref,
    )
    rows = [n for n in range(len(mask)) if kept[n] and mask[n].any()]
    num_tokens = sum(int(mask[n].sum()) for n in rows)
    loss = clipped = kl = policy_kl = 0.0
    for n in rows:
        length = int(mask[n].sum())
        weight = 1 / num_tokens if aggregation == "token_mean" else 1 / (length * len(rows))
        for s in range(mask.shape[1]):
            if not mask[n, s]:
                continue
            x, advantage = (now[n, s] - old[n, s]).item(), advantages[n].item()
            ratio = math.exp(x)
            bounded = min(max(ratio, 0.8), 1.28)
            y = (ref[n, s] - now[n, s]).item()
            token_kl = math.exp(y) - 1 - y
            loss += weight * (-min(ratio * advantage, bounded * advantage) + 0.01 * token_kl)
            clipped += weight * (bounded * advantage < ratio * advantage)
            kl += weight * token_kl
            policy_kl += weight * (math.exp(x) - 1 - x)
    # the weights are float32: 6e-8 each
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    assert result.clip_fraction.item() == pytest.approx(clipped, rel=1e-6) and clipped > 0
    assert result.kl.item() == pytest.approx(kl, rel=1e-6)
    assert result.policy_kl.item() == pytest.approx(policy_kl, rel=1e-6)
    assert result.num_nonfinite.item() == 0


def test_loss_gradient_passes_gradcheck():
    now, old, advantages, mask, kept, ref = _case()
    weights = _weights(mask, kept, "token_mean").double()

    def loss(x):
        return grpo_loss(
            x,
            old,
            advantages,
            weights,
            clip_low=0.2,
            clip_high=0.2,
            kl_coefficient=0.5,
            ref_logprobs=ref,
        ).loss

    assert torch.autograd.gradcheck(loss, now)
    assert torch.autograd.gradcheck(lambda x: supervised_loss(x, weights), now)


def test_on_policy_gradient_is_minus_weight_times_advantage():
    now, _, advantages, mask, kept, _ = _case()
    weights = _weights(mask, kept, "token_mean").double()
    result = grpo_loss(now, now, advantages, weights, clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(result.loss, now)
    torch.testing.assert_close(gradient, -weights * advantages, rtol=1e-14, atol=0)


@pytest.mark.parametrize("gap", [-25.0, 25.0, 1000.0])
def test_log_ratios_beyond_the_clamp_have_zero_gradient(gap):
    now = torch.tensor([[gap, 0.1]], requires_grad=True)
    weights = torch.full((1, 2), 0.5)
    # advantage -1: the clip doesn't stop a growing ratio, so that only the clamp can
    result = grpo_loss(
        now,
        torch.zeros(1, 2),
        torch.tensor([[-1.0]]),
        weights,
        clip_low=0.2,
        clip_high=0.2,
        kl_coefficient=1.0,
        ref_logprobs=torch.zeros(1, 2),
    )
    (gradient,) = torch.autograd.grad(result.loss, now)
    assert result.loss.isfinite() and gradient[0, 0] == 0.0 and gradient[0, 1] != 0.0


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("splits", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_loss_and_gradient_do_not_depend_on_the_split_or_on_padding(aggregation, splits):
    now, old, advantages, mask, kept, _ = _case()
    whole = grpo_loss(
        now, old, advantages, _weights(mask, kept, aggregation), clip_low=0.2, clip_high=0.2
    )
    (expected,) = torch.autograd.grad(whole.loss, now)
    # every part counts its own rows; the sums are the global denominators
    parts = torch.arange(6).flip(0).split(splits)
    counts = [loss_counts(mask[part].sum(dim=1), kept[part]) for part in parts]
    num_tokens, num_sequences = (sum(column) for column in zip(*counts, strict=True))
    total, clip_fraction = torch.zeros(()).double(), torch.zeros(())
    for part in parts:

        def pad(values, fill, part=part):
            return torch.nn.functional.pad(values[part], (0, 3), value=fill)

        weights = _weights(pad(mask, False), kept[part], aggregation, (num_tokens, num_sequences))
        result = grpo_loss(
            pad(now, NAN), pad(old, 7.0), advantages[part], weights, clip_low=0.2, clip_high=0.2
        )
        assert result.num_nonfinite == 0
        total, clip_fraction = total + result.loss, clip_fraction + result.clip_fraction
    (gradient,) = torch.autograd.grad(total, now)
    # the same float64 terms, added in another order
    torch.testing.assert_close(total, whole.loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(clip_fraction, whole.clip_fraction, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-15)


def test_weights_sum_to_one_and_are_zero_where_nothing_is_kept():
    _, _, _, mask, kept, _ = _case()
    for aggregation in ("token_mean", "sequence_mean"):
        weights = _weights(mask, kept, aggregation)
        assert weights.dtype == torch.float32
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-6)
        assert (weights[2] == 0).all() and (weights[~mask] == 0).all()
        nothing = _weights(mask, torch.zeros_like(kept), aggregation)
        assert (nothing == 0).all() and nothing.isfinite().all()
    with pytest.raises(ValueError, match=r"algorithm\.aggregation"):
        token_weights(mask.sum(dim=1), kept, "mean", 1, 1)


def test_huge_numbers_at_weight_zero_stay_out_of_loss_and_gradient():
    now = torch.tensor([[-1.0, -1.0], [80.0, -1.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    advantages = torch.tensor([[1.0], [-3e38]])  # times the ratio: infinite, and 0 * inf is NaN
    result = grpo_loss(
        now, torch.full((2, 2), -1.0), advantages, weights, clip_low=0.2, clip_high=0.2
    )
    assert result.loss.item() == -1.0
    assert torch.autograd.grad(result.loss, now)[0].tolist() == [[-1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["now", "old", "ref"])
def test_a_non_finite_token_is_counted_and_not_spread(bad, where):
    now, old, advantages, mask, kept, ref = _case(dtype=torch.float32)
    weights = _weights(mask, kept, "token_mean")
    n, s = weights.nonzero()[0].tolist()
    tensors = {"now": now.detach().clone(), "old": old.clone(), "ref": ref.clone()}

    def run(weights_NS):
        x = tensors["now"].clone().requires_grad_()
        result = grpo_loss(
            x,
            tensors["old"],
            advantages,
            weights_NS,
            clip_low=0.2,
            clip_high=0.2,
            kl_coefficient=0.1,
            ref_logprobs=tensors["ref"],
        )
        return result, torch.autograd.grad(result.loss, x)[0]

    without = weights.clone()
    without[n, s] = 0.0
    expected, expected_gradient = run(without)
    tensors[where][n, s] = bad
    for masked in torch.nonzero(weights == 0).tolist():
        tensors[where][tuple(masked)] = bad  # masked tokens may hold anything, uncounted
    result, gradient = run(weights)
    assert result.num_nonfinite.item() == 1 and gradient[n, s] == 0.0
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


def test_k3_is_accurate_near_zero_in_float32_where_the_naive_form_is_not():
    x = torch.cat([torch.logspace(-6, 1.2, 400), -torch.logspace(-6, 1.2, 400)])
    exact = torch.tensor([_k3_reference(value) for value in x.tolist()], dtype=torch.float64)
    error = ((k3(x).double() - exact) / exact).abs().max()
    naive = (((x.exp() - 1 - x).double() - exact) / exact).abs().max()
    # float32 rounding is 6e-8; expm1(x) - x loses at most a factor 2/|x| = 16 of it beyond 1/8
    assert error < 2e-6 < 1e-2 < naive
    x64 = x.double()
    assert ((k3(x64) - exact) / exact).abs().max() < 1e-14


def _k3_reference(x):
    if abs(x) > 1:
        return math.expm1(x) - x
    return math.fsum(x**n / math.factorial(n) for n in range(2, 30))


def test_k3_gradient_is_expm1_on_both_sides_of_the_switch():
    x = torch.tensor([-0.13, -0.12, -1e-4, 0.0, 1e-4, 0.12, 0.13], dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(k3(x).sum(), x)
    torch.testing.assert_close(gradient, x.detach().expm1(), rtol=1e-14, atol=1e-18)


def test_a_kl_coefficient_without_reference_is_refused():
    now, old, advantages, mask, kept, _ = _case()
    with pytest.raises(ValueError, match=r"algorithm\.kl_coefficient=0\.1"):
        grpo_loss(
            now,
            old,
            advantages,
            _weights(mask, kept, "token_mean"),
            clip_low=0.2,
            clip_high=0.2,
            kl_coefficient=0.1,
        )


def test_supervised_loss_is_the_mean_negative_logprob_and_ignores_masked_tokens():
    now, _, _, mask, kept, _ = _case()
    weights = _weights(mask, kept, "token_mean")
    used = weights > 0
    dirty = torch.where(used, now, torch.nan)
    loss = supervised_loss(dirty, weights)
    assert loss.item() == pytest.approx(-now[used].mean().item(), rel=1e-6)  # float32 weights
    assert torch.autograd.grad(loss, now)[0].isfinite().all()

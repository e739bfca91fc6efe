"""Advantages, token weights and losses against hand-written loops in float64."""

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from megatron_mmr1.algorithms.advantages import group_advantages
from megatron_mmr1.algorithms.grpo_loss import (
    GrpoLoss,
    grpo_loss,
    k3,
    loss_counts,
    selective_logprobs,
    supervised_loss,
    token_weights,
)
from megatron_mmr1.config.schema import AlgorithmConfig

NAN = math.nan


def test_advantages_are_centred_over_ddof_one_std_of_the_judged_rewards():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 2.0], [1.0, NAN, 0.0, NAN], [2.0, 1.0, 1.0, 1.0]])
    for row, advantages in zip(rewards.tolist(), group_advantages(rewards).tolist(), strict=True):
        judged = [r for r in row if not math.isnan(r)]
        mean = sum(judged) / len(judged)
        std = math.sqrt(sum((r - mean) ** 2 for r in judged) / (len(judged) - 1))
        expected = [0.0 if math.isnan(r) else (r - mean) / (std + 1e-6) for r in row]
        assert advantages == pytest.approx(expected, abs=1e-6)  # float32 against float64


def test_advantages_without_scale_are_the_centred_rewards():
    rewards = torch.tensor([[1.0, 0.0, NAN, 2.0], [3.0, 3.0, 3.0, 3.0]], dtype=torch.float64)
    advantages = group_advantages(rewards, "none")
    assert advantages.tolist() == [[0.0, -1.0, 0.0, 1.0], [0.0] * 4]  # exact: small integers
    with pytest.raises(ValueError, match=r"algorithm\.advantage_scale='var'"):
        group_advantages(rewards, "var")


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


@dataclass(frozen=True)
class Case:
    """Padded responses [N, S]; the second is empty, the third could not be judged."""

    now: Tensor
    entropy: Tensor
    old: Tensor
    rollout: Tensor
    ref: Tensor
    advantages: Tensor
    mask: Tensor
    kept: Tensor

    @property
    def sequence(self) -> Tensor:
        return torch.arange(len(self.mask)).unsqueeze(1).expand_as(self.mask)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(dim=1)

    def weights(self, aggregation: str, counts: tuple[int, int] | None = None) -> Tensor:
        """Each sequence's token weight at its response tokens, 0 elsewhere."""
        counts = counts or loss_counts(self.lengths, self.kept)
        weight_N = token_weights(self.lengths, self.kept, aggregation, *counts, FIXED_LENGTH)
        return torch.where(self.mask, weight_N.unsqueeze(1), 0.0)

    def loss(self, weights: Tensor, config: AlgorithmConfig) -> GrpoLoss:
        return grpo_loss(
            self.now,
            self.advantages,
            weights,
            config,
            sequence=self.sequence,
            old_logprobs=self.old,
            rollout_logprobs=self.rollout,
            ref_logprobs=self.ref,
            entropy=self.entropy,
        )

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """By the log-probs and by the entropies; zeros where the loss does not have them."""
        return torch.autograd.grad(loss, (self.now, self.entropy), materialize_grads=True)


FIXED_LENGTH = 8
OPTIONS = {
    "token_mean": AlgorithmConfig(),
    "sequence_mean": AlgorithmConfig(aggregation="sequence_mean"),
    "fixed_length": AlgorithmConfig(aggregation="fixed_length"),
    "kl": AlgorithmConfig(kl_coefficient=0.5),
    "entropy_bonus": AlgorithmConfig(entropy_coefficient=0.5),
    "gspo": AlgorithmConfig(ratio="sequence", clip_low=0.02, clip_high=0.03),
    "dual_clip": AlgorithmConfig(dual_clip=1.3),
    "tis": AlgorithmConfig(tis_cap=1.1),
    "all": AlgorithmConfig(
        ratio="sequence",
        clip_low=0.02,
        clip_high=0.03,
        dual_clip=1.04,
        tis_cap=1.1,
        kl_coefficient=0.5,
        entropy_coefficient=0.5,
        aggregation="sequence_mean",
    ),
}
any_option = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())


def make_case(dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(6, 5, generator=generator) < 0.6
    mask[1] = False
    kept = torch.ones(6, dtype=torch.bool)
    kept[2] = False
    old = randn(6, 5) - 2
    return Case(
        now=(old + 0.3 * randn(6, 5)).requires_grad_(),
        entropy=(2 + randn(6, 5).tanh()).requires_grad_(),
        old=old,
        rollout=old + 0.2 * randn(6, 5),
        ref=old + 0.3 * randn(6, 5),
        advantages=randn(6, 1),  # of a sequence, for each of its tokens
        mask=mask,
        kept=kept,
    )


def loop(case: Case, weights: Tensor, config: AlgorithmConfig) -> dict[str, float]:
    """The definition in Python floats, token by token; nothing may be non-finite or clamped."""
    sums = dict.fromkeys((field.name for field in fields(GrpoLoss)), 0.0)
    for n, weights_S in enumerate(weights.tolist()):
        now, old, ref, rollout, entropy = (
            tensor[n].tolist()
            for tensor in (case.now, case.old, case.ref, case.rollout, case.entropy)
        )
        advantage = case.advantages[n].item()
        used = [s for s, weight in enumerate(weights_S) if weight]
        for s in used:
            x = now[s] - old[s]
            sums["policy_kl"] += weights_S[s] * (math.exp(x) - 1 - x)
            if config.ratio == "sequence":
                x = sum(now[t] - old[t] for t in used) / len(used)
            ratio = math.exp(x)
            bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            objective = min(ratio * advantage, bounded * advantage)
            if config.dual_clip and advantage < 0:
                objective = max(objective, config.dual_clip * advantage)
            tis = math.exp(old[s] - rollout[s]) if config.tis_cap else 1.0
            y = ref[s] - now[s]
            kl = math.exp(y) - 1 - y
            sums["loss"] += weights_S[s] * (
                -(min(tis, config.tis_cap) if config.tis_cap else 1.0) * objective
                + config.kl_coefficient * kl
                - config.entropy_coefficient * entropy[s]
            )
            sums["clip_fraction"] += weights_S[s] * (objective != ratio * advantage)
            sums["kl"] += weights_S[s] * kl
            sums["entropy"] += weights_S[s] * entropy[s]
            sums["tis_truncated"] += weights_S[s] * (config.tis_cap > 0 and tis > config.tis_cap)
        for s in range(len(now)):
            if math.isfinite(rollout[s]):
                sums["num_compared"] += 1
                sums["diff_sum"] += abs(old[s] - rollout[s])
                sums["diff_max"] = max(sums["diff_max"], abs(old[s] - rollout[s]))
    return sums


def test_weights_divide_by_tokens_by_sequences_and_their_length_or_by_a_fixed_length():
    lengths, kept = torch.tensor([4, 0, 3, 2]), torch.tensor([True, True, False, True])
    counts = loss_counts(lengths, kept)
    assert counts == (6, 2)
    for aggregation, expected in (
        ("token_mean", [1 / 6, 1 / 6, 0.0, 1 / 6]),
        ("sequence_mean", [1 / 8, 1.0, 0.0, 1 / 4]),  # the empty one has no token to weigh
        ("fixed_length", [1 / 16, 1 / 16, 0.0, 1 / 16]),
    ):
        weights = token_weights(lengths, kept, aggregation, *counts, fixed_length=8)
        assert weights.dtype == torch.float32
        assert weights.tolist() == pytest.approx(expected, rel=1e-7)  # half a float32 ulp
    with pytest.raises(ValueError, match=r"algorithm\.aggregation='mean'"):
        token_weights(lengths, kept, "mean", *counts, fixed_length=8)


def test_means_have_weights_that_sum_to_one_and_nothing_kept_has_zeros():
    case = make_case()
    for aggregation in ("token_mean", "sequence_mean"):
        weights = case.weights(aggregation)
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-6)
        assert (weights[2] == 0).all() and (weights[~case.mask] == 0).all()
    for aggregation in ("token_mean", "sequence_mean", "fixed_length"):
        nothing = replace(case, kept=torch.zeros_like(case.kept)).weights(aggregation)
        assert (nothing == 0).all() and nothing.isfinite().all()


@any_option
def test_loss_and_metrics_equal_the_hand_written_loop(config: AlgorithmConfig):
    case = make_case()
    case.rollout[0, 0] = NAN  # not compared
    weights = case.weights(config.aggregation)
    weights[0, 0] = 0.0
    result, expected = case.loss(weights, config), loop(case, weights, config)
    assert expected["clip_fraction"] > 0
    assert (expected["tis_truncated"] > 0) == (config.tis_cap > 0)
    for name, value in expected.items():
        # sums of 30 float32 numbers where the weights alone are summed, else of float64 ones
        assert getattr(result, name).item() == pytest.approx(value, rel=1e-6), name


@any_option
def test_loss_gradient_passes_gradcheck(config: AlgorithmConfig):
    case = make_case()
    weights = case.weights(config.aggregation).double()
    assert torch.autograd.gradcheck(
        lambda now, entropy: replace(case, now=now, entropy=entropy).loss(weights, config).loss,
        (case.now, case.entropy),
    )


def test_on_policy_gradient_is_minus_weight_times_advantage():
    case = make_case()
    weights = case.weights("token_mean").double()
    for old in (case.now, None):  # without old log-probs the present ones stand for them
        result = grpo_loss(
            case.now,
            case.advantages,
            weights,
            AlgorithmConfig(),
            sequence=case.sequence,
            old_logprobs=old,
        )
        (gradient,) = torch.autograd.grad(result.loss, case.now)
        torch.testing.assert_close(gradient, -weights * case.advantages, rtol=1e-14, atol=0)


@pytest.mark.parametrize("gap", [-25.0, 25.0, 1000.0])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_log_ratios_beyond_the_clamp_have_zero_gradient(gap: float, ratio: str):
    now = torch.tensor([[gap], [0.1]], requires_grad=True)
    # advantage -1: the clip doesn't stop a growing ratio, so that only the clamp can
    result = grpo_loss(
        now,
        torch.tensor([[-1.0]]),
        torch.full((2, 1), 0.5),
        AlgorithmConfig(kl_coefficient=1.0, ratio=ratio),
        sequence=torch.tensor([[0], [1]]),
        old_logprobs=torch.zeros(2, 1),
        ref_logprobs=torch.zeros(2, 1),
    )
    (gradient,) = torch.autograd.grad(result.loss, now)
    assert result.loss.isfinite() and gradient[0, 0] == 0.0 and gradient[1, 0] != 0.0


def test_the_sequence_ratio_is_one_number_whose_gradient_all_tokens_share():
    case = make_case()
    weights = case.weights("sequence_mean").double()
    config = AlgorithmConfig(ratio="sequence", clip_low=0.9, clip_high=9.0)  # nothing is clipped
    gradient, _ = case.gradients(case.loss(weights, config).loss)
    for n in (0, 3, 4, 5):
        used = weights[n] > 0
        ratio = (case.now - case.old).detach()[n, used].mean().exp()
        expected = -weights[n] * ratio * case.advantages[n]
        torch.testing.assert_close(gradient[n], expected, rtol=1e-13, atol=0)  # a few roundings


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    now = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([-2.0, 2.0, -2.0], dtype=torch.float64)
    config = AlgorithmConfig(clip_low=0.2, clip_high=0.2, dual_clip=2.0)
    result = grpo_loss(
        now,
        advantages,
        torch.ones(3),
        config,
        sequence=torch.arange(3),
        old_logprobs=torch.zeros(3, dtype=torch.float64),
    )
    # e^1 is above both bounds; e^0.5 is above 1.2, but a negative advantage is clipped at 2 alone
    assert result.loss.item() == pytest.approx(4 - 1.2 * 2 + 2 * math.exp(0.5), rel=1e-14)
    assert result.clip_fraction.item() == 2
    (gradient,) = torch.autograd.grad(result.loss, now)
    assert gradient.tolist() == pytest.approx([0.0, 0.0, 2 * math.exp(0.5)], rel=1e-14)


def test_tis_scales_the_policy_term_but_neither_kl_nor_entropy():
    case = make_case()
    weights = case.weights("token_mean").double()
    options = AlgorithmConfig(kl_coefficient=0.5, entropy_coefficient=0.5)
    policy_only = AlgorithmConfig()
    tis = (case.old - case.rollout).exp().clamp(max=1.1)

    def by_logprobs(config: AlgorithmConfig, weights_NS: Tensor) -> Tensor:
        return case.gradients(case.loss(weights_NS, config).loss)[0]

    capped = by_logprobs(replace(options, tis_cap=1.1), weights)
    expected = by_logprobs(policy_only, weights * tis)
    expected += by_logprobs(options, weights) - by_logprobs(policy_only, weights)
    torch.testing.assert_close(capped, expected, rtol=1e-12, atol=1e-15)  # a cancelling difference


def test_the_entropy_bonus_pushes_every_used_entropy_up_alike():
    case = make_case()
    weights = case.weights("token_mean").double()
    _, gradient = case.gradients(case.loss(weights, AlgorithmConfig(entropy_coefficient=0.3)).loss)
    torch.testing.assert_close(gradient, -0.3 * weights, rtol=1e-15, atol=0)
    _, gradient = case.gradients(case.loss(weights, AlgorithmConfig()).loss)
    assert (gradient == 0).all()


@any_option
@pytest.mark.parametrize("splits", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_loss_and_gradient_do_not_depend_on_the_split_or_on_padding(
    config: AlgorithmConfig, splits: list[int]
):
    case = make_case()
    whole = case.loss(case.weights(config.aggregation), config)
    expected = case.gradients(whole.loss)
    # every part counts its own rows; the sums are the global denominators
    parts = torch.arange(6).flip(0).split(splits)
    counts = [loss_counts(case.lengths[part], case.kept[part]) for part in parts]
    num_tokens, num_sequences = (sum(column) for column in zip(*counts, strict=True))
    total, clip_fraction = torch.zeros(()).double(), torch.zeros(())
    for part in parts:

        def pad(values: Tensor, fill: float, part: Tensor = part) -> Tensor:
            return torch.nn.functional.pad(values[part], (0, 3), value=fill)

        padded = Case(
            now=pad(case.now, NAN),
            entropy=pad(case.entropy, math.inf),
            old=pad(case.old, 7.0),
            rollout=pad(case.rollout, NAN),
            ref=pad(case.ref, -math.inf),
            advantages=case.advantages[part],
            mask=pad(case.mask, False),
            kept=case.kept[part],
        )
        result = padded.loss(
            padded.weights(config.aggregation, (num_tokens, num_sequences)), config
        )
        assert result.num_nonfinite == 0
        total, clip_fraction = total + result.loss, clip_fraction + result.clip_fraction
    # the same float64 terms, added in another order
    torch.testing.assert_close(total, whole.loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(clip_fraction, whole.clip_fraction, rtol=1e-6, atol=0)
    torch.testing.assert_close(case.gradients(total), expected, rtol=1e-13, atol=1e-15)


def test_huge_numbers_at_weight_zero_stay_out_of_loss_and_gradient():
    now = torch.tensor([[-1.0, -1.0], [80.0, -1.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    advantages = torch.tensor([[1.0], [-3e38]])  # times the ratio: infinite, and 0 * inf is NaN
    result = grpo_loss(
        now,
        advantages,
        weights,
        AlgorithmConfig(),
        sequence=torch.tensor([[0, 0], [1, 1]]),
        old_logprobs=torch.full((2, 2), -1.0),
    )
    assert result.loss.item() == -1.0
    assert torch.autograd.grad(result.loss, now)[0].tolist() == [[-1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["now", "old", "ref", "rollout", "entropy"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_non_finite_token_is_counted_and_not_spread(bad: float, where: str, ratio: str):
    case = make_case(dtype=torch.float32)
    config = replace(OPTIONS["all"], ratio=ratio)
    weights = case.weights("token_mean")
    n, s = weights.nonzero()[0].tolist()
    without = weights.clone()
    without[n, s] = 0.0
    expected = case.loss(without, config)
    dirty = getattr(case, where).detach().clone()
    dirty[n, s] = bad
    dirty[weights == 0] = bad  # masked tokens may hold anything, uncounted
    dirty_case = replace(case, **{where: dirty.requires_grad_(where in ("now", "entropy"))})
    result = dirty_case.loss(weights, config)
    assert result.num_nonfinite.item() == 1
    assert torch.equal(result.loss, expected.loss)
    gradients = dirty_case.gradients(result.loss)
    for gradient, expected_gradient in zip(gradients, case.gradients(expected.loss), strict=True):
        assert gradient[n, s] == 0.0 and torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("where", ["rollout", "entropy"])
def test_what_no_option_uses_may_be_non_finite(where: str):
    case = make_case()
    weights = case.weights("token_mean")
    dirty = torch.full_like(getattr(case, where).detach(), NAN, requires_grad=where == "entropy")
    result = replace(case, **{where: dirty}).loss(weights, AlgorithmConfig())
    assert result.num_nonfinite == 0
    assert torch.equal(result.loss, case.loss(weights, AlgorithmConfig()).loss)
    assert (result.num_compared == 0) == (where == "rollout")
    assert (result.entropy == 0) == (where == "entropy")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("kl_coefficient", "ref_logprobs"),
        ("tis_cap", "rollout_logprobs"),
        ("entropy_coefficient", "entropy"),
    ],
)
def test_an_option_without_its_input_is_refused(key: str, name: str):
    case = make_case()
    with pytest.raises(ValueError, match=rf"algorithm\.{key}=0\.1 needs {name}"):
        grpo_loss(
            case.now,
            case.advantages,
            case.weights("token_mean"),
            AlgorithmConfig(**{key: 0.1}),
            sequence=case.sequence,
        )


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


def test_supervised_loss_is_the_mean_negative_logprob_and_ignores_masked_tokens():
    case = make_case()
    weights = case.weights("token_mean")
    used = weights > 0
    dirty = torch.where(used, case.now, torch.nan)
    loss = supervised_loss(dirty, weights)
    assert loss.item() == pytest.approx(-case.now[used].mean().item(), rel=1e-6)  # float32 weights
    assert torch.autograd.grad(loss, case.now)[0].isfinite().all()
    weights = weights.double()
    assert torch.autograd.gradcheck(lambda now: supervised_loss(now, weights), case.now)

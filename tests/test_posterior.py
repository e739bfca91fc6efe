"""What is known of prompts: posteriors, priors, calibration, and the scores that follow.

Simulations have fixed seeds, and tolerances that are several standard errors of what they estimate.
"""

import numpy as np
import pytest
from sampling_cases import groups, make
from scipy import optimize
from scipy.integrate import quad
from scipy.special import betaln

from megatron_mmr1.config.schema import SamplerConfig
from megatron_mmr1.sampling import scores
from megatron_mmr1.sampling.calibration import MixedGroupModel, Reliability, features
from megatron_mmr1.sampling.estimators import Posterior
from megatron_mmr1.sampling.posterior import PassRates

G = 8
BETAS = [(1.0, 1.0), (0.25, 0.25), (8.0, 2.0), (0.5, 6.0), (1.3, 0.4)]
KEYS = ("correct_P", "wrong_P", "version_P")


def expectation(function, a, b):
    """Integrate over Beta(a, b), with p = t^4 and 1 - p = t^4 near the ends, where it may rise."""

    def density(p, q):
        return np.exp((a - 1) * np.log(p) + (b - 1) * np.log(q) - betaln(a, b))

    def left(t):
        return function(t**4, 1 - t**4) * density(t**4, 1 - t**4) * 4 * t**3

    def right(t):
        return function(1 - t**4, t**4) * density(1 - t**4, t**4) * 4 * t**3

    middle = 0.5**0.25
    return quad(left, 0, middle, epsabs=1e-12)[0] + quad(right, 0, middle, epsabs=1e-12)[0]


def test_ovs_peaks_at_one_half_and_vanishes_at_the_ends():
    pass_rate = np.linspace(0, 1, 101)
    ovs = scores.outcome_variance_score(pass_rate)
    assert ovs.max() == ovs[50] == 0.25
    assert (np.diff(ovs[:51]) > 0).all() and (np.diff(ovs[50:]) < 0).all()
    assert ovs[0] == ovs[100] == 0.0


@pytest.mark.parametrize(("a", "b"), BETAS)
def test_expectations_under_a_beta_are_its_integrals_and_its_averages(a, b):
    sampled = np.random.default_rng(0).beta(a, b, 100_000)
    variance = scores.expected_variance(np.array(a), np.array(b))
    assert variance == pytest.approx(expectation(lambda p, q: p * q, a, b), rel=1e-8)
    found = scores.outcome_variance_score(sampled)
    assert abs(found.mean() - variance) < 5 * found.std() / 100_000**0.5
    for size in (2, 8, 32):
        mixed = scores.expected_mixed_probability(np.array(a), np.array(b), size)
        integral = expectation(lambda p, q, size=size: 1 - p**size - q**size, a, b)
        assert mixed == pytest.approx(integral, rel=1e-8)
        found = scores.mixed_probability(sampled, size)
        assert abs(found.mean() - mixed) < 5 * found.std() / 100_000**0.5
    alone = scores.expected_mixed_probability(np.array(a), np.array(b), 1)
    assert 0 <= alone < 1e-15  # one response is never mixed


def test_a_group_is_mixed_as_often_as_its_probability_says():
    rng = np.random.default_rng(1)
    for pass_rate in (0.02, 0.3, 0.5, 0.95):
        correct = rng.binomial(G, pass_rate, 40_000)
        share = ((correct > 0) & (correct < G)).mean()
        expected = scores.mixed_probability(np.array(pass_rate), G)
        assert abs(share - expected) < 5 * (expected * (1 - expected) / 40_000) ** 0.5


def rates(num_prompts=20, discount=1.0, prior_discount=1.0, stratum_P=None):
    stratum_P = np.zeros(num_prompts, int) if stratum_P is None else stratum_P
    return PassRates(stratum_P, discount, prior_discount)


def observe(known, rows, version):
    index, correct, judged = np.array(rows).T
    known.observe(index, correct, judged, version)


def test_without_fading_a_posterior_is_prior_plus_counts():
    known, rng = rates(), np.random.default_rng(0)
    correct_P, wrong_P = np.zeros(20), np.zeros(20)
    for version in range(30):
        rows = [(i, rng.binomial(G, i / 19), G) for i in rng.integers(0, 20, 6)]
        for i, correct, judged in rows:  # a prompt may be in a step twice: its groups add up
            correct_P[i] += correct
            wrong_P[i] += judged - correct
        observe(known, rows, version)
    (prior_a,), (prior_b,) = known.priors()
    a, b = known.beta(100)
    np.testing.assert_allclose(a, prior_a + correct_P, rtol=1e-12)
    np.testing.assert_allclose(b, prior_b + wrong_P, rtol=1e-12)


def test_evidence_fades_by_the_discount_a_policy_version():
    known = rates(discount=0.5)  # whose powers are exact
    observe(known, [(0, 6, 8), (1, 8, 8)], version=3)
    observe(known, [(0, 1, 4)], version=5)  # two versions later 6 and 2 count 1.5 and 0.5
    (prior_a,), (prior_b,) = known.priors()
    prior = prior_a + prior_b
    correct, num = np.array([2.5, 8, 0]), np.array([6, 8, 0])
    for age in range(4):
        a, b = known.beta(5 + age, np.array([0, 1, 2]))
        # What was seen keeps its say in the mean, and loses its certainty.
        np.testing.assert_allclose(a / (a + b), (prior_a + correct) / (prior + num), atol=1e-12)
        evidence = np.array([6 / 2**age, 8 / 2 ** (age + 2), 0])
        np.testing.assert_allclose(a + b, prior + evidence, atol=1e-12)


def test_the_order_of_groups_never_matters_and_duplicates_add_up():
    rng = np.random.default_rng(0)
    rows = [(i, int(rng.integers(0, 9)), 8) for i in [*range(20), 3, 3, 7]]
    known = rates(), rates()
    for one, order in zip(known, (rows, rows[::-1]), strict=True):
        observe(one, [(5, 2, 8), (3, 8, 8)], version=0)
        observe(one, order, version=1)
    for key in KEYS:
        np.testing.assert_array_equal(*(getattr(one, key) for one in known))
    # floating-point sums over a stratum have an order of their own
    np.testing.assert_allclose(*(one.moments_3C for one in known), rtol=1e-12)
    apart, at_once = rates(), rates()
    observe(apart, [(3, 2, 8), (3, 5, 8)], version=0)
    observe(at_once, [(3, 7, 16)], version=0)
    for key in KEYS:
        np.testing.assert_array_equal(getattr(apart, key), getattr(at_once, key))
    draws = []
    for order in (slice(None), slice(None, None, -1)):
        sampler = make(30, 6, thompson=True)
        for step in range(1, 10):
            sampler.observe(step, groups(*[(*row, 0.1 * row[0]) for row in rows[:20]][order]))
            draws.append([sampler.next_batch() for _ in range(3)])
    assert draws[:9] == draws[9:]


TRUTH = [(0.25, 0.25), (8.0, 2.0)]  # always or never solved; alike


def of_two_kinds(num_prompts, num_visited, discount=0.97, prior_discount=0.9, seed=0):
    """Prompts of two strata, of which the first ones are visited once, 64 a step."""
    rng = np.random.default_rng(seed)
    stratum_P = np.arange(num_prompts) % 2
    rate_P = rng.beta(*np.array(TRUTH).T[:, stratum_P])
    known = rates(discount=discount, prior_discount=prior_discount, stratum_P=stratum_P)
    for version, start in enumerate(range(0, num_visited, 64)):
        index = np.arange(start, min(start + 64, num_visited))
        known.observe(index, rng.binomial(G, rate_P[index]), np.full(len(index), G), version)
    return known, rate_P


def test_priors_are_recovered_from_first_visits_and_predict_prompts_not_visited():
    """2,000 groups a stratum: standard errors of a moment are about 0.01, of a parameter 5%."""
    known, rate_P = of_two_kinds(6000, 4000, prior_discount=1.0)
    for found, truth in zip(np.transpose(known.priors()), TRUTH, strict=True):
        np.testing.assert_allclose(found, truth, rtol=0.2)
    a, b = known.beta(70, np.arange(4000, 6000))
    predicted = scores.expected_mixed_probability(a, b, G)
    for stratum, (true_a, true_b) in enumerate(TRUTH):
        share = scores.mixed_probability(rate_P[4000:][stratum::2], G).mean()
        exact = scores.expected_mixed_probability(np.array(true_a), np.array(true_b), G)
        assert abs(predicted[stratum] - exact) < 0.03
        assert abs(predicted[stratum] - share) < 0.05
    # negative control: a flat prior, and one fitted to both strata, would be far from either
    everyone = rates(discount=1.0, stratum_P=np.zeros(6000, int))
    everyone.moments_3C = known.moments_3C.sum(axis=1, keepdims=True)
    for prior in ((np.ones(1), np.ones(1)), everyone.priors()):
        wrong = scores.expected_mixed_probability(prior[0], prior[1], G)
        assert (np.abs(predicted - wrong) > 0.05).all()


def test_with_the_defaults_priors_are_recovered_from_the_last_few_hundred_groups():
    """Fading leaves 64 / 2 / (1 - 0.9) = 320 groups a stratum: standard errors are 2.5 times."""
    known, _ = of_two_kinds(4000, 4000)
    for found, (true_a, true_b) in zip(np.transpose(known.priors()), TRUTH, strict=True):
        predicted = scores.expected_mixed_probability(found[0], found[1], G)
        exact = scores.expected_mixed_probability(np.array(true_a), np.array(true_b), G)
        assert abs(predicted - exact) < 0.06


def test_strata_shrink_to_the_data_set_and_that_to_beta_1_1():
    known = rates(stratum_P=np.array([0, 0, 1, 2]))
    np.testing.assert_allclose(known.priors(), np.ones((2, 3)), rtol=1e-12)
    many = rates(2003, stratum_P=np.array([0] * 2000 + [1, 1, 2]))
    visited = np.arange(2000)
    many.observe(visited, np.full(2000, 8), np.full(2000, 8), 0)
    many.observe(np.array([2000]), np.array([0]), np.array([8]), 0)  # one group of another kind
    a, b = many.priors()
    mean_C = a / (a + b)
    # all of stratum 0 was right; of stratum 2 nothing is known, so it is like the data set; the
    # one wrong group of stratum 1 weighs 1 in 5
    assert mean_C[0] > 0.98
    total = many.moments_3C.sum(axis=1)
    whole = (total[1] + 2 * 0.5) / (total[0] + 2)
    np.testing.assert_allclose(mean_C[2], min(whole, 0.99))
    np.testing.assert_allclose(mean_C[1], 4 * whole / 5)
    one = rates()
    observe(one, [(0, 8, 8)], 0)  # a group is in the data set (1 of 3) and in its stratum (1 of 5)
    (a,), (b,) = one.priors()
    assert a / (a + b) == pytest.approx((1 + 4 * (1 + 2 * 0.5) / 3) / 5)
    assert 0.1 < a + b < 2  # less sure than the flat prior that prompts are alike


def test_a_prompt_seen_again_says_less_of_its_stratum_than_one_seen_first():
    known = rates()
    observe(known, [(0, 4, 8)], 0)
    first = known.moments_3C[0, 0]
    strength = np.sum(known.priors())
    observe(known, [(0, 4, 8)], 0)
    assert first == 1
    assert known.moments_3C[0, 0] - first == pytest.approx(strength / (strength + 8))
    # so that going back to mixed prompts doesn't make their stratum look mixed
    known, rate_P = of_two_kinds(400, 400, discount=1.0, prior_discount=1.0)
    before = np.transpose(known.priors())
    rng, mixed = np.random.default_rng(5), np.flatnonzero(np.abs(rate_P - 0.5) < 0.2)
    for version in range(7, 57):
        index = rng.choice(mixed, 32)
        known.observe(index, rng.binomial(G, rate_P[index]), np.full(32, G), version)
    moved = [scores.expected_mixed_probability(p[0], p[1], G) for p in np.transpose(known.priors())]
    was = [scores.expected_mixed_probability(p[0], p[1], G) for p in before]
    naive = rates(stratum_P=np.arange(400) % 2)  # negative control: every group a first visit
    for version in range(50):
        index = rng.choice(mixed, 32)
        correct = rng.binomial(G, rate_P[index])
        naive.correct_P[:], naive.wrong_P[:] = 0, 0
        naive.observe(index, correct, np.full(32, G), version)
    wrong = [scores.expected_mixed_probability(p[0], p[1], G) for p in np.transpose(naive.priors())]
    assert moved[0] - was[0] < 0.25 * (wrong[0] - was[0])


def test_one_response_says_nothing_of_a_second_moment():
    known = rates()
    observe(known, [(0, 1, 1), (1, 0, 1)], 0)
    assert not known.moments_3C.any()
    assert (known.correct_P[0], known.wrong_P[1]) == (1, 1)


@pytest.mark.parametrize("score", ["vps", "variance", "mixed"])
def test_thompson_draws_have_the_posteriors_mean(score):
    config = SamplerConfig(score=score, thompson=True, power=1.0)
    estimator = Posterior(np.zeros(20_000, int), config, G)
    estimator.observe(0, groups(*((i, 3, 8, 0.4) for i in range(20_000))))
    found = estimator.all_scores(5, np.random.default_rng(0))
    exact = Posterior(np.zeros(20_000, int), SamplerConfig(score=score, power=1.0), G)
    exact.rates, exact.tds_P = estimator.rates, estimator.tds_P
    expected = exact.all_scores(5, np.random.default_rng(0))
    assert np.ptp(expected) == 0 < np.ptp(found)
    assert abs(found.mean() - expected[0]) < 5 * found.std() / 20_000**0.5


def test_scores_are_what_they_say_each_to_its_power():
    for power in (1.0, 2.0):
        for score in ("vps", "variance", "mixed", "calibrated"):
            config = SamplerConfig(score=score, power=power, alpha=0.6, beta=0.4)
            estimator = Posterior(np.zeros(3, int), config, G)
            estimator.observe(0, groups((0, 3, 8, 0.25), (1, 8, 8, 0.75)))
            a, b = estimator.beta(4)
            diversity = np.array([0.25, 0.75, 0.5])  # the last has no group: the others' mean
            variance = scores.expected_variance(a, b)
            expected = {
                "vps": 0.6 * variance + 0.4 * diversity,
                "variance": variance,
                "mixed": scores.expected_mixed_probability(a, b, G),
                "calibrated": estimator.model.predict(estimator._features(4, np.arange(3))),
            }[score]
            found = estimator.all_scores(4, np.random.default_rng(0))
            np.testing.assert_allclose(found, expected**power, rtol=1e-12)


def test_an_uncalibrated_model_predicts_the_posteriors_probability():
    estimator = Posterior(np.arange(30) % 2, SamplerConfig(score="calibrated", power=1.0), G)
    estimator.rates.observe(np.arange(20), np.arange(20) % 9, np.full(20, 8), 0)
    mixed = estimator.mixed(9, np.arange(30))
    found = estimator.all_scores(9, np.random.default_rng(0))
    np.testing.assert_allclose(found, mixed, rtol=1e-9)
    assert np.ptp(mixed) > 0.3


def test_features_rise_with_what_they_are_named_for():
    one = np.ones(2)
    low = [0.2 * one, 0.1 * one, 0 * one, 0.3 * one]  # mixed, diversity, age, stratum_mixed
    high = [0.8, 0.9, 50, 0.7]
    for place, value in enumerate(high, 1):
        x_KF = features(
            *(np.array([v[0], value if i == place else v[0]]) for i, v in enumerate(low, 1))
        )
        rise_F = x_KF[1] - x_KF[0]
        assert rise_F[place] > 0.5 and np.count_nonzero(rise_F) == 1
    np.testing.assert_allclose(features(*low)[0, [0, 1, 4]], [1, np.log(0.25), np.log(3 / 7)])


@pytest.mark.parametrize(
    ("name", "place", "slope"), [("tds", 2, 3.0), ("staleness", 3, -4.0), ("bias", 0, 1.5)]
)
def test_the_fit_finds_what_mixed_groups_depend_on_and_predicts_better(name, place, slope):
    """60 steps of 64 groups; the last 20 are predicted before they are learnt from."""
    rng, model = np.random.default_rng(0), MixedGroupModel()
    start, brier, at_start = MixedGroupModel(), [], []
    for step in range(60):
        x_KF = features(
            rng.uniform(0.1, 0.9, 64), rng.random(64), rng.integers(0, 60, 64), np.full(64, 0.5)
        )
        truth = start.weights_F.copy()
        truth[place] += slope
        is_mixed_K = (rng.random(64) < 1 / (1 + np.exp(-x_KF @ truth))).astype(float)
        if step >= 40:
            brier.append(np.square(model.predict(x_KF) - is_mixed_K).mean())
            at_start.append(np.square(start.predict(x_KF) - is_mixed_K).mean())
        model.learn(x_KF, is_mixed_K)
    moved = model.weights_F - start.weights_F
    assert np.abs(moved).argmax() == place, name
    assert 0.4 < moved[place] / slope < 1.2  # the start keeps a pull
    assert np.mean(brier) < np.mean(at_start) - 0.01


def test_a_fit_to_groups_that_are_as_predicted_stays_where_it_was():
    """Negative control of the above: 3,800 groups, standard errors of a weight are about 0.1."""
    rng, model, start = np.random.default_rng(0), MixedGroupModel(), MixedGroupModel()
    for _ in range(60):
        mixed = rng.uniform(0.1, 0.9, 64)
        x_KF = features(mixed, rng.random(64), rng.integers(0, 60, 64), rng.uniform(0.2, 0.8, 64))
        model.learn(x_KF, (rng.random(64) < mixed).astype(float))
    assert np.abs(model.weights_F - start.weights_F).max() < 0.5


@pytest.mark.parametrize(
    ("num_groups", "believed", "truth"),
    [(512, 0.02, 0.5), (512, 0.95, 0.6), (512, 0.97, 0.5), (32, 0.02, 0.5)],
)
def test_the_fit_does_not_overshoot_where_it_was_almost_sure(num_groups, believed, truth):
    """From a belief far out, whose curvature is next to nothing, in batches of the paper's size."""
    rng, model = np.random.default_rng(0), MixedGroupModel()
    found = []
    for _ in range(12):
        mixed = believed * rng.uniform(0.9, 1.02, num_groups)
        tds, age = np.full(num_groups, 0.5), rng.integers(0, 20, num_groups)
        x_KF = features(mixed, tds, age, np.full(num_groups, believed))
        found.append(model.predict(x_KF).mean())
        model.learn(x_KF, (rng.random(num_groups) < truth).astype(float))
    assert abs(found[0] - believed) < 0.05
    np.testing.assert_allclose(found[1:], truth, atol=0.1)


def test_the_fit_is_the_likeliest():
    """One batch from the start: against scipy's minimum of the penalised surprise."""
    rng, model = np.random.default_rng(1), MixedGroupModel()
    x_KF = features(rng.random(64), rng.random(64), rng.integers(0, 60, 64), rng.random(64))
    y_K, start_F = (rng.random(64) < 0.7).astype(float), model.weights_F
    certainty_FF = model.information_FF

    def loss(w_F):
        odds_K, moved_F = x_KF @ w_F, w_F - start_F
        surprise = np.logaddexp(0, odds_K).sum() - y_K @ odds_K
        return surprise + moved_F @ certainty_FF @ moved_F / 2

    model.learn(x_KF, y_K)
    np.testing.assert_allclose(model.weights_F, optimize.minimize(loss, start_F).x, atol=1e-4)


def test_calibration_learns_inside_the_sampler():
    """Prompts are mixed when their last responses were diverse, whatever their pass rate."""
    rng, sampler = np.random.default_rng(0), make(200, 32, score="calibrated")
    diverse_P, brier = rng.random(200) < 0.5, []
    for step in range(1, 81):
        rows = [draw.row for draw in sampler.next_batch()]
        correct = [rng.integers(1, 8) if diverse_P[r] else rng.choice([0, 8]) for r in rows]
        diversity = 0.1 + 0.8 * diverse_P[rows]
        sampler.observe(step, groups(*zip(rows, correct, [8] * 32, diversity, strict=True)))
        brier.append(sampler.metrics()["sampler/brier"])
    assert sampler.metrics()["sampler/weight_tds"] > 1
    assert np.mean(brier[-10:]) < 0.05 < 0.15 < np.mean(brier[:3])
    weights = sampler.tree.weights
    assert weights[diverse_P].mean() > 5 * weights[~diverse_P].mean()


def test_reliability_sums_groups_predictions_and_outcomes_in_bins():
    record = Reliability()
    record.record(np.array([0.0, 0.05, 0.55, 1.0]), np.array([0.0, 1.0, 1.0, 1.0]))
    record.record(np.array([0.52]), np.array([0.0]))
    num, predicted, mixed = record.sums_3B
    assert num.tolist() == [2, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    np.testing.assert_allclose(predicted[[0, 5, 9]], [0.05, 1.07, 1.0])
    assert mixed.tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert record.last["sampler/brier"] == pytest.approx(0.52**2)
    record.record(np.zeros(0), np.zeros(0))
    assert record.last == {} and record.sums_3B[0].sum() == 5

"""Self-BLEU diversity against hand-worked values and a brute-force reference."""

import math
import time
from collections import Counter

import numpy as np
import pytest

from megatron_mmr1.sampling.diversity import tds


def _ngrams(tokens, order):
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def _brute_force_tds(responses):
    bleus = []
    for i, response in enumerate(responses):
        others = [r for j, r in enumerate(responses) if j != i]
        if not response:
            bleus.append(float(any(not r for r in others)))
            continue
        precisions = []
        for order in range(1, min(3, len(response)) + 1):
            counts = _ngrams(response, order)
            matches = sum(
                min(count, max(_ngrams(other, order)[gram] for other in others))
                for gram, count in counts.items()
            )
            precisions.append(matches / counts.total())
        closest = min((len(r) for r in others), key=lambda n: (abs(n - len(response)), n))
        penalty = min(1.0, math.exp(1 - closest / len(response)))
        bleus.append(penalty * math.prod(precisions) ** (1 / len(precisions)))
    return 1 - sum(bleus) / len(bleus)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 30])
def test_identical_responses_have_diversity_exactly_zero(length):
    assert tds([list(range(length))] * 4) == 0.0


@pytest.mark.parametrize("length", [1, 2, 3, 30])
def test_disjoint_responses_have_diversity_exactly_one(length):
    assert tds([range(i * 100, i * 100 + length) for i in range(4)]) == 1.0


def test_hand_worked_pair_of_equal_length():
    # unigrams 3/4, bigrams 2/3, trigrams 1/2, no brevity penalty, the same from both sides
    expected = 1 - (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3)
    assert tds([[1, 2, 3, 4], [1, 2, 3, 5]]) == pytest.approx(expected, abs=1e-12)


def test_hand_worked_brevity_penalty_and_clipping():
    # short: every n-gram found, penalty exp(1 - 4/3). long: 3/4, 2/3, 1/2, no penalty.
    expected = 1 - (math.exp(-1 / 3) + (1 / 4) ** (1 / 3)) / 2
    assert tds([[1, 2, 3], [1, 2, 3, 4]]) == pytest.approx(expected, abs=1e-12)
    # the second has 7 once, so that only one of the three sevens counts; and no bigram is shared
    assert tds([[7, 7, 7], [7, 8, 9]]) == 1.0


def test_empty_response_beside_full_ones_is_different_from_them():
    # the two full ones are identical (BLEU 1 each), the empty one has BLEU 0
    assert tds([[], [1, 2, 3], [1, 2, 3]]) == pytest.approx(1 / 3, abs=1e-12)
    assert tds([[], [1]]) == 1.0


def test_equals_the_brute_force_reference_on_random_groups_and_ignores_order():
    rng = np.random.default_rng(0)
    for _ in range(300):
        group = [
            rng.integers(0, rng.integers(1, 8), rng.integers(0, 12)).tolist()
            for _ in range(rng.integers(2, 7))
        ]
        value = tds(group)
        # the same sums in another order, in float64
        assert value == pytest.approx(_brute_force_tds(group), abs=1e-12)
        assert 0.0 <= value <= 1.0
        assert tds(group[::-1]) == pytest.approx(value, abs=1e-12)


def test_fewer_than_two_responses_are_refused():
    with pytest.raises(ValueError, match=r"rollout\.group_size"):
        tds([[1, 2, 3]])


def test_a_training_group_takes_less_than_two_milliseconds():
    group = np.random.default_rng(0).integers(0, 20, (8, 30)).tolist()
    times = []
    for _ in range(50):
        start = time.perf_counter()
        tds(group)
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-3  # the best of 50, so that a busy machine doesn't fail it

"""Diversity measures against hand-worked values, brute-force references and nltk."""

import math
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from megatron_mmr1.sampling import diversity
from megatron_mmr1.sampling.diversity import (
    DIVERSITY_MEASURES,
    distinct_n,
    edit_distance,
    padded_self_bleu,
    tds,
)

THIRDS = (1 / 3, 1 / 3, 1 / 3)
DIVERSITIES = [m for m in DIVERSITY_MEASURES.values() if m is not padded_self_bleu]
every_measure = pytest.mark.parametrize("measure", DIVERSITIES)


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


def _brute_force_distinct_n(responses):
    scores = []
    for order in (1, 2, 3):
        groups = [grams for r in responses if (grams := _ngrams(r, order))]
        if len(groups) >= 2:
            floor = max(len(grams) for grams in groups)
            total = sum(grams.total() for grams in groups)
            scores.append((len(set().union(*groups)) - floor) / (total - floor))
    return sum(scores) / len(scores) if scores else 0.0


def _brute_force_distance(down, right):
    above = list(range(len(right) + 1))
    for i, token in enumerate(down, start=1):
        row = [i]
        for j, other in enumerate(right, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (token != other)))
        above = row
    return above[-1]


def _brute_force_edit_distance(responses):
    shares = [
        _brute_force_distance(a, b) / max(len(a), len(b), 1) for a, b in combinations(responses, 2)
    ]
    return sum(share**2 for share in shares) / len(shares)


def _nltk_self_bleu(responses, smoothing=None):
    return np.mean(
        [
            sentence_bleu(responses[:i] + responses[i + 1 :], response, THIRDS, smoothing)
            for i, response in enumerate(responses)
        ]
    )


def _random_group(rng, max_length=12):
    """Of 2 to 6 responses, some of them empty or short, over so few tokens that n-grams repeat."""
    vocabulary = rng.integers(1, 8)
    lengths = rng.integers(0, max_length, rng.integers(2, 7))
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths]


def _edited_copies(rng, length, num_responses=6):
    """Copies of one text, each with its own share of tokens replaced and its own end cut off."""
    text = rng.integers(0, 5000, length)
    group = []
    for _ in range(num_responses):
        is_edited = rng.random(length) < rng.uniform(0, 0.5)
        edited = np.where(is_edited, rng.integers(0, 5000, length), text)
        group.append(edited[: rng.integers(length // 2, length + 1)].tolist())
    return group


@every_measure
@pytest.mark.parametrize("length", [0, 1, 2, 3, 30, 200])
def test_identical_responses_have_diversity_exactly_zero(measure, length):
    assert measure([list(range(length))] * 4) == 0.0
    assert measure([[i % 7 for i in range(length)]] * 3) == 0.0  # repetition is not diversity


@every_measure
@pytest.mark.parametrize("length", [1, 2, 3, 30, 200])
def test_disjoint_responses_have_diversity_exactly_one(measure, length):
    assert measure([range(i * 1000, i * 1000 + length) for i in range(4)]) == 1.0


def test_hand_worked_pair_of_equal_length():
    pair = [[1, 2, 3, 4], [1, 2, 3, 5]]
    # unigrams 3/4, bigrams 2/3, trigrams 1/2, no brevity penalty, the same from both sides
    expected = 1 - (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3)
    assert tds(pair) == pytest.approx(expected, abs=1e-12)
    # distinct 5 of 8, 4 of 6, 3 of 4; the most in one response 4, 3, 2
    expected = (1 / 4 + 1 / 3 + 1 / 2) / 3
    assert distinct_n(pair) == pytest.approx(expected, abs=1e-12)
    assert edit_distance(pair) == pytest.approx((1 / 4) ** 2, abs=1e-12)


def test_hand_worked_brevity_penalty_and_clipping():
    # short: every n-gram found, penalty exp(1 - 4/3). long: 3/4, 2/3, 1/2, no penalty.
    expected = 1 - (math.exp(-1 / 3) + (1 / 4) ** (1 / 3)) / 2
    assert tds([[1, 2, 3], [1, 2, 3, 4]]) == pytest.approx(expected, abs=1e-12)
    # the second has 7 once, so that only one of the three sevens counts; and no bigram is shared
    assert tds([[7, 7, 7], [7, 8, 9]]) == 1.0


def test_empty_response_beside_full_ones():
    group = [[], [1, 2, 3], [1, 2, 3]]
    # the two full ones are identical (BLEU 1 each), the empty one has BLEU 0
    assert tds(group) == pytest.approx(1 / 3, abs=1e-12)
    assert edit_distance(group) == pytest.approx(2 / 3, abs=1e-12)  # two of three pairs differ
    assert distinct_n(group) == 0.0  # it adds no n-gram
    assert tds([[], [1]]) == edit_distance([[], [1]]) == 1.0


# In the next three: the same sums in another order, in float64.


def test_self_bleu_equals_the_brute_force_reference_on_random_groups():
    rng = np.random.default_rng(0)
    for _ in range(300):
        group = _random_group(rng)
        assert tds(group) == pytest.approx(_brute_force_tds(group), abs=1e-12)


def test_distinct_n_equals_the_brute_force_reference_on_random_groups():
    rng = np.random.default_rng(1)
    for _ in range(300):
        group = _random_group(rng)
        assert distinct_n(group) == pytest.approx(_brute_force_distinct_n(group), abs=1e-12)


def test_edit_distance_equals_the_brute_force_reference_on_random_groups():
    rng = np.random.default_rng(2)
    for _ in range(300):
        group = _random_group(rng)
        assert edit_distance(group) == pytest.approx(_brute_force_edit_distance(group), abs=1e-12)


def test_edit_distance_equals_the_brute_force_reference_across_machine_words():
    # the rows are handled 64 at a time: lengths on both sides of one, two and three words
    rng = np.random.default_rng(3)
    text = rng.integers(0, 30, 200)
    group = []
    for length in (192, 1, 63, 64, 65, 127, 128, 129, 0, 193):
        start = rng.integers(0, len(text) - length + 1)
        is_edited = rng.random(length) < 0.2
        copy = text[start : start + length]
        group.append(np.where(is_edited, rng.integers(0, 30, length), copy).tolist())
    for pair in combinations(group, 2):
        assert edit_distance(pair) == pytest.approx(_brute_force_edit_distance(pair), abs=1e-12)


def test_self_bleu_equals_nltk_on_long_random_groups():
    # nltk rounds exact fractions to float64 and takes logarithms, in another order
    rng = np.random.default_rng(4)
    for length in (50, 200, 600):
        group = _edited_copies(rng, length)
        value = tds(group)
        assert 0.1 < value < 0.9  # nothing trivial
        assert value == pytest.approx(1 - _nltk_self_bleu(group), abs=1e-9)


@every_measure
def test_stays_in_zero_to_one_and_ignores_the_order_of_the_responses(measure):
    rng = np.random.default_rng(5)
    for _ in range(200):
        group = _random_group(rng)
        value = measure(group)
        assert 0.0 <= value <= 1.0
        shuffled = [group[i] for i in rng.permutation(len(group))]
        # the mean is summed in another order
        assert measure(shuffled) == pytest.approx(value, abs=1e-12)


@every_measure
@pytest.mark.parametrize(
    "rename",
    [
        lambda token: 2**31 - 1 - token,
        lambda token: token << 28,
        lambda token: token << 60,  # products with a multiplier differ in the top 4 bits only
        lambda token: -token,
    ],
)
def test_only_the_equality_of_tokens_matters_whatever_their_ids(measure, rename):
    rng = np.random.default_rng(6)
    group = [rng.integers(0, 8, n).tolist() for n in (90, 70, 100)]
    assert measure([[rename(token) for token in r] for r in group]) == measure(group)


@every_measure
def test_a_vocabulary_of_two_to_the_31_keeps_trigrams_apart(measure):
    # cubes of such ids overflow an int64; with ids modulo 2^21 these two would be the same text
    low = list(range(100, 150))
    high = [2**31 - 2**21 + token for token in low]
    assert measure([low, high]) == 1.0


@every_measure
def test_padding_around_the_responses_never_changes_a_score(measure):
    rng = np.random.default_rng(7)
    group = _edited_copies(rng, 60)
    for width, pad_id in ((60, 0), (100, 0), (100, 7)):
        padded = np.full((len(group), width), pad_id)
        for row, response in zip(padded, group, strict=True):
            row[: len(response)] = response
        cut = [row[: len(response)] for row, response in zip(padded, group, strict=True)]
        assert measure(cut) == measure(group)


def test_padded_self_bleu_changes_with_the_padding():
    group = _edited_copies(np.random.default_rng(8), 60)
    values = [padded_self_bleu(group, length=n) for n in (60, 100, 1000)]
    assert values == sorted(values) and values[0] + 0.1 < values[-1]
    assert padded_self_bleu(group) == padded_self_bleu(group, length=max(map(len, group)))
    # a pad token that the responses use themselves is one more match
    assert padded_self_bleu([[1, 2, 3], [4]], pad_id=1) > padded_self_bleu([[1, 2, 3], [4]])


def test_padded_self_bleu_is_inverted_and_padding_drowns_it():
    identical = [list(range(1, 171))] * 8
    independent = [list(range(1000 * i, 1000 * i + 170)) for i in range(1, 9)]
    assert padded_self_bleu(identical, length=4096) == 1.0
    assert tds(identical) == 0.0 and tds(independent) == 1.0
    # 3,926 of 4,096 positions are padding that all share: with nothing else in common, unigrams
    # score 0.9585, and bigrams and trigrams the same less the few at the seam
    assert 0.955 < padded_self_bleu(independent, length=4096) < 0.96
    # without padding, nltk's method 1 gives them 0: they share no token
    assert padded_self_bleu(independent) == 0.0


def test_padded_self_bleu_equals_nltk_with_smoothing_method_1():
    rng = np.random.default_rng(9)
    smoothing = SmoothingFunction().method1
    groups = [_random_group(rng) for _ in range(200)] + [_edited_copies(rng, 200)]
    groups += [[[1], [1]], [[1], [2]], [[], []], [[1, 2, 3], [3, 2, 1]]]
    for group in groups:
        for length in (None, 250):
            width = max(map(len, group)) if length is None else length
            rows = [r + [3] * (width - len(r)) for r in group]
            expected = _nltk_self_bleu(rows, smoothing)
            # the same logarithms, summed in another order
            assert padded_self_bleu(group, 3, length) == pytest.approx(expected, abs=1e-9)


def test_padded_self_bleu_refuses_a_length_that_cuts_a_response():
    with pytest.raises(ValueError, match="length=2 cuts a response of 3 tokens"):
        padded_self_bleu([[1, 2, 3], [1]], length=2)


@pytest.mark.parametrize("measure", DIVERSITY_MEASURES.values())
@pytest.mark.parametrize("responses", [[], [[1, 2, 3]]])
def test_fewer_than_two_responses_are_refused(measure, responses):
    with pytest.raises(ValueError, match=r"rollout\.group_size"):
        measure(responses)


def test_threads_beside_a_working_main_thread_give_the_same_values():
    rng = np.random.default_rng(10)
    groups = [_edited_copies(rng, 300) for _ in range(20)]
    jobs = [(measure, group) for group in groups for measure in DIVERSITY_MEASURES.values()]
    alone = [measure(group) for measure, group in jobs]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(measure, group) for measure, group in jobs]
        beside = [measure(group) for measure, group in jobs]
        assert [future.result() for future in futures] == beside == alone


def test_importing_the_module_does_not_import_numba():
    code = (
        f"import runpy, sys; runpy.run_path({diversity.__file__!r}); print('numba' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"

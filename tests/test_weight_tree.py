"""The tree of sums: what is drawn how often, what is left as it was, and what is refused."""

import numpy as np
import pytest

from megatron_mmr1.sampling.weight_tree import MAX_WEIGHT, WeightTree

CHI2_999 = {9: 27.88, 89: 135.98}  # 99.9% quantiles by degrees of freedom
SIZES = [1, 7, 8, 9, 64, 65, 1000]


def _chi2(observed, expected):
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    return float(((observed - expected) ** 2 / expected).sum())


def _whole_weights(rng, size):
    """Integers, a third of them zero: all sums are exact, so that draws must be equal."""
    weights = rng.integers(1, 100, size) * (rng.random(size) < 2 / 3)
    weights[rng.integers(size)] = 50
    return weights.astype(float)


def _draw_by_cumsum(weights, uniforms, with_replacement, excluded=()):
    """What `WeightTree.draw` states, in O(P) a draw."""
    weights = weights.copy()
    weights[list(excluded)] = 0.0
    drawn = []
    for uniform in uniforms:
        ends = np.cumsum(weights)
        if ends[-1] == 0:
            break
        drawn.append(int(np.searchsorted(ends, uniform * ends[-1], side="right")))
        if not with_replacement:
            weights[drawn[-1]] = 0.0
    return drawn


def _nodes(tree):
    return tree._nodes.tobytes()


@pytest.mark.parametrize("with_replacement", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_draws_are_those_of_cumsum_and_searchsorted(size, with_replacement):
    rng = np.random.default_rng(size)
    for _ in range(20):
        weights, uniforms = _whole_weights(rng, size), rng.random(min(size, 40))
        excluded = rng.integers(size, size=size // 4)
        actual = WeightTree(weights).draw(
            uniforms, with_replacement=with_replacement, excluded=excluded
        )
        expected = _draw_by_cumsum(weights, uniforms, with_replacement, excluded)
        assert actual.dtype == np.int64 and actual.tolist() == expected


def test_where_two_stretches_meet_the_later_one_begins():
    uniforms = np.arange(64) / 64  # k / 64 of 64 ones: exactly between prompts k - 1 and k
    for with_replacement in (True, False):
        drawn = WeightTree(np.ones(64)).draw(uniforms, with_replacement=with_replacement)
        assert drawn.tolist() == _draw_by_cumsum(np.ones(64), uniforms, with_replacement)
    assert WeightTree(np.ones(64)).draw(uniforms, with_replacement=True).tolist() == [*range(64)]


@pytest.mark.parametrize("size", SIZES)
def test_with_fractions_draws_differ_from_cumsum_only_where_two_stretches_meet(size):
    rng = np.random.default_rng(size)
    weights, uniforms = rng.random(size) ** 8, rng.random(2_000)
    drawn = WeightTree(weights).draw(uniforms, with_replacement=True)
    ends = np.cumsum(weights)
    target = uniforms * ends[-1]
    # Both sums have at most P roundings of the whole: 1000 * 2**-53 is 1.1e-13.
    tolerance = 1e-12 * ends[-1]
    assert (target < ends[drawn] + tolerance).all()
    assert (target >= ends[drawn] - weights[drawn] - tolerance).all()


def test_draws_with_replacement_are_in_proportion():
    uniforms = np.random.default_rng(0).random(20_000)
    drawn = WeightTree(np.arange(1.0, 11)).draw(uniforms, with_replacement=True)
    counts = np.bincount(drawn, minlength=10)
    assert _chi2(counts, 20_000 * np.arange(1, 11) / 55) < CHI2_999[9]
    # negative control: the same counts are far from uniform
    assert _chi2(counts, np.full(10, 2_000)) > CHI2_999[9]
    # independent: a draw does not depend on the one before
    joint = np.outer(np.arange(1, 11), np.arange(1, 11)) / 55**2
    pairs = np.bincount(drawn.reshape(-1, 2) @ [10, 1], minlength=100).reshape(10, 10)
    off_diagonal = ~np.eye(10, dtype=bool)
    observed, expected = pairs[off_diagonal], 10_000 * joint[off_diagonal]
    # 90 cells of 100, so a little below chi-square with 90 degrees of freedom
    assert _chi2(observed, expected) < CHI2_999[89]


def test_first_and_second_draws_are_sequential_without_replacement():
    tree, rng = WeightTree(np.arange(1.0, 11)), np.random.default_rng(1)
    weights = tree.weights / 55
    pairs = np.array([tree.draw(rng.random(2), with_replacement=False) for _ in range(20_000)])
    assert _chi2(np.bincount(pairs[:, 0], minlength=10), 20_000 * weights) < CHI2_999[9]
    joint = weights[:, None] * weights / (1 - weights[:, None])
    off_diagonal = ~np.eye(10, dtype=bool)
    counts = np.bincount(pairs @ [10, 1], minlength=100).reshape(10, 10)
    assert counts[~off_diagonal].sum() == 0
    assert _chi2(counts[off_diagonal], 20_000 * joint[off_diagonal]) < CHI2_999[89]
    # negative control: the second draw alone is not in proportion
    assert _chi2(np.bincount(pairs[:, 1], minlength=10), 20_000 * weights) > CHI2_999[9]


def test_many_levels_deep_draws_are_in_proportion():
    # 4,000 weights have four levels of sums; ten classes of 400, told apart by the last digit.
    weights = np.tile(np.arange(1.0, 11), 400)
    uniforms = np.random.default_rng(2).random(20_000)
    drawn = WeightTree(weights).draw(uniforms, with_replacement=True)
    counts = np.bincount(drawn % 10, minlength=10)
    assert _chi2(counts, 20_000 * np.arange(1, 11) / 55) < CHI2_999[9]
    assert _chi2(np.bincount(drawn // 400, minlength=10), np.full(10, 2_000)) < CHI2_999[9]


@pytest.mark.parametrize("with_replacement", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_a_weight_of_zero_is_never_drawn_however_extreme_the_others(size, with_replacement):
    rng = np.random.default_rng(size)
    ends = np.array([0.0, 1 - 2**-53, 5e-324])  # the ends of [0, 1), where rounding errs
    for _ in range(50):
        weights = 10.0 ** rng.uniform(-300, 298, size) * (rng.random(size) < 0.5)
        weights[rng.integers(size)] = rng.choice([5e-324, 1e-300, 1.0, MAX_WEIGHT])
        drawn = WeightTree(weights).draw(
            np.concatenate([ends, rng.random(size)]), with_replacement=with_replacement
        )
        assert (weights[drawn] > 0).all()
        assert with_replacement or len(drawn) == len(set(drawn)) == (weights > 0).sum()


def test_a_number_that_rounds_past_the_end_gives_the_last_positive_prompt():
    # Ten times 0.1, added one by one, is below the total as the tree adds it: 1 - 2**-53 is past.
    for size in range(1, 600):
        weights = np.append(np.full(size, 0.1), np.zeros(70))
        drawn = WeightTree(weights).draw(np.array([1 - 2**-53]), with_replacement=True)
        assert drawn.tolist() == [size - 1]


def test_fewer_than_asked_for_when_no_positive_weight_is_left():
    uniforms = np.random.default_rng(3).random(20)
    tree = WeightTree(np.array([0.0, 2.0, 0.0, 1.0, 3.0]))
    assert sorted(tree.draw(uniforms, with_replacement=False)) == [1, 3, 4]
    assert len(tree.draw(uniforms, with_replacement=True)) == 20
    zero, none = WeightTree(np.zeros(70)), np.array([1, 3, 4])
    for with_replacement in (True, False):
        assert len(zero.draw(uniforms, with_replacement=with_replacement)) == 0
        drawn = tree.draw(uniforms, with_replacement=with_replacement, excluded=none)
        assert len(drawn) == 0 and drawn.dtype == np.int64


@pytest.mark.parametrize("with_replacement", [True, False])
def test_excluded_prompts_are_not_drawn_and_the_others_stay_in_proportion(with_replacement):
    tree, rng = WeightTree(np.arange(0.0, 15)), np.random.default_rng(4)
    excluded = np.array([14, 12, 13, 11, 14])  # one twice
    drawn = np.concatenate(
        [
            tree.draw(rng.random(1), with_replacement=with_replacement, excluded=excluded)
            for _ in range(10_000)
        ]
    )
    counts = np.bincount(drawn, minlength=15)
    assert counts[0] == counts[11:].sum() == 0
    assert _chi2(counts[1:11], 10_000 * np.arange(1, 11) / 55) < CHI2_999[9]


@pytest.mark.parametrize("with_replacement", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_a_draw_leaves_every_node_as_it_was(size, with_replacement):
    rng = np.random.default_rng(size)
    tree = WeightTree(10.0 ** rng.uniform(-300, 298, size))
    before = _nodes(tree)
    for num in (0, 1, size, 2 * size):
        excluded = rng.integers(size, size=size // 2)
        tree.draw(rng.random(num), with_replacement=with_replacement, excluded=excluded)
        assert _nodes(tree) == before


@pytest.mark.parametrize("size", SIZES)
def test_updates_give_the_tree_that_is_built_anew(size):
    rng = np.random.default_rng(size)
    expected = rng.random(size)
    tree = WeightTree(expected)
    for _ in range(50):
        indices = rng.integers(size, size=rng.integers(1, 2 * size + 1))  # some twice
        values = rng.random(len(indices)) * (rng.random(len(indices)) < 0.8)
        for index, value in zip(indices, values, strict=True):
            expected[index] = value  # the last one counts
        tree.set(indices, values)
        assert tree.weights.tobytes() == expected.tobytes()
        assert _nodes(tree) == _nodes(WeightTree(expected))
    tree.set_all(expected[::-1])
    assert _nodes(tree) == _nodes(WeightTree(expected[::-1].copy()))
    assert tree.total == pytest.approx(expected.sum(), rel=1e-12)


def test_weights_may_be_set_from_a_view_of_the_tree_and_the_view_cannot_be_written_to():
    tree = WeightTree(np.array([1.0, 2.0]))
    tree.set(np.array([1, 0]), tree.weights)
    assert tree.weights.tolist() == [2.0, 1.0]
    with pytest.raises(ValueError, match="read-only"):
        tree.weights[0] = 3.0


def test_the_callers_weights_are_copied():
    weights = np.ones(10)
    tree = WeightTree(weights)
    weights[:] = 5.0
    assert tree.total == 10.0


@pytest.mark.parametrize("size", [1_000, 4_097, 100_000])
def test_memory_is_less_than_24_bytes_a_prompt_and_children_fill_cache_lines(size):
    tree = WeightTree(np.ones(size))
    assert tree.num_bytes <= 24 * size
    assert tree.num_bytes >= tree._nodes.nbytes > 8 * size
    assert tree._nodes.ctypes.data % 64 == 0
    assert size < 100_000 or tree.num_bytes <= 9.2 * size


@pytest.mark.parametrize("bad", [-1.0, -5e-324, np.nan, np.inf, -np.inf, 2 * MAX_WEIGHT])
def test_weights_that_cannot_be_drawn_are_refused_by_index_and_nothing_changes(bad):
    weights = np.ones(20)
    tree = WeightTree(weights)
    before = _nodes(tree)
    weights[7] = bad
    match = rf"weights\[7\]={bad} cannot"
    with pytest.raises(ValueError, match=match.replace("+", r"\+")):
        WeightTree(weights)
    with pytest.raises(ValueError, match=r"weights\[7\]"):
        tree.set_all(weights)
    with pytest.raises(ValueError, match=r"weights\[7\]"):
        tree.set(np.array([3, 7]), np.array([9.0, bad]))
    assert _nodes(tree) == before


def test_impossible_indices_numbers_and_shapes_are_refused_and_nothing_changes():
    tree = WeightTree(np.ones(20))
    before, half = _nodes(tree), np.array([0.5])
    for index in (-1, 20):
        with pytest.raises(ValueError, match=f"index {index} .* 0 to 19"):
            tree.set(np.array([0, index]), np.zeros(2))
        with pytest.raises(ValueError, match=f"index {index} .* 0 to 19"):
            tree.draw(half, with_replacement=True, excluded=np.array([0, index]))
    for bad in (1.0, -0.1, np.nan):
        with pytest.raises(ValueError, match=rf"uniforms\[1\]={bad} is not in \[0, 1\)"):
            tree.draw(np.array([0.5, bad]), with_replacement=False)
    with pytest.raises(ValueError, match="one weight to each of the 20"):
        tree.set_all(np.ones(21))
    with pytest.raises(ValueError, match="one value to each index"):
        tree.set(np.array([1, 2]), np.zeros(3))
    assert _nodes(tree) == before

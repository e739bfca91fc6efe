"""Packing and balance: what a plan must hold, how far from the best it may be; FLOPs, counted."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_mmr1.backend.cost import StepCost
from megatron_mmr1.backend.packing import (
    balance,
    first_fit_decreasing,
    longest_processing_time,
    pad_to,
)

SEEDS = range(20)


def _random_lengths(seed, capacity=1000):
    rng = random.Random(seed)
    longest = rng.choice([10, capacity // 3, capacity])
    return [rng.randint(1, longest) for _ in range(rng.randint(1, 300))]


def _cut(rng, whole, num_pieces):
    """Positive integers that add up to `whole`."""
    ends = [0, *sorted(rng.sample(range(1, whole), num_pieces - 1)), whole]
    return [end - start for start, end in itertools.pairwise(ends)]


def _sums(plan, values):
    return [sum(values[i] for i in indices) for indices in plan]


def _first_fit_decreasing_by_definition(lengths, capacity):
    bins = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for one in bins:
            if sum(lengths[i] for i in one) + lengths[index] <= capacity:
                one.append(index)
                break
        else:
            bins.append([index])
    return bins


@pytest.mark.parametrize("seed", SEEDS)
def test_packing_is_first_fit_decreasing_by_its_definition(seed):
    lengths = _random_lengths(seed)
    bins = first_fit_decreasing(lengths, 1000)
    assert bins == _first_fit_decreasing_by_definition(lengths, 1000)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    assert max(_sums(bins, lengths)) <= 1000


@pytest.mark.parametrize("seed", SEEDS)
def test_packing_needs_at_most_eleven_ninths_of_the_fewest_bins_and_one(seed):
    # Full bins cut into pieces: the fewest bins are known, and equal ceil(sum / capacity).
    rng = random.Random(seed)
    fewest = rng.randint(1, 60)
    lengths = [n for _ in range(fewest) for n in _cut(rng, 1000, rng.randint(1, 6))]
    rng.shuffle(lengths)
    assert math.ceil(sum(lengths) / 1000) == fewest
    assert fewest <= len(first_fit_decreasing(lengths, 1000)) <= 11 / 9 * fewest + 1


def test_packing_of_the_worst_case_is_eleven_bins_for_nine():
    # Six bins of 51 + 26 + 23 and three of 27 + 27 + 23 + 23 would be full.
    lengths = [51] * 6 + [27] * 6 + [26] * 6 + [23] * 12
    assert sum(lengths) == 900
    assert len(first_fit_decreasing(lengths, 100)) == 11


def test_sequences_of_equal_length_go_in_the_order_of_their_index():
    assert first_fit_decreasing([5, 5, 5, 5, 5], 10) == [[0, 1], [2, 3], [4]]
    assert first_fit_decreasing([3, 7, 3, 7], 10) == [[1, 0], [3, 2]]


def test_a_sequence_as_long_as_a_bin_fits_and_one_token_more_is_refused_by_name():
    assert first_fit_decreasing([10, 10], 10) == [[0], [1]]
    with pytest.raises(ValueError, match=r"max_tokens_per_microbatch=10 .* 11 tokens .*raise it"):
        first_fit_decreasing([10, 11], 10)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("seed", range(5))
def test_balance_places_each_item_once_and_within_grahams_bound(num_ranks, seed):
    rng = random.Random(seed)
    costs = [rng.lognormvariate(0, 1) for _ in range(rng.randint(1, 300))]
    ranks = longest_processing_time(costs, num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(i for one in ranks for i in one) == list(range(len(costs)))
    assert all(one == sorted(one) for one in ranks)
    # Any list schedule: when the last item came to the costliest rank, no rank had more than the
    # mean of the others. 1e-9 for sums in another order.
    mean, largest = sum(costs) / num_ranks, max(costs)
    assert max(_sums(ranks, costs)) <= (mean + (1 - 1 / num_ranks) * largest) * (1 + 1e-9)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("seed", range(5))
def test_balance_is_within_four_thirds_of_the_best(num_ranks, seed):
    # Equal loads cut into pieces: the best is known, and equals the mean.
    rng = random.Random(seed)
    costs = [n for _ in range(num_ranks) for n in _cut(rng, 1000, rng.randint(1, 5))]
    rng.shuffle(costs)
    assert sum(costs) == 1000 * num_ranks
    worst = max(_sums(longest_processing_time(costs, num_ranks), costs))
    assert worst <= (4 / 3 - 1 / (3 * num_ranks)) * 1000


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_balance_of_grahams_worst_case_meets_the_bound_exactly(num_ranks):
    m = num_ranks
    costs = [c for c in range(2 * m - 1, m, -1) for _ in range(2)] + [m] * 3
    assert max(_sums(longest_processing_time(costs, m), costs)) == 4 * m - 1  # the best is 3 m


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 64])
@pytest.mark.parametrize("seed", range(4))
def test_exchanges_place_each_item_once_and_never_cost_more(num_ranks, seed):
    rng = np.random.default_rng(seed)
    costs = rng.lognormal(0, 0.4, 8 * num_ranks + seed).tolist()
    ranks = balance(costs, num_ranks)
    assert sorted(i for rank in ranks for i in rank) == list(range(len(costs)))
    assert all(rank == sorted(rank) for rank in ranks)
    assert ranks == balance(costs, num_ranks)  # every rank of a job makes the same plan
    before = max(_sums(longest_processing_time(costs, num_ranks), costs))
    after = max(_sums(ranks, costs))
    assert after <= before
    if num_ranks in (8, 64):
        mean = sum(costs) / num_ranks
        assert after - mean < 0.5 * (before - mean)


def test_exchanges_mend_grahams_worst_case():
    costs = [5.0, 5.0, 4.0, 4.0, 3.0, 3.0, 3.0]
    assert max(_sums(longest_processing_time(costs, 3), costs)) == 11
    assert max(_sums(balance(costs, 3), costs)) <= 10


def test_exchanges_leave_few_items_and_none_alone():
    assert balance([1.0, 2.0], 4) == [[1], [0], [], []]
    assert balance([], 3) == [[], [], []]


def test_equal_costs_go_to_the_lower_rank_in_the_order_of_their_index():
    assert longest_processing_time([1.0] * 5, 2) == [[0, 2, 4], [1, 3]]
    assert longest_processing_time([1.0, 3.0, 2.0], 2) == [[1], [0, 2]]


def test_fewer_items_than_ranks_leaves_ranks_without_any():
    assert longest_processing_time([1.0, 2.0], 4) == [[1], [0], [], []]


def test_nothing_to_place_makes_no_bins_and_empty_ranks():
    assert first_fit_decreasing([], 10) == []
    assert longest_processing_time([], 3) == [[], [], []]


def test_padding_goes_up_to_the_next_multiple():
    assert [pad_to(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


@pytest.fixture(scope="module")
def tiny_model(tiny_model_dir):
    # Eager attention: the counter sees every product of it, and computes the causal half too.
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny_model_dir, attn_implementation="eager"
    )


def _cost(model, trains_vision=True):
    return StepCost.of(model.config.text_config, model.config.vision_config, trains_vision)


def _count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# Rotary angles are a product of positions and frequencies: 2 * 3 * 16 FLOPs a token of the tiny
# text model, forward only, beside 3.5 million. Nothing else is counted that we leave out.
ROTARY = 1e-4


@pytest.mark.parametrize(("num_tokens", "num_response_tokens"), [(40, 7), (200, 150), (600, 1)])
def test_flops_of_a_sequence_are_those_that_a_counter_sees(
    tiny_model, num_tokens, num_response_tokens
):
    token_ids = torch.full((1, num_tokens), 5)

    def train():
        tiny_model(token_ids, logits_to_keep=num_response_tokens).logits.sum().backward()

    cost = _cost(tiny_model)
    masked_pairs = num_tokens * (num_tokens - 1) / 2
    expected = cost.sequence(num_tokens, num_response_tokens) + cost.text_pair * masked_pairs
    assert _count(train) == pytest.approx(expected, rel=ROTARY)


def _encode(model, *grids):
    grid_thw = torch.tensor([[1, height, width] for height, width in grids])
    pixels = torch.rand(int(grid_thw.prod(-1).sum()), 3 * 2 * 14 * 14)
    return model.model.visual(pixels, grid_thw=grid_thw).pooler_output


@pytest.mark.parametrize("grids", [[(8, 8)], [(4, 6)], [(16, 24), (8, 16)]])
def test_flops_of_images_in_whole_windows_are_those_that_a_counter_sees(tiny_model, grids):
    patches = [height * width for height, width in grids]
    frozen, trained = _cost(tiny_model, False), _cost(tiny_model, True)
    with torch.no_grad():  # the products are integers below 2^53: equal to the last bit
        assert _count(lambda: _encode(tiny_model, *grids)) == frozen.images(patches)
    assert trained.images(patches) == 3 * frozen.images(patches)
    # The counter sees no gradient for the pixels, which we count: one pass of the patch embedding.
    width = tiny_model.config.vision_config.hidden_size
    pixel_gradient = 2 * (3 * 2 * 14 * 14) * width * sum(patches)
    counted = _count(lambda: _encode(tiny_model, *grids).sum().backward())
    assert counted + pixel_gradient == trained.images(patches)


def _config_7b():
    text = dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064,
    )  # fmt: skip
    vision = dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=3584)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def test_a_7b_model_has_the_published_number_of_parameters():
    config = _config_7b()
    cost = StepCost.of(config.text_config, config.vision_config, False)
    # Qwen2.5-7B's model card: 6.53 billion without embeddings; the third digit is its rounding.
    assert cost.text_token / 6 == pytest.approx(6.53e9, rel=1e-3)
    assert cost.window_patches == 64


def test_image_edges_cost_a_7b_tower_at_most_one_per_cent_less_than_counted():
    config = _config_7b()
    cost = StepCost.of(config.text_config, config.vision_config, False)
    height, width = 34, 58  # both leave windows of two patches at the edge
    with torch.device("meta"):
        tower = Qwen2_5_VLForConditionalGeneration(config).model.visual
    windows = [
        min(8, height - top) * min(8, width - left)
        for top in range(0, height, 8)
        for left in range(0, width, 8)
    ]
    n = height * width
    assert sum(windows) == n
    weights = sum(p.numel() for p in tower.parameters() if p.ndim > 1)
    merger = sum(p.numel() for p in tower.merger.parameters() if p.ndim > 1)
    exact = 2 * n * (weights - merger) + 2 * n // 4 * merger
    exact += 4 * 1280 * (28 * sum(w * w for w in windows) + 4 * n * n)
    assert exact <= cost.images([n]) <= 1.01 * exact

"""Uniform passes: whole passes end to end, the present sampler's draws, and a resume."""

import itertools
import json

import numpy as np
import pytest

from megatron_mmr1.sampling.passes import UniformPasses

CHI2_999 = {9: 27.88}  # 99.9% quantile by degrees of freedom


class _RestOfPass:
    """The draw of UniformSampler, which holds what is left of a pass; O(P) a call."""

    def __init__(self, num_prompts, seed):
        self.num_prompts, self.seed, self.pass_number = num_prompts, seed, 0
        self.rest = np.empty(0, np.int64)

    def take(self, num, taken=()):
        drawn: list[int] = []
        while True:
            is_in_batch = np.isin(self.rest, [*taken, *drawn])
            picked = self.rest[~is_in_batch][: num - len(drawn)]
            self.rest = self.rest[~np.isin(self.rest, picked)]
            drawn += picked.tolist()
            if len(drawn) == num:
                return drawn
            generator = np.random.Generator(np.random.PCG64([self.seed, self.pass_number]))
            self.rest = generator.permutation(self.num_prompts)
            self.pass_number += 1


def _calls(rng, num_prompts, num_calls):
    """Random batches: how many to take, and others that are in the batch already."""
    for _ in range(num_calls):
        batch_size = int(rng.integers(0, num_prompts + 1))
        num_taken = int(rng.integers(0, batch_size + 1))
        taken = rng.permutation(num_prompts)[:num_taken].tolist()
        yield batch_size - num_taken, taken


@pytest.mark.parametrize("num_prompts", [1, 2, 3, 10, 57])
def test_draws_are_those_of_the_present_uniform_sampler(num_prompts):
    for seed in range(20):
        passes, reference = UniformPasses(num_prompts, seed), _RestOfPass(num_prompts, seed)
        for num, taken in _calls(np.random.default_rng(seed), num_prompts, 100):
            assert passes.take(num, taken) == reference.take(num, taken)
        assert passes.pass_number > 3


@pytest.mark.parametrize("num", [1, 3, 4, 7, 10])
def test_draws_are_whole_passes_end_to_end_each_in_its_own_order(num):
    passes = UniformPasses(10, seed=0)
    batches = [passes.take(num) for _ in range(30)]
    assert all(len(set(batch)) == num for batch in batches)
    draws = list(itertools.chain(*batches))
    whole = [tuple(draws[i : i + 10]) for i in range(0, len(draws) - 9, 10)]
    assert all(sorted(one) == list(range(10)) for one in whole)
    assert len(set(whole)) == len(whole)


def test_draws_of_any_sizes_are_whole_passes_end_to_end():
    for seed in range(50):
        passes, rng = UniformPasses(23, seed), np.random.default_rng(seed)
        draws = list(itertools.chain(*(passes.take(int(rng.integers(0, 24))) for _ in range(40))))
        for start in range(0, len(draws) - 22, 23):
            assert sorted(draws[start : start + 23]) == list(range(23))


def test_every_place_of_a_pass_is_uniform():
    first = [UniformPasses(10, seed).take(10)[3] for seed in range(5_000)]
    counts = np.bincount(first, minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < CHI2_999[9]


def test_no_prompt_is_lost_when_others_are_in_the_batch_already():
    # 5 of 10 a call: whatever was deferred comes first, so two calls reach what one did not.
    passes, rng = UniformPasses(10, seed=1), np.random.default_rng(1)
    waits = np.zeros(10, int)
    for _ in range(2_000):
        taken = rng.permutation(10)[:2].tolist()
        drawn = passes.take(3, taken)
        assert len({*drawn, *taken}) == 5
        waits += 1
        waits[[*drawn, *taken]] = 0
        assert waits.max() < 8  # at most twice the 4 calls of a pass


def test_a_deferred_prompt_comes_first_in_the_next_call():
    order = UniformPasses(10, seed=2).take(10)
    passes = UniformPasses(10, seed=2)
    assert passes.take(3, taken=[order[0], order[2]]) == [order[1], order[3], order[4]]
    assert passes.deferred == [order[0], order[2]]
    assert passes.take(3) == [order[0], order[2], order[5]]


def test_the_list_of_deferred_prompts_stays_as_small_as_a_batch():
    passes, rng = UniformPasses(1_000, seed=3), np.random.default_rng(3)
    for _ in range(500):
        passes.take(8, rng.permutation(1_000)[:8].tolist())
        assert len(passes.deferred) <= 16


@pytest.mark.parametrize("num_prompts", [1, 10, 57])
def test_state_round_trip_within_a_pass_gives_the_same_later_draws(num_prompts):
    for cut in range(12):
        calls = list(_calls(np.random.default_rng(cut), num_prompts, 60))
        passes = UniformPasses(num_prompts, seed=4)
        for num, taken in calls[:cut]:
            passes.take(num, taken)
        state = json.loads(json.dumps(passes.state_dict()))
        resumed = UniformPasses(num_prompts, seed=999)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        later = [passes.take(num, taken) for num, taken in calls[cut:]]
        assert [resumed.take(num, taken) for num, taken in calls[cut:]] == later


def test_a_state_is_a_snapshot():
    passes = UniformPasses(10, seed=5)
    passes.take(3, taken=range(6))
    state = passes.state_dict()
    before = json.dumps(state)
    passes.take(4)
    assert json.dumps(state) == before


def test_orders_depend_on_the_seed_and_take_four_bytes_a_prompt():
    assert UniformPasses(50, seed=0).take(50) != UniformPasses(50, seed=1).take(50)
    assert UniformPasses(50, seed=0)._order.nbytes == 200


def test_batches_larger_than_the_data_and_states_of_another_are_refused():
    passes = UniformPasses(10, seed=0)
    with pytest.raises(ValueError, match=r"7 prompts .* 4 taken .* the 10 prompts .* at most 6"):
        passes.take(7, taken=range(4))
    assert passes.take(6, taken=range(4)) and passes.pass_number == 0
    with pytest.raises(ValueError, match=r"for 11 prompts .* has 10; .* same data set"):
        passes.load_state_dict(UniformPasses(11, seed=0).state_dict())

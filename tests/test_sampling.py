"""Samplers: who is drawn and how often, when scores change, and what a resume restores."""

import io
import itertools

import numpy as np
import pytest
import torch
from megatron_mmr1.sampling.uniform import UniformSampler
from torch.utils.data import DataLoader, TensorDataset

from megatron_mmr1.config.schema import SamplerConfig
from megatron_mmr1.sampling import SAMPLERS, EngineShare, build_sampler
from megatron_mmr1.sampling.scores import outcome_variance_score
from megatron_mmr1.sampling.vas import draw_by_weight, num_scored_draws
from megatron_mmr1.types import PromptStats

CHI2_999 = {9: 27.88, 19: 43.82, 89: 135.98}  # 99.9% quantiles by degrees of freedom


def _sampler(kind="vas", num_prompts=10, batch_size=4, seed=0, **config):
    ids = [f"p{i}" for i in range(num_prompts)]
    categories = [f"c{i % 2}" for i in range(num_prompts)]
    sampler = build_sampler(ids, categories, batch_size, SamplerConfig(kind=kind, **config), seed)
    assert isinstance(sampler, UniformSampler)
    return sampler


def _table(sampler):
    table = sampler.update_table()
    assert table is not None
    return table


def _stats(index, num_correct, num_judged=8, diversity=0.0):
    return PromptStats(f"p{index}", num_correct, num_judged, diversity)


def _chi2(observed, expected):
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    return float(((observed - expected) ** 2 / expected).sum())


def _draw(sampler, num_batches):
    return [sampler.next_batch() for _ in range(num_batches)]


def test_floor_of_the_scored_half_is_exact():
    assert int(0.29 * 100) == 28  # what floats would do
    assert num_scored_draws(0.29, 100) == 29
    assert [num_scored_draws(r, 7) for r in (0.0, 0.5, 1.0, 1e-05)] == [0, 3, 7, 0]


def test_ovs_peaks_at_one_half_and_vanishes_at_the_ends():
    pass_rate = np.linspace(0, 1, 101)
    ovs = outcome_variance_score(pass_rate)
    assert ovs.max() == ovs[50] == 0.25
    assert (np.diff(ovs[:51]) > 0).all() and (np.diff(ovs[50:]) < 0).all()
    assert ovs[0] == ovs[100] == 0.0


@pytest.mark.parametrize("kind", list(SAMPLERS))
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_no_prompt_occurs_twice_in_a_batch(kind, batch_size):
    sampler = _sampler(kind, batch_size=batch_size)
    sampler.observe(0, [_stats(0, 4)])
    assert all(len(set(batch)) == batch_size for batch in _draw(sampler, 200))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 10])
def test_uniform_draws_are_whole_passes_end_to_end_each_in_its_own_order(batch_size):
    draws = list(itertools.chain(*_draw(_sampler("uniform", batch_size=batch_size), 20)))
    passes = [tuple(draws[i : i + 10]) for i in range(0, len(draws) - 9, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len(set(passes)) == len(passes)


def test_mixture_ratio_zero_is_the_uniform_sampler():
    vas, uniform = _sampler(mixture_ratio=0.0), _sampler("uniform")
    vas.observe(0, [_stats(0, 4)])
    assert _draw(vas, 50) == _draw(uniform, 50)


def _scored(num_scores, **config):
    """Prompt i has a VPS in proportion to i + 1: diversity alone, alpha 0 and beta 1."""
    sampler = _sampler(alpha=0.0, beta=1.0, update_every=1, **config)
    sampler.observe(0, [_stats(i, 0, diversity=(i + 1) / 10) for i in range(num_scores)])
    return sampler


def test_mixture_ratio_one_draws_in_proportion_to_vps():
    sampler = _scored(10, mixture_ratio=1.0, batch_size=1)
    counts = np.bincount([batch[0] for batch in _draw(sampler, 10_000)], minlength=10)
    assert _chi2(counts, 10_000 * np.arange(1, 11) / 55) < CHI2_999[9]
    # negative control: the same counts are far from uniform
    assert _chi2(counts, np.full(10, 1_000)) > CHI2_999[9]


def test_first_and_second_scored_draws_are_sequential_without_replacement():
    weights = np.arange(1, 11) / 55
    rng = np.random.default_rng(1)
    pairs = np.array([draw_by_weight(rng, weights, 2) for _ in range(20_000)])
    assert _chi2(np.bincount(pairs[:, 0], minlength=10), 20_000 * weights) < CHI2_999[9]
    joint = weights[:, None] * weights / (1 - weights[:, None])
    off_diagonal = ~np.eye(10, dtype=bool)
    counts = np.bincount(pairs @ [10, 1], minlength=100).reshape(10, 10)
    assert counts[~off_diagonal].sum() == 0
    assert _chi2(counts[off_diagonal], 20_000 * joint[off_diagonal]) < CHI2_999[89]


def test_the_uniform_half_reaches_every_prompt_whatever_the_scores():
    sampler = _scored(10, mixture_ratio=0.5)
    for _ in range(100):  # at most a pass of 10 at two uniform draws a batch, and one of overlap
        assert set(itertools.chain(*_draw(sampler, 10))) == set(range(10))


def test_all_zero_scores_fall_back_to_uniform_draws():
    sampler = _sampler(mixture_ratio=1.0, alpha=1.0, beta=0.0, update_every=1)
    sampler.observe(0, [_stats(i, 0) for i in range(10)])
    assert sampler.metrics()["sampler/vps_mean"] == 0.0
    draws = list(itertools.chain(*_draw(sampler, 25)))
    assert (np.bincount(draws, minlength=10) == 10).all()  # whole passes


def test_fewer_positive_scores_than_scored_draws_leaves_the_rest_to_the_uniform_half():
    sampler = _sampler(mixture_ratio=1.0, alpha=1.0, beta=0.0, update_every=1)
    sampler.observe(0, [_stats(i, 4 if i == 3 else 0) for i in range(10)])
    for batch in _draw(sampler, 50):
        assert 3 in batch and len(set(batch)) == 4


def test_scores_change_only_every_update_every_steps():
    sampler = _sampler(update_every=3)
    tables = []
    for step in range(7):
        sampler.observe(step, [_stats(step, 4, diversity=0.5)])
        tables.append(sampler.update_table())
    assert [table is not None for table in tables] == [
        False,
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    first, second = tables[2], tables[5]
    assert first["step"].tolist() == [2] * 10
    assert first["age"].tolist() == [2, 1, 0] + [-1] * 7
    assert second["age"].tolist() == [5, 4, 3, 2, 1, 0] + [-1] * 4
    assert np.isnan(first["pass_rate"][3:]).all()
    assert sampler.metrics()["sampler/updates"] == 2


def test_groups_are_pooled_and_an_update_replaces_the_old_score():
    sampler = _sampler(update_every=2, alpha=0.8, beta=0.2)
    sampler.observe(0, [_stats(0, 1, 8, 0.2), _stats(1, 4, 8, 1.0)])
    sampler.observe(1, [_stats(0, 3, 4, 0.6)])
    row = {key: column[0] for key, column in _table(sampler).items()}
    assert (row["prompt_id"], row["category"]) == ("p0", "c0")
    assert row["pass_rate"] == 4 / 12
    assert row["tds"] == pytest.approx(0.4)
    assert row["vps"] == pytest.approx(0.8 * (1 / 3) * (2 / 3) + 0.2 * 0.4)
    sampler.observe(2, [_stats(0, 8, 8, 0.1)])
    sampler.observe(3, [])
    table = _table(sampler)
    assert table["pass_rate"][0] == 1.0 and table["vps"][0] == pytest.approx(0.02)
    assert table["pass_rate"][1] == 0.5  # not observed again: kept


def test_unvisited_prompts_have_the_mean_score_and_one_before_the_first_update():
    sampler = _sampler(update_every=1, alpha=1.0, beta=0.0)
    assert sampler.metrics()["sampler/vps_mean"] == 1.0
    sampler.observe(0, [_stats(0, 4), _stats(1, 0)])
    assert _table(sampler)["vps"].tolist() == [0.25, 0.0] + [0.125] * 8


def test_a_group_that_nobody_could_judge_is_no_observation():
    sampler = _sampler(update_every=1)
    sampler.observe(0, [_stats(0, 0, num_judged=0, diversity=0.9)])
    table = _table(sampler)
    assert table["age"][0] == -1 and np.isnan(table["tds"][0]) and (table["vps"] == 1.0).all()


@pytest.mark.parametrize("kind", list(SAMPLERS))
def test_unknown_prompts_are_refused_and_nothing_is_taken_in(kind):
    sampler = _sampler(kind, update_every=1)
    before = repr(sampler.state_dict())
    with pytest.raises(ValueError, match="p99"):
        sampler.observe(0, [_stats(0, 4), _stats(99, 4)])
    assert repr(sampler.state_dict()) == before


def test_order_of_the_statistics_never_matters():
    stats = [_stats(i, i % 9, diversity=i / 10) for i in range(10)]
    draws = []
    for order in (stats, stats[::-1]):
        sampler = _sampler(update_every=1)
        sampler.observe(0, order)
        draws.append(_draw(sampler, 20))
    assert draws[0] == draws[1]


@pytest.mark.parametrize("kind", list(SAMPLERS))
def test_state_round_trip_gives_the_same_later_draws(kind):
    def live(sampler, steps):
        batches = []
        for step in steps:
            batches.append(sampler.next_batch())
            stats = [_stats(i, (i + step) % 9, diversity=i / 10) for i in batches[-1]]
            sampler.observe(step, stats)
        return batches, sampler.metrics(), sampler.update_table()

    for cut in range(5, 9):  # update_every is 4: at, and between, updates
        sampler = _sampler(kind)
        live(sampler, range(cut))
        file = io.BytesIO()
        torch.save(sampler.state_dict(), file)
        file.seek(0)
        resumed = _sampler(kind, seed=999)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert resumed.update_table() is None
        expected, actual = live(sampler, range(cut, 32)), live(resumed, range(cut, 32))
        assert actual[:2] == expected[:2]
        for key, column in (expected[2] or {}).items():
            np.testing.assert_array_equal((actual[2] or {})[key], column)


def test_state_of_another_data_set_is_refused():
    with pytest.raises(ValueError, match="same data set"):
        _sampler(num_prompts=11).load_state_dict(_sampler().state_dict())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 6, 8])
def test_slices_of_all_ranks_make_the_batch(size, batch_size):
    whole = _sampler(batch_size=batch_size)
    slices = [
        iter(EngineShare(_sampler(batch_size=batch_size), rank, size)) for rank in range(size)
    ]
    for _ in range(10):
        shares = [next(one) for one in slices]
        batch = whole.next_batch()
        assert sorted(itertools.chain(*shares)) == sorted(batch)
        # Every rank's first prompts are the first drawn: several optimizer steps cut it alike.
        assert sorted(share[0] for share in shares) == sorted(batch[:size])
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_data_loader_draws_a_batch_only_when_it_is_asked_for():
    sampler = _sampler(batch_size=2)
    data = TensorDataset(torch.arange(10))
    loader = iter(DataLoader(data, batch_sampler=EngineShare(sampler, 0, 1)))
    for step in range(1, 6):
        assert len(next(loader)[0]) == 2
        assert sampler.scores.draws.sum() == 2 * step


def test_draws_coverage_and_effective_sample_size():
    sampler = _sampler("uniform", batch_size=3, update_every=1, alpha=1.0, beta=0.0)
    sampler.next_batch()
    assert sampler.metrics()["sampler/coverage"] == 0.3
    assert sampler.metrics()["sampler/ess"] == 1.0
    sampler.observe(0, [_stats(i, 4 if i < 5 else 0) for i in range(10)])
    assert sampler.metrics()["sampler/ess"] == pytest.approx(0.5)
    assert _table(sampler)["draws"].sum() == 3
    assert sampler.prompts_to_score(0) == []


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"prompts_per_step=11 .* use at most 10"):
        _sampler(batch_size=11)
    with pytest.raises(ValueError, match=r"sampler\.kind='nope'"):
        _sampler("nope")
    with pytest.raises(ValueError, match="'a' occurs more than once"):
        build_sampler(["a", "b", "a"], ["", "", ""], 2, SamplerConfig(), 0)

"""A sampler's state, and the same sampler on several engines: later draws are exactly the same."""

import copy
import itertools
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sampling_cases import KINDS, live, make, saved
from torch.utils.data import DataLoader, Dataset

from megatron_mmr1.sampling import Draw, EngineShare
from megatron_mmr1.sampling.vas import ESTIMATORS


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_resumed_sampler_draws_exactly_on(kind):
    for cut in range(5, 9):  # T is 4: at, and between, updates; in the midst of passes
        sampler = make(num_steps=20, **KINDS[kind])
        live(sampler, range(1, cut))
        resumed = make(num_steps=20, seed=999, **KINDS[kind])
        assert resumed.load_state_dict(saved(sampler)) == ""
        assert resumed.update_table() is None
        assert live(resumed, range(cut, 20)) == live(sampler, range(cut, 20))
        np.testing.assert_equal(saved(resumed), saved(sampler))
        np.testing.assert_equal(resumed.update_table(), sampler.update_table())
    different = make(num_steps=20, seed=999, **KINDS[kind])
    assert live(different, range(1, 20)) != live(make(num_steps=20, **KINDS[kind]), range(1, 20))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_changed_data_set_is_matched_by_id(kind):
    old = make(**KINDS[kind])
    live(old, range(1, 11))
    ids = ["n0", "n3", *(f"p{i}" for i in (9, 8, 6, 5, 4, 3, 2, 0)), "n5"]
    strata = ["new" if name[0] == "n" else f"a{int(name[1:]) % 2}" for name in ids]
    strata = [name.replace("a", "c") if name != "new" else "a_new" for name in strata]
    new, state = make(ids=ids, strata=strata, **KINDS[kind]), saved(old)
    for _ in range(2):  # and `state` stays what it was
        notice = new.load_state_dict(state)
        assert "3 prompts are new, 2 are gone, 8 were matched by id" in notice
    np.testing.assert_equal(state, saved(old))
    kept, was = np.arange(2, 10), np.array([9, 8, 6, 5, 4, 3, 2, 0])
    np.testing.assert_array_equal(new.draws_P[kept], old.draws_P[was])
    np.testing.assert_array_equal(new.estimator.tds_P[kept], old.estimator.tds_P[was])
    assert not new.draws_P[[0, 1, 10]].any()
    same_rates = new.estimator.pass_rate(new.step)[kept], old.estimator.pass_rate(old.step)[was]
    np.testing.assert_allclose(*same_rates, rtol=1e-12)
    if kind in ("mixed", "calibrated", "replacement", "refresh"):  # not redrawn, nor normalised
        expected = old.estimator.all_scores(old.step, old.rng)[was]
        np.testing.assert_allclose(new.tree.weights[kept], expected, rtol=1e-12)
    live(new, range(11, 31))


def test_another_estimators_state_is_refused():
    for mine, other in itertools.permutations(ESTIMATORS, 2):
        with pytest.raises(ValueError, match=f"estimator='{mine}', and the checkpoint's is"):
            make(estimator=mine).load_state_dict(saved(make(estimator=other)))


NUM_RANKS, RANK_STEPS = 4, range(1, 13)
RANK_KINDS = ("mixed", "thompson", "calibrated", "refresh", "released_code")
RANK_CASES = [(batch, kind) for batch in (6, 7) for kind in RANK_KINDS]


def _on_rank(rank: int, folder: str) -> None:
    """Be one of 4, then of 2, then the only rank, each of them an engine."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_mmr1.trainers.exchange import EnginePlace, all_stats

    for size in (4, 2, 1):
        if rank >= size:
            return
        store = f"file://{folder}/store_{size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        place = EnginePlace.of(1)
        for batch, kind in RANK_CASES:
            sampler = make(30, batch, **KINDS[kind])
            drawn = live(
                sampler,
                RANK_STEPS,
                (place.index, place.num_engines),
                lambda mine, num, place=place: all_stats(mine, num, place),
            )
            torch.save((drawn, sampler.state_dict()), f"{folder}/{batch}_{kind}_{size}_{rank}")
        dist.destroy_process_group()


def test_draws_and_state_are_bit_for_bit_the_same_on_1_2_and_4_ranks(tmp_path: Path):
    # Megatron-Core's import, 10 s, is paid for once: the ranks are forked from a process with it.
    multiprocessing.set_forkserver_preload(["megatron_mmr1.trainers.exchange"])
    torch.multiprocessing.start_processes(
        _on_rank, (str(tmp_path),), nprocs=NUM_RANKS, start_method="forkserver"
    )
    for batch, kind in RANK_CASES:
        sampler = make(30, batch, **KINDS[kind])
        expected = live(sampler, RANK_STEPS), sampler.state_dict()
        for size in (1, 2, 4):
            for rank in range(size):
                found = torch.load(tmp_path / f"{batch}_{kind}_{size}_{rank}", weights_only=False)
                np.testing.assert_equal(found, expected)
        alone = make(30, batch, **KINDS[kind])  # negative control: what one of two learns itself
        live(alone, RANK_STEPS, (0, 2))
        with pytest.raises(AssertionError):
            np.testing.assert_equal(alone.state_dict(), expected[1])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 6, 7])
def test_shares_of_all_engines_dealt_round_make_the_draw(size, batch_size):
    whole = make(batch_size=batch_size)
    engines = [iter(EngineShare(make(batch_size=batch_size), rank, size)) for rank in range(size)]
    for _ in range(10):
        shares = [next(one) for one in engines]
        dealt = [draw for turn in itertools.zip_longest(*shares) for draw in turn if draw]
        assert dealt == whole.next_batch()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Rows(Dataset[Draw]):
    """Returns each draw as it is."""

    def __getitem__(self, draw):
        return draw


def test_a_data_loader_draws_a_batch_only_when_it_is_asked_for():
    sampler = make(batch_size=2)
    loader = iter(DataLoader(Rows(), batch_sampler=EngineShare(sampler, 0, 1), collate_fn=list))
    for step in range(1, 6):
        assert len(next(loader)) == 2
        assert sampler.draws_P.sum() == sampler.num_drawn == 2 * step


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_stays_as_it_was(kind: str):
    sampler = make(num_steps=20, **KINDS[kind])
    live(sampler, range(1, 3))
    state = sampler.state_dict()
    kept = copy.deepcopy(state)
    live(sampler, range(3, 6))
    np.testing.assert_equal(state, kept)

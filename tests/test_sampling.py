"""The sampler: who is drawn and how often, when scores change, what it takes in.

What is known of prompts is test_posterior.py's, state and ranks test_sampler_state.py's. Chi-square
tests are at the 0.1% level, with fixed seeds: they pass or fail for ever.
"""

from collections import Counter
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sampling_cases import KINDS, PAPER, RELEASED, groups, make, saved, scored
from scipy.special import chdtri

from megatron_mmr1 import cli
from megatron_mmr1.config.schema import SamplerConfig
from megatron_mmr1.sampling import Draw, GroupStats, Statistician, tds
from megatron_mmr1.sampling.passes import UniformPasses
from megatron_mmr1.sampling.vas import num_scored_draws
from megatron_mmr1.types import (
    Outcome,
    Prompt,
    Rollout,
    RolloutGroup,
    ScoredGroup,
    ScoredRollout,
    Verdict,
)


def rows_of(sampler, num_steps):
    """Draw batches of as many steps, from whose groups nothing is learnt."""
    batches = []
    for step in range(1, num_steps + 1):
        batches.append([draw.row for draw in sampler.next_batch()])
        sampler.observe(step, GroupStats.of_rows(np.zeros((0, 5))))
    return np.array(batches)


def fits(counts, expected):
    """Whether counts agree with what is expected of them, by chi-square."""
    counts, expected = np.ravel(counts), np.ravel(expected)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    return bool(chi2 < chdtri(len(counts) - 1, 0.001))


def frequencies(rows):
    return np.bincount(np.ravel(rows), minlength=10)


RISING = np.arange(1, 11) / 10
TARGET = RISING / RISING.sum()


def test_the_number_of_scored_draws_is_exact_and_follows_the_schedule():
    assert int(0.29 * 100) == 28  # what floats would do
    assert num_scored_draws(0.29, 100) == 29
    assert [num_scored_draws(r, 7) for r in (0.0, 0.5, 1.0, 1e-05)] == [0, 3, 7, 0]
    for first, last, expected in (
        (0.0, 1.0, [0, 1, 3, 5, 7, 7]),
        (1.0, 0.0, [7, 5, 3, 1, 0, 0]),
        (0.29, None, [2] * 6),
    ):
        sampler = make(90, 7, num_steps=5, mixture_ratio=first, final_mixture_ratio=last)
        assert isinstance(sampler.passes, UniformPasses)
        found = []
        for step in range(1, 7):  # one more than the run has
            before = sampler.passes.cursor - len(sampler.passes.deferred)
            sampler.next_batch()
            found.append(7 - (sampler.passes.cursor - len(sampler.passes.deferred) - before))
            sampler.observe(step, groups())
        assert found == expected


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10])
def test_lambda_0_is_whole_passes_end_to_end_each_in_its_own_order(batch_size):
    sampler = make(batch_size=batch_size, mixture_ratio=0.0)
    sampler.observe(1, groups((0, 4)))
    drawn = rows_of(sampler, 20).ravel()
    passes = [tuple(drawn[i : i + 10].tolist()) for i in range(0, len(drawn) - 9, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len(set(passes)) == len(passes)


def test_lambda_1_with_replacement_is_in_proportion_to_scores():
    found = frequencies(rows_of(scored(RISING, mixture_ratio=1.0, with_replacement=True), 3000))
    assert fits(found, 12_000 * TARGET)
    assert not fits(found, np.full(10, 1200))  # negative control


def test_lambda_1_without_replacement_is_sequential_and_either_prompt_may_stand_first():
    weights = np.array([0.1, 0.2, 0.3, 0.4, 1.0])
    found = rows_of(scored(weights, mixture_ratio=1.0, batch_size=2), 5000)
    target = weights / weights.sum()
    sequential = target[:, None] * target / (1 - target[:, None])
    counts = np.bincount(found @ [5, 1], minlength=25).reshape(5, 5)
    others = ~np.eye(5, dtype=bool)
    assert counts[~others].sum() == 0
    assert fits(counts[others], 2500 * (sequential + sequential.T)[others])
    assert not fits(counts[others], 5000 * sequential[others])  # negative control: not shuffled


@pytest.mark.parametrize("with_replacement", [False, True])
def test_the_floor_gives_every_prompt_its_share(with_replacement):
    only_one = np.eye(10)[3]
    settings = {"mixture_ratio": 1.0, "with_replacement": with_replacement, "batch_size": 1}
    found = frequencies(rows_of(scored(only_one, floor=0.4, **settings), 5000))
    assert fits(found, 5000 * (0.4 / 10 + 0.6 * only_one))
    assert frequencies(rows_of(scored(only_one, **settings), 50))[3] == 50  # negative control


def test_the_uniform_half_reaches_every_prompt_whatever_the_scores():
    drawn = rows_of(scored(np.eye(10)[3], mixture_ratio=0.5), 300)
    # at most a pass of 10 at two uniform draws a batch, and one of overlap
    assert all(set(window.ravel()) == set(range(10)) for window in drawn.reshape(50, 6, 4))


def test_without_enough_positive_scores_the_uniform_half_fills_the_batch():
    equal = rows_of(scored(np.zeros(10), mixture_ratio=1.0), 25)
    assert (frequencies(equal) == 10).all()  # whole passes
    for batch in rows_of(scored(np.eye(10)[3], mixture_ratio=1.0), 50):
        assert 3 in batch and len(set(batch)) == 4
    found = frequencies(rows_of(scored(np.full(10, 0.3), mixture_ratio=1.0), 2500))
    assert fits(found, np.full(10, 1000))


@pytest.mark.parametrize("kind", ["mixed", "thompson", "calibrated", "refresh"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_without_replacement_no_prompt_is_twice_in_a_batch_and_refills_take_others(
    kind, batch_size
):
    sampler = make(batch_size=batch_size, mixture_ratio=0.7, **KINDS[kind])
    for step in range(1, 60):
        draws, num_different = Counter[int](), 0
        for number in range(4):
            batch = sampler.next_batch()
            assert [d.occurrence for d in batch] == [draws[d.row] for d in batch]
            draws.update(d.row for d in batch)
            assert len({d.row for d in batch}) == batch_size
            num_different = max(num_different, len(draws))
            if (number + 1) * batch_size <= 10:  # there were enough others
                assert len(draws) == (number + 1) * batch_size
        sampler.observe(step, groups((step % 10, step % 9, 8, 0.5)))
    assert all(draw.occurrence == 0 for draw in sampler.next_batch())


def test_with_replacement_a_prompt_may_be_drawn_again_and_again():
    sampler = scored(np.eye(10)[3], mixture_ratio=1.0, with_replacement=True)
    for first in (0, 4):  # the second is a refill of the same step
        assert sampler.next_batch() == [Draw(3, first + i) for i in range(4)]
    sampler.observe(1, groups())
    assert sampler.next_batch()[0] == Draw(3, 0)
    half = scored(np.eye(10)[3], mixture_ratio=0.5, with_replacement=True)
    assert {Counter(batch)[3] for batch in rows_of(half, 20).tolist()} == {2, 3}


@pytest.mark.parametrize("score", ["mixed", "vps", "calibrated"])
def test_all_scores_change_every_t_steps_and_at_an_epochs_end_and_else_those_observed(score):
    sampler, renewed = make(25, update_every=3, score=score), []
    for step in range(1, 12):
        before = sampler.tree.weights.copy()
        sampler.next_batch()
        sampler.observe(step, groups((step, step % 8, 8, 0.3), (0, 8 - step % 8, 8, 0.9)))
        changed = set(np.flatnonzero(sampler.tree.weights != before).tolist())
        renewed.append((table := sampler.update_table()) is not None)
        assert changed == set(range(25)) if renewed[-1] else changed <= {0, step}
        assert changed >= {step}
        if table is not None:
            np.testing.assert_array_equal(table["weight"], sampler.tree.weights)
            assert table["age"].tolist() == [0, *range(step - 1, -1, -1)] + [-1] * (24 - step)
            assert (table["step"] == step).all() and table["draws"].sum() == 4 * step
    # four draws a step: the epoch of 25 prompts ends with the 7th, from which T counts again
    assert [step for step, is_new in enumerate(renewed, 1) if is_new] == [3, 6, 7, 10]


def test_a_refresh_is_due_before_step_1_and_every_t_steps_and_nothing_else_changes_scores():
    sampler = make(update_every=5, alpha=0.8, beta=0.2, **PAPER)
    due = [step for step in range(1, 18) if sampler.prompts_to_score(step)]
    assert due == [1, 6, 11, 16] and sampler.prompts_to_score(6) == list(range(10))
    sampler.observe_scoring(1, groups(*((i, i % 9, 8, i / 16) for i in range(9)), (9, 0, 0, 0.0)))
    rates = np.arange(9) / 8
    expected = 0.8 * (rates * (1 - rates)) + 0.2 * (np.arange(9) / 16)
    np.testing.assert_array_equal(sampler.tree.weights[:9], expected)
    # nobody could judge the last one: it has the others' means
    assert sampler.tree.weights[9] == pytest.approx(expected.mean(), rel=1e-12)
    before = sampler.tree.weights.copy()
    for step in range(1, 12):
        sampler.next_batch()
        sampler.observe(step, groups((step % 10, 4, 8, 0.9)))
        np.testing.assert_array_equal(sampler.tree.weights, before)
    sampler.observe_scoring(11, groups((0, 4, 8, 0.5)))
    assert sampler.tree.weights[0] == 0.8 * 0.25 + 0.2 * 0.5
    np.testing.assert_array_equal(sampler.tree.weights[1:9], before[1:9])
    posterior = make()
    assert not any(posterior.prompts_to_score(step) for step in range(1, 20))
    with pytest.raises(NotImplementedError, match="asks for no scoring rollouts"):
        posterior.observe_scoring(1, groups((0, 4)))


PRESETS = sorted(path.stem for path in (cli.CONF_DIR / "sampler").glob("*.yaml"))


def test_presets_state_every_key_and_have_the_papers_numbers():
    presets = {}
    for name in PRESETS:
        stated = yaml.safe_load((cli.CONF_DIR / "sampler" / f"{name}.yaml").read_text())
        assert list(stated) == [field.name for field in fields(SamplerConfig)]
        presets[name] = SamplerConfig(**stated)
        assert presets[name].preset == name and stated == asdict(presets[name])
        make(**stated).next_batch()
    assert presets["posterior"] == SamplerConfig()
    for name, numbers in (
        ("paper_section_6_1", (32, 35, 0.8, 0.2, 0.5)),
        ("paper_table_6", (16, 56, 0.8, 0.2, 0.5)),
        ("released_code", (8, 4, 1.0, 0.0, 0.5)),
    ):
        c = presets[name]
        found = (c.scoring_rollouts, c.update_every, c.alpha, c.beta, c.mixture_ratio)
        assert found == numbers and c.with_replacement and c.floor == 0
        assert c.estimator == ("released_code" if name == "released_code" else "refresh")
    assert presets["uniform"].mixture_ratio == presets["dapo"].mixture_ratio == 0
    assert presets["dapo"].max_refills > 0 == presets["uniform"].max_refills


def group(prompt_id, responses, outcomes="", answer="42", occurrence=0):
    """A judged group; outcomes are letters: c correct, w wrong, ? could not judge."""
    names: dict[str, Outcome] = {"c": "correct", "w": "wrong", "?": "could_not_judge"}
    tokens = torch.zeros(1, dtype=torch.int64)
    prompt = Prompt(prompt_id, tokens, tokens, None, None, answer, occurrence=occurrence)
    rollouts = tuple(Rollout(i, tuple(r), (), "stop", "") for i, r in enumerate(responses))
    scores = tuple(ScoredRollout(Verdict(names[o], ""), True, 0.0) for o in outcomes)
    return ScoredGroup(RolloutGroup(prompt, rollouts, 0), scores)


def measured(judged, measure="self_bleu", *length):
    with Statistician(measure, *length) as statistician:
        for one in judged:
            statistician.submit(one.group)
        return statistician.collect(judged, range(len(judged)))


def test_statistics_are_the_verdicts_and_the_measure_of_each_occurrence():
    rng = np.random.default_rng(0)
    responses = [[rng.integers(0, 9, 30).tolist() for _ in range(4)] for _ in range(2)]
    found = measured(
        [
            group("a", responses[0], "cw?c"),
            group("a", responses[1], "wwww", answer=" (B) ", occurrence=1),
            group("b", responses[0][:1], "w", answer="BC"),
            group("c", responses[0][:2], "?w", answer="C"),
        ]
    )
    assert found.to_rows()[:, [0, 1, 2, 4]].tolist() == [
        [0, 2, 3, 0],
        [1, 0, 4, 4],
        [2, 0, 1, 0],
        [3, 0, 1, 1],
    ]
    expected = [tds(responses[0]), tds(responses[1]), 0.0, tds(responses[0][:2])]
    assert found.diversity_K.tolist() == expected and len(set(expected)) == 4
    assert found.is_mixed_K.tolist() == [True, False, False, False]


def test_released_code_has_the_defects_it_is_to_reproduce():
    sampler = make(10, 4, **RELEASED)
    sampler.observe_scoring(1, groups(*((i, i // 3 + 1) for i in range(10))))
    raw = np.array([(i // 3 + 1) / 8 * (1 - (i // 3 + 1) / 8) for i in range(10)])
    np.testing.assert_allclose(sampler.tree.weights, (raw - raw[0]) / (raw[9] - raw[0]))
    assert sampler.tree.weights[0] == 0 < raw[0]  # the lowest is never drawn by score
    sampler.observe_scoring(5, groups(*((i, 4) for i in range(10))))
    assert not sampler.tree.weights.any()  # the most informative group there is, ten times
    # so that all draws are of one permutation, never shuffled again, without its tail
    drawn = rows_of(sampler, 6)
    np.testing.assert_array_equal(drawn[::2], drawn[[0, 0, 0]])
    np.testing.assert_array_equal(drawn[1::2], drawn[[1, 1, 1]])
    assert len(set(drawn.ravel())) == 8
    # partial credit: an all-wrong multiple choice looks as if it had variance
    all_wrong = groups((0, 0, 8, 0.0, 8), (1, 0, 8, 0.0, 0))
    sampler.observe_scoring(9, all_wrong)
    np.testing.assert_allclose(sampler.estimator.pass_rate(0)[:2], [0.1, 0.0])
    paper = make(10, 4, **PAPER)
    paper.observe_scoring(1, all_wrong)
    assert paper.estimator.pass_rate(0)[0] == paper.tree.weights[0] == 0


def test_released_code_prefers_prompts_whose_responses_are_alike():
    rng = np.random.default_rng(0)
    same, different = [list(range(60))] * 4, [rng.permutation(400)[:60].tolist() for _ in range(4)]
    judged = [group("p0", same, "wwww"), group("p1", different, "wwww")]
    measure = yaml.safe_load((cli.CONF_DIR / "sampler/released_code.yaml").read_text())["diversity"]
    similarity = measured(judged, measure).diversity_K
    padded = measured(judged, measure, 4096).diversity_K
    assert similarity[0] == padded[0] == 1
    assert similarity[1] < 0.2 and padded[1] > 0.9  # and padding hides most of the difference
    for kind, better in ((RELEASED, 0), (PAPER, 1)):
        config: dict[str, Any] = kind | {"alpha": 0.0, "beta": 1.0}
        sampler = make(2, 1, **config)
        sampler.observe_scoring(1, measured(judged, measure if kind is RELEASED else "self_bleu"))
        assert sampler.tree.weights.argmax() == better


BAD_GROUPS = [
    ((10, 4), "prompt 10 is not among the 10"),
    ((-1, 4), "prompt -1 is not among"),
    ((1, -1), "num_correct_K=-1 of prompt 'p1' can't be"),
    ((1, 0, -8), "of prompt 'p1' can't be"),
    ((1, 9), "num_correct_K=9"),
    ((1, 4, 8, np.nan), "diversity_K=nan"),
    ((1, 4, 8, -0.1), "diversity_K=-0.1"),
]


@pytest.mark.parametrize(("row", "message"), BAD_GROUPS)
@pytest.mark.parametrize("kind", ["mixed", "refresh", "released_code"])
def test_impossible_statistics_are_refused_and_nothing_is_taken_in(kind, row, message):
    sampler = make(**KINDS[kind])
    before = saved(sampler)
    observes = [sampler.observe] + [sampler.observe_scoring] * (kind != "mixed")
    for observe in observes:
        with pytest.raises(ValueError, match=message):
            observe(1, groups((0, 4), row))
    np.testing.assert_equal(saved(sampler), before)


def test_a_group_that_nobody_could_judge_is_no_observation():
    sampler, other = make(update_every=1), make(update_every=1)
    sampler.observe(1, groups((0, 4), (1, 0, 0, 0.9)))
    other.observe(1, groups((0, 4)))
    np.testing.assert_equal(saved(sampler), saved(other))


def test_impossible_pools_are_refused_by_name():
    with pytest.raises(ValueError, match=r"prompts_per_step=11 .* use at most 10"):
        make(batch_size=11)
    with pytest.raises(ValueError, match="'p1' occurs more than once"):
        make(ids=["p1", "p2", "p1"], batch_size=2)


def test_coverage_and_effective_sample_size():
    sampler = make(batch_size=3)
    sampler.next_batch()
    assert sampler.metrics()["sampler/coverage"] == 0.3
    assert sampler.metrics()["sampler/ess"] == 1.0
    assert scored([1.0] * 5 + [0.0] * 5).metrics()["sampler/ess"] == pytest.approx(0.5)

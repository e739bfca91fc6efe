"""Penalties: hand-worked values, and that none reaches a verdict, a pass rate or a refill."""

import math

import pytest
import torch

from megatron_mmr1.config.schema import RewardConfig
from megatron_mmr1.observability.step_metrics import group_metrics, group_sums
from megatron_mmr1.rewards import VerifierPool
from megatron_mmr1.rewards.penalties import overlong_share, repetition_share
from megatron_mmr1.trainers.collect import has_variance
from megatron_mmr1.types import Prompt, Rollout, RolloutGroup, ScoredGroup

WRONG = r"<think>a</think><answer>\boxed{6}</answer>"


@pytest.mark.parametrize(
    ("tokens", "ngram", "share"),
    [
        ("", 2, 0.0),
        ("a", 2, 0.0),  # shorter than one n-gram
        ("abcd", 2, 0.0),
        ("abab", 2, 1 / 3),  # ab, ba, ab: one of three was there before
        ("aaaaa", 2, 3 / 4),
        ("aaaaa", 1, 4 / 5),
        ("abcabcabc", 3, 4 / 7),  # abc, bca, cab; then four of them again
    ],
)
def test_repetition_is_the_share_of_n_grams_that_were_there_before(tokens, ngram, share):
    assert repetition_share(tokens, ngram) == pytest.approx(share)


@pytest.mark.parametrize(
    ("num_tokens", "share"), [(0, 0), (80, 0), (81, 0.05), (90, 0.5), (100, 1), (120, 1)]
)
def test_overlong_rises_over_the_cache_from_0_to_1(num_tokens, share):
    assert overlong_share(num_tokens, max_tokens=100, cache_tokens=20) == pytest.approx(share)


def scored(config: RewardConfig, texts: list[str], tokens: list[str], gold: str) -> ScoredGroup:
    nothing = torch.zeros(0, dtype=torch.int64)
    rollouts = tuple(
        Rollout(i, tuple(map(ord, letters)), (), "stop", text)
        for i, (text, letters) in enumerate(zip(texts, tokens, strict=True))
    )
    prompt = Prompt("p", nothing, nothing.reshape(3, 0), None, None, gold)
    with VerifierPool(config, max_response_tokens=10) as pool:
        pool.submit(RolloutGroup(prompt, rollouts, 0))
        (group,) = pool.results()
    return group


def test_penalties_lower_the_reward_and_nothing_that_is_said_of_the_verdicts():
    config = RewardConfig(
        repetition_weight=0.6, repetition_ngram=2, overlong_weight=0.5, overlong_cache_tokens=4
    )
    tokens = ["abcd", "abab", "abcdefgh"]
    plain = scored(RewardConfig(), [WRONG] * 3, tokens, "5")
    group = scored(config, [WRONG] * 3, tokens, "5")
    assert [s.reward for s in plain.scores] == [1.0, 1.0, 1.0]
    assert [s.reward for s in group.scores] == pytest.approx([1.0, 1 - 0.6 / 3, 1 - 0.5 * 2 / 4])
    assert [s.verdict for s in group.scores] == [s.verdict for s in plain.scores]
    assert not has_variance(plain) and not has_variance(group)
    sums = group_sums([group])
    assert (sums["all_wrong"], sums["mixed"], sums["correct"]) == (1, 0, 0)
    metrics = group_metrics(sums, 1.0)
    assert metrics["groups/pass_rate"] == 0
    assert metrics["reward/repetition_penalty"] == pytest.approx(0.2 / 3)
    assert metrics["reward/overlong_penalty"] == pytest.approx(0.25 / 3)
    assert metrics["reward/mean"] == pytest.approx(1 - 0.45 / 3)


def test_what_could_not_be_judged_has_no_reward_with_penalties_either():
    config = RewardConfig(repetition_weight=1.0, repetition_ngram=1)
    (score,) = scored(config, [WRONG], ["aaaa"], "").scores
    assert math.isnan(score.reward) and score.repetition_penalty == 0.75

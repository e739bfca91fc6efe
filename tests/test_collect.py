"""The rollouts of a step: dynamic sampling, its refills, and a budget that is never exceeded.

Generation is a table of which prompts give mixed groups; sampler, loader, exchange and statistics
are the real ones. tests/test_runs.py does it with real engines.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mmr1.config.schema import GrpoConfig, RolloutConfig, SamplerConfig
from megatron_mmr1.data.loader import build_loader
from megatron_mmr1.observability.timers import PhaseTimers
from megatron_mmr1.rollout.engine import Sampling, request_seed
from megatron_mmr1.sampling import EngineShare
from megatron_mmr1.sampling.base import refill_size
from megatron_mmr1.sampling.statistics import Statistician
from megatron_mmr1.sampling.vas import PromptPool, VasSampler
from megatron_mmr1.trainers import collect as room
from megatron_mmr1.trainers.collect import Collected, collect, score_if_due
from megatron_mmr1.trainers.exchange import EnginePlace
from megatron_mmr1.trainers.setup import prompt_pool
from megatron_mmr1.types import (
    Prompt,
    Rollout,
    RolloutGroup,
    ScoredGroup,
    ScoredRollout,
    Verdict,
)

NUM_PROMPTS, B, G = 100, 8, 4
pytestmark = pytest.mark.usefixtures("process_group")


class Prompts:
    """A data set of prompts that are nothing but an id."""

    def __init__(self) -> None:
        self.prompt_ids = [f"p{row}" for row in range(NUM_PROMPTS)]

    def __len__(self) -> int:
        return NUM_PROMPTS

    def __getitem__(self, row: int) -> Prompt:
        return prompt_of(f"p{row}")

    def index_of(self, prompt_id: str) -> int:
        return int(prompt_id[1:])


def prompt_of(prompt_id: str, occurrence: int = 0) -> Prompt:
    tokens = torch.zeros(1, dtype=torch.int64)
    return Prompt(prompt_id, tokens, tokens.expand(3, 1), None, None, "1", occurrence=occurrence)


def group_of(prompt: Prompt, num_rollouts: int, is_mixed: bool) -> ScoredGroup:
    """A group whose answers are all correct; of a mixed one every second answer is wrong."""
    rollouts = tuple(Rollout(i, (5, 6 + i), (-1.0, -1.0), "stop", "") for i in range(num_rollouts))
    is_correct = [not is_mixed or i % 2 == 1 for i in range(num_rollouts)]
    scores = tuple(
        ScoredRollout(Verdict("correct" if right else "wrong", ""), True, 1.0 + right)
        for right in is_correct
    )
    return ScoredGroup(RolloutGroup(prompt, rollouts, 0), scores)


class Setup:
    """Every `every`-th prompt gives a mixed group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: int, **settings: Any):
        max_responses = settings.pop("max_responses", 0)
        self.config = GrpoConfig(
            prompts_per_step=B,
            max_responses=max_responses,
            rollout=RolloutConfig(group_size=G),
            sampler=SamplerConfig(**({"mixture_ratio": 0.0} | settings)),
        )
        self.sampling = Sampling(G, 1.0, 8, 0, 1)
        ids = [f"p{row}" for row in range(NUM_PROMPTS)]
        pool = PromptPool(ids, [""] * NUM_PROMPTS, [""] * NUM_PROMPTS)
        self.sampler = VasSampler(pool, B, self.config.sampler, 0, G)
        self.generated: list[list[str]] = []
        self.parts: Any = SimpleNamespace(
            sampler=self.sampler,
            train_set=Prompts(),
            place=EnginePlace(0, 1, True),
            prompts=iter(build_loader(Prompts(), EngineShare(self.sampler, 0, 1))),
            statistician=Statistician("self_bleu", 8),
            timers=PhaseTimers(),
        )

        def generate(prompts: list[Prompt], sampling: Sampling, parts: Any, phase: str) -> Any:
            self.generated.append([prompt.prompt_id for prompt in prompts])
            return [
                group_of(p, sampling.group_size, int(p.prompt_id[1:]) % every == 0) for p in prompts
            ]

        monkeypatch.setattr(room, "_generate", generate)

    def collect(self, num_responses: int = 0) -> Collected:
        return collect(self.config, self.parts, self.sampling, num_responses)

    @property
    def drawn(self) -> list[str]:
        return [prompt_id for draw in self.generated for prompt_id in draw]


def test_without_dynamic_sampling_a_step_is_one_draw(monkeypatch: pytest.MonkeyPatch):
    setup = Setup(monkeypatch, every=3)
    found = setup.collect()
    assert [g.group.prompt.prompt_id for g in found.groups] == setup.drawn and len(setup.drawn) == B
    assert found.discarded == [] and found.num_refills == 0


def test_a_refill_is_as_large_as_what_is_missing_needs(monkeypatch: pytest.MonkeyPatch):
    setup = Setup(monkeypatch, every=2, max_refills=20)
    found = setup.collect()
    assert len(found.groups) == B and all(room.has_variance(g) for g in found.groups)
    sizes = [len(draw) for draw in setup.generated]
    num_mixed = num_drawn = 0
    for number, draw in enumerate(setup.generated):
        if number:
            assert len(draw) == refill_size(num_mixed, num_drawn, B)
        num_drawn += len(draw)
        num_mixed += sum(int(prompt_id[1:]) % 2 == 0 for prompt_id in draw)
    assert found.num_refills == len(sizes) - 1 > 0
    assert len(set(setup.drawn)) == len(setup.drawn)  # other prompts in each draw
    everything = [*found.groups, *found.discarded]
    assert {g.group.prompt.prompt_id for g in everything} == set(setup.drawn)
    assert found.stats.index_K.tolist() == [int(p[1:]) for p in setup.drawn]  # the sampler sees all
    assert found.metrics()["rollout/discarded_responses"] == G * (len(setup.drawn) - B)


def test_refills_end_and_what_is_missing_has_no_variance(monkeypatch: pytest.MonkeyPatch):
    setup = Setup(monkeypatch, every=1000, max_refills=2)
    found = setup.collect()
    assert [len(draw) for draw in setup.generated] == [B, B, B] and found.num_refills == 2
    assert len(found.groups) == B and len(found.discarded) == 2 * B
    assert [g.group.prompt.prompt_id for g in found.groups] == setup.drawn[:B]


def test_trained_groups_are_in_the_order_of_the_draw(monkeypatch: pytest.MonkeyPatch):
    """Mixed ones first would leave the last of several optimizer steps without any."""
    setup = Setup(monkeypatch, every=4, max_refills=1)
    found = setup.collect()
    kept = [g.group.prompt.prompt_id for g in found.groups]
    assert kept == [p for p in setup.drawn if p in kept]
    is_mixed = [room.has_variance(g) for g in found.groups]
    assert any(is_mixed) and is_mixed != sorted(is_mixed, reverse=True)


def test_a_refill_never_exceeds_the_budget(monkeypatch: pytest.MonkeyPatch):
    before = 1000
    for room_for in (0, 1, 4, B):
        setup = Setup(
            monkeypatch, every=1000, max_refills=9, max_responses=before + (B + room_for) * G
        )
        setup.collect(before)
        assert len(setup.drawn) == B + (B if room_for == B else 0)


@pytest.mark.parametrize(
    ("num_mixed", "num_drawn", "expected"), [(0, 8, 8), (6, 8, 3), (7, 8, 2), (4, 16, 8)]
)
def test_size_of_a_refill(num_mixed: int, num_drawn: int, expected: int):
    assert refill_size(num_mixed, num_drawn, B) == expected


def test_scoring_rollouts_are_of_all_prompts_and_counted(monkeypatch: pytest.MonkeyPatch):
    setup = Setup(
        monkeypatch,
        every=2,
        estimator="refresh",
        scoring_rollouts=2,
        update_every=3,
        mixture_ratio=0.5,
    )
    numbers = [
        score_if_due(step, setup.config, setup.parts, setup.sampling) for step in (1, 2, 3, 4)
    ]
    assert numbers == [2 * NUM_PROMPTS, 0, 0, 2 * NUM_PROMPTS]
    assert setup.drawn == 2 * [f"p{row}" for row in range(NUM_PROMPTS)]
    rates = setup.sampler.estimator.pass_rate(0)
    assert rates[::2].tolist() == [0.5] * 50 and rates[1::2].tolist() == [1.0] * 50


def test_a_prompt_drawn_twice_is_sampled_with_another_seed():
    sampling = Sampling(G, 1.0, 8, 0, 1)
    prompts = [prompt_of("q"), prompt_of("q", 1), prompt_of("q", 2), prompt_of("q/1")]
    seeds = [request_seed(sampling, prompt.key) for prompt in prompts]
    seeds += [request_seed(replace(sampling, is_scoring=True), prompts[0].key)]
    assert len(set(seeds)) == len(seeds)


def test_a_prior_by_category_needs_categories():
    nameless: Any = SimpleNamespace(prompt_ids=["a", "b"], categories=["", ""])
    with pytest.raises(ValueError, match=r"sampler.prior='category' .* use record, or global"):
        prompt_pool(nameless, "category")
    some: Any = SimpleNamespace(prompt_ids=["a", "b"], categories=["", "geometry"])
    assert prompt_pool(some, "category").strata == ["", "geometry"]

"""The rollouts of a step: draw, generate, judge, exchange; fill up what has no variance; and, where
the sampler asks for it, rollouts that are made only to score prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import batched

import numpy as np

from megatron_mmr1.backend import parallel
from megatron_mmr1.config.schema import GrpoConfig
from megatron_mmr1.data.loader import PromptView
from megatron_mmr1.observability.progress import Progress
from megatron_mmr1.rollout.engine import Sampling
from megatron_mmr1.sampling.base import refill_size
from megatron_mmr1.sampling.statistics import GroupStats
from megatron_mmr1.trainers.exchange import all_groups, all_stats
from megatron_mmr1.trainers.setup import Parts
from megatron_mmr1.types import ScoredGroup


@dataclass(frozen=True, slots=True)
class Collected:
    """What was generated for a step, by all engines; the same on every rank.

    Attributes:
        groups: to train on, `prompts_per_step` of them.
        discarded: the others (dynamic sampling).
        stats: of both.
        num_refills: further draws that were needed.
    """

    groups: list[ScoredGroup]
    discarded: list[ScoredGroup]
    stats: GroupStats
    num_refills: int

    def metrics(self) -> dict[str, float]:
        """Return what dynamic sampling cost."""
        return {
            "rollout/refills": float(self.num_refills),
            "rollout/discarded_responses": float(sum(len(g.scores) for g in self.discarded)),
        }


def batch_responses(config: GrpoConfig) -> int:
    """Return the responses of a step without refills and scoring."""
    return config.prompts_per_step * config.rollout.group_size


def num_scoring_responses(step: int, config: GrpoConfig, parts: Parts) -> int:
    """Return the responses that the sampler wants before `step`, only to score prompts."""
    return len(parts.sampler.prompts_to_score(step)) * config.sampler.scoring_rollouts


def collect(
    config: GrpoConfig, parts: Parts, sampling: Sampling, num_responses: int = 0
) -> Collected:
    """Generate the groups of a step.

    With dynamic sampling (DAPO, arXiv:2503.14476, section 3.2) groups whose rewards are all equal
    are set aside, and others are drawn, at most `sampler.max_refills` times. What is missing then,
    or when `max_responses` has no more, is filled up with groups that were set aside: no advantage
    comes of them, and nothing stalls.

    Departure: DAPO and its followers refill by whole batches. Here a refill is as large as what is
    missing needs at the rate seen in this step, so that hardly a mixed group is thrown away.

    Args:
        num_responses: generated before.
    """
    size, left = config.prompts_per_step, config.max_responses - num_responses
    groups, found = _draw(config.prompts_per_step, config, parts, sampling)
    stats, is_mixed = [found.to_rows()], [has_variance(group) for group in groups]
    num_refills = 0
    while sum(is_mixed) < size and num_refills < config.sampler.max_refills:
        num_wanted = refill_size(sum(is_mixed), len(groups), size)
        if config.max_responses > 0 and left < (len(groups) + num_wanted) * sampling.group_size:
            break
        num_refills += 1
        parts.sampler.ask_for(num_wanted)
        more, found = _draw(num_wanted, config, parts, sampling)
        groups += more
        stats.append(found.to_rows())
        is_mixed += [has_variance(group) for group in more]
    # Mixed ones first, then what is missing; in the order in which they were drawn, so that each of
    # several optimizer steps gets some of both.
    chosen = set(sorted(range(len(groups)), key=lambda i: not is_mixed[i])[:size])
    return Collected(
        [group for i, group in enumerate(groups) if i in chosen],
        [group for i, group in enumerate(groups) if i not in chosen],
        GroupStats.of_rows(np.concatenate(stats)),
        num_refills,
    )


def _draw(
    num_prompts: int, config: GrpoConfig, parts: Parts, sampling: Sampling
) -> tuple[list[ScoredGroup], GroupStats]:
    """Take the sampler's next draw, of so many prompts, and make its groups."""
    with parts.timers.phase("sampler"):
        prompts = next(parts.prompts)
    return generate_and_judge(prompts, sampling, num_prompts, parts)


def score_if_due(step: int, config: GrpoConfig, parts: Parts, sampling: Sampling) -> int:
    """Make the scoring rollouts that the sampler asks for before `step`; return how many."""
    indices = parts.sampler.prompts_to_score(step)
    if not indices:
        return 0
    sampling = replace(sampling, group_size=config.sampler.scoring_rollouts, is_scoring=True)
    rows: list[np.ndarray] = []
    chunks = list(batched(indices, config.prompts_per_step))
    with Progress(
        len(chunks), title="scoring prompts", is_quiet=not parallel.is_main(), is_brief=True
    ) as progress:
        for number, chunk in enumerate(chunks, 1):
            mine = chunk[parts.place.index :: parts.place.num_engines]
            prompts = PromptView.of(parts.train_set, mine)
            groups = _generate(prompts, sampling, parts, "scoring")
            rows.append(
                all_stats(parts.statistician.collect(groups, mine), len(chunk), parts.place)
            )
            progress.update(number, {})
    parts.sampler.observe_scoring(step, GroupStats.of_rows(np.concatenate(rows)))
    return len(indices) * config.sampler.scoring_rollouts


def generate_and_judge(
    prompts: PromptView, sampling: Sampling, num_prompts: int, parts: Parts
) -> tuple[list[ScoredGroup], GroupStats]:
    """Generate this engine's share of a draw; return all engines' groups and statistics.

    Args:
        num_prompts: of the whole draw.
    """
    mine = _generate(prompts, sampling, parts, "rollout")
    with parts.timers.phase("exchange"):
        rows = all_stats(
            parts.statistician.collect(mine, prompts.indices), num_prompts, parts.place
        )
        return all_groups(mine, parts.place), GroupStats.of_rows(rows)


def has_variance(group: ScoredGroup) -> bool:
    """Whether the rewards of a group differ, so that it has a gradient.

    Penalties don't count: with them nearly every group has some variance, and none is refilled.
    """
    rewards = {s.reward_before_penalties for s in group.scores if not math.isnan(s.reward)}
    return len(rewards) > 1


def _generate(
    prompts: PromptView, sampling: Sampling, parts: Parts, phase: str
) -> list[ScoredGroup]:
    """Generate and judge; verdicts and diversities are made while others are generated.

    Args:
        phase: whose time it is, "rollout" or "scoring".
    """
    with parts.timers.phase(phase):
        for group in parts.engine.generate(prompts, sampling):
            parts.sync.check(group.weight_version)
            parts.verifier.submit(group)
            parts.statistician.submit(group)
    with parts.timers.phase("reward"):
        by_key = {scored.group.prompt.key: scored for scored in parts.verifier.results()}
    return [by_key[key] for key in prompts.keys]

"""The rollouts of a step: draw, generate, judge, exchange; fill up what has no variance; and, where
the sampler asks for it, rollouts that are made only to score prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import batched

import numpy as np

from megatron_mmr1.backend import parallel
from megatron_mmr1.config.schema import GrpoConfig
from megatron_mmr1.observability.progress import Progress
from megatron_mmr1.rollout.engine import Sampling
from megatron_mmr1.sampling.statistics import GroupStats
from megatron_mmr1.trainers.exchange import all_groups, all_stats
from megatron_mmr1.trainers.setup import Parts
from megatron_mmr1.types import Prompt, ScoredGroup


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


def collect(config: GrpoConfig, parts: Parts, sampling: Sampling) -> Collected:
    """Generate the groups of a step.

    With dynamic sampling (DAPO, arXiv:2503.14476, section 3.2) groups whose rewards are all equal
    are set aside, and others are drawn, at most `sampler.max_refills` times. What is missing then
    is filled up with groups that were set aside: they have no gradient, and nothing stalls.
    """
    kept: list[ScoredGroup] = []
    equal: list[ScoredGroup] = []
    stats: list[np.ndarray] = []
    num_refills = 0
    while True:
        with parts.timers.phase("sampler"):
            prompts = next(parts.prompts)
        groups, found = generate_and_judge(prompts, sampling, config.prompts_per_step, parts)
        stats.append(found.to_rows())
        if config.sampler.max_refills == 0:
            return Collected(groups, [], found, 0)
        for group in groups:
            (kept if has_variance(group) else equal).append(group)
        if len(kept) >= config.prompts_per_step or num_refills == config.sampler.max_refills:
            break
        num_refills += 1
    num_missing = max(config.prompts_per_step - len(kept), 0)
    return Collected(
        kept[: config.prompts_per_step] + equal[:num_missing],
        kept[config.prompts_per_step :] + equal[num_missing:],
        GroupStats.of_rows(np.concatenate(stats)),
        num_refills,
    )


def score_if_due(step: int, config: GrpoConfig, parts: Parts, sampling: Sampling) -> int:
    """Make the scoring rollouts that the sampler asks for before `step`; return how many."""
    indices = parts.sampler.prompts_to_score(step)
    if not indices:
        return 0
    num_rollouts = config.sampler.scoring_rollouts
    sampling = replace(sampling, group_size=num_rollouts, is_scoring=True)
    rows: list[np.ndarray] = []
    chunks = list(batched(indices, config.prompts_per_step))
    with (
        parts.timers.phase("scoring"),
        Progress(
            len(chunks), title="scoring prompts", is_quiet=not parallel.is_main(), is_brief=True
        ) as progress,
    ):
        for number, chunk in enumerate(chunks, 1):
            mine = chunk[parts.place.index :: parts.place.num_engines]
            prompts = [parts.train_set[index] for index in mine]
            groups = _generate(prompts, sampling, parts)
            rows.append(
                all_stats(parts.statistician.collect(groups, mine), len(chunk), parts.place)
            )
            progress.update(number, {})
    parts.sampler.observe_scoring(step, GroupStats.of_rows(np.concatenate(rows)))
    return len(indices) * num_rollouts


def generate_and_judge(
    prompts: Sequence[Prompt], sampling: Sampling, num_prompts: int, parts: Parts
) -> tuple[list[ScoredGroup], GroupStats]:
    """Generate this engine's share of a draw; return all engines' groups and statistics.

    Args:
        num_prompts: of the whole draw.
    """
    mine = _generate(prompts, sampling, parts)
    indices = [parts.train_set.index_of(prompt.prompt_id) for prompt in prompts]
    with parts.timers.phase("exchange"):
        rows = all_stats(parts.statistician.collect(mine, indices), num_prompts, parts.place)
        return all_groups(mine, parts.place), GroupStats.of_rows(rows)


def has_variance(group: ScoredGroup) -> bool:
    """Whether the rewards of a group differ, so that it has a gradient."""
    rewards = {score.reward for score in group.scores if not math.isnan(score.reward)}
    return len(rewards) > 1


def _generate(prompts: Sequence[Prompt], sampling: Sampling, parts: Parts) -> list[ScoredGroup]:
    """Generate and judge; verdicts and diversities are made while others are generated."""
    with parts.timers.phase("rollout"):
        for group in parts.engine.generate(prompts, sampling):
            parts.sync.check(group.weight_version)
            parts.verifier.submit(group)
            parts.statistician.submit(group)
    with parts.timers.phase("reward"):
        by_key = {scored.group.prompt.key: scored for scored in parts.verifier.results()}
    return [by_key[prompt.key] for prompt in prompts]

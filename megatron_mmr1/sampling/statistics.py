"""From a scored group to what a sampler may learn of its prompt."""

from __future__ import annotations

from megatron_mmr1.sampling.diversity import tds
from megatron_mmr1.types import PromptStats, ScoredGroup


def prompt_stats(scored: ScoredGroup) -> PromptStats:
    """Count the verdicts and measure the diversity (TDS, 1 = nothing shared) of one group."""
    outcomes = [score.verdict.outcome for score in scored.scores]
    return PromptStats(
        prompt_id=scored.group.prompt.prompt_id,
        num_correct=outcomes.count("correct"),
        num_judged=len(outcomes) - outcomes.count("could_not_judge"),
        diversity=tds([rollout.token_ids for rollout in scored.group.rollouts]),
    )

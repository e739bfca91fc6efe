"""Accuracy on held-out prompts: generate, judge, and count by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mmr1.data.loader import PromptView
from megatron_mmr1.rewards import VerifierPool
from megatron_mmr1.rollout.engine import RolloutEngine, Sampling
from megatron_mmr1.types import Outcome, ScoredGroup


@dataclass(frozen=True, slots=True)
class Judged:
    """One judged response."""

    category: str
    outcome: Outcome


def generate_and_judge(
    engine: RolloutEngine, verifier: VerifierPool, prompts: PromptView, sampling: Sampling
) -> list[ScoredGroup]:
    """Sample responses to every prompt and score them;
    verdicts are made while generation goes on.
    """
    for group in engine.generate(prompts, sampling):
        verifier.submit(group)
    by_key = {scored.group.prompt.key: scored for scored in verifier.results()}
    return [by_key[key] for key in prompts.keys]


def judged(groups: Sequence[ScoredGroup]) -> list[Judged]:
    """Reduce scored groups to what accuracy needs."""
    return [
        Judged(group.group.prompt.category, score.verdict.outcome)
        for group in groups
        for score in group.scores
    ]


def accuracy(responses: Sequence[Judged], name: str) -> dict[str, float]:
    """Return `name`: the share of correct among judged responses, and `name/CATEGORY` likewise.

    What could not be judged is in no denominator; it is counted under `name_unjudged`.
    """
    metrics = {name: _share_correct(responses)}
    for category in sorted({r.category for r in responses} - {""}):
        metrics[f"{name}/{category}"] = _share_correct(
            [r for r in responses if r.category == category]
        )
    unjudged = sum(r.outcome == "could_not_judge" for r in responses)
    return metrics | ({f"{name}_unjudged": float(unjudged)} if unjudged else {})


def _share_correct(responses: Sequence[Judged]) -> float:
    outcomes = [r.outcome for r in responses if r.outcome != "could_not_judge"]
    return outcomes.count("correct") / len(outcomes) if outcomes else float("nan")

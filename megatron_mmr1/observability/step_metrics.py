"""What a step's rollouts were worth, as sums that add over ranks,
and the metrics made of the sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mmr1.types import ScoredGroup


# Why nothing could be judged, by how a verdict's reason (rewards/) begins; the last is any other.
_BEGINNINGS = {"gold": ("empty gold", "gold is"), "deadline": ("deadline",), "judge": ("judge",)}
UNJUDGED_KINDS = (*_BEGINNINGS, "verifier")


def group_sums(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Count this rank's groups, responses, verdicts, tokens and rewards; the keys never vary."""
    sums = dict.fromkeys(
        [
            "groups", "mixed", "all_correct", "all_wrong",
            "responses", "judged", "correct", "well_formed", "truncated", "tokens", "reward",
            "repetition_penalty", "overlong_penalty",
            *(f"unjudged_{kind}" for kind in UNJUDGED_KINDS),
        ],
        0.0,
    )  # fmt: skip
    for group in groups:
        outcomes = [score.verdict.outcome for score in group.scores]
        correct, judged = (
            outcomes.count("correct"),
            len(outcomes) - outcomes.count("could_not_judge"),
        )
        sums["groups"] += 1
        sums["mixed"] += 0 < correct < judged
        sums["all_correct"] += 0 < correct == judged
        sums["all_wrong"] += correct == 0 < judged
        sums["responses"] += len(outcomes)
        sums["judged"] += judged
        sums["correct"] += correct
        sums["well_formed"] += sum(score.is_well_formed for score in group.scores)
        sums["reward"] += sum(s.reward for s in group.scores if not math.isnan(s.reward))
        sums["repetition_penalty"] += sum(s.repetition_penalty for s in group.scores)
        sums["overlong_penalty"] += sum(s.overlong_penalty for s in group.scores)
        for score in group.scores:
            if score.verdict.outcome == "could_not_judge":
                sums[f"unjudged_{_kind(score.verdict.reason)}"] += 1
        sums["truncated"] += sum(r.finish_reason == "length" for r in group.group.rollouts)
        sums["tokens"] += sum(len(r.token_ids) for r in group.group.rollouts)
    return sums


def group_metrics(sums: Mapping[str, float], rollout_s: float) -> dict[str, float]:
    """Make the logged metrics of all ranks' sums.

    Rewards and pass rates are over judged responses; what could not be judged is counted beside
    them, by kind: a broken gold, the deadline, the judge's failures, the verifier's own. Penalties
    are means over all responses, 0 where they are off.
    """
    judged, responses = max(sums["judged"], 1.0), max(sums["responses"], 1.0)
    groups = max(sums["groups"], 1.0)
    return {
        "reward/mean": sums["reward"] / judged,
        "reward/format_rate": sums["well_formed"] / responses,
        "groups/pass_rate": sums["correct"] / judged,
        "groups/mixed_rate": sums["mixed"] / groups,
        "groups/all_correct_rate": sums["all_correct"] / groups,
        "groups/all_wrong_rate": sums["all_wrong"] / groups,
        "reward/repetition_penalty": sums["repetition_penalty"] / responses,
        "reward/overlong_penalty": sums["overlong_penalty"] / responses,
        "verdicts/correct": sums["correct"],
        "verdicts/wrong": sums["judged"] - sums["correct"],
        "verdicts/could_not_judge": sums["responses"] - sums["judged"],
        **{f"verdicts/unjudged_{kind}": sums[f"unjudged_{kind}"] for kind in UNJUDGED_KINDS},
        "rollout/truncated_rate": sums["truncated"] / responses,
        "rollout/response_tokens_mean": sums["tokens"] / responses,
        "rollout/responses": sums["responses"],
        "rollout/tokens_per_s": sums["tokens"] / max(rollout_s, 1e-9),
    }


def _kind(reason: str) -> str:
    return next((k for k, starts in _BEGINNINGS.items() if reason.startswith(starts)), "verifier")

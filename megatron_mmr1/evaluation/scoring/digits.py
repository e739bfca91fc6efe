"""The embedded task: what the reward calls correct in training (rewards/accuracy.py), and no other
rule: strict and compat are one.
"""

from __future__ import annotations

from megatron_mmr1.evaluation.questions import Question, Score
from megatron_mmr1.rewards.accuracy import judge


def rule(answer: str, question: Question) -> Score:
    """Judge the box of a response; may never end on a hostile answer."""
    outcome, reason = judge(f"<answer>\\boxed{{{answer}}}</answer>", question.answer)
    return Score("unscored" if outcome == "could_not_judge" else outcome, reason)

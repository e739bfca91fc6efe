"""The scorers by name."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mmr1.evaluation.questions import Extracted, Question, Score, Scores
from megatron_mmr1.evaluation.scoring import (
    chartqa,
    digits,
    logicvista,
    mathverse,
    mathvision,
    mathvista,
)

Rule = Callable[[str, Question], Score]

# A benchmark's strict rule and its compat rule.
SCORERS: dict[str, tuple[Rule, Rule]] = {
    "mathverse": (mathverse.strict, mathverse.compat),
    "mathvista": (mathvista.strict, mathvista.compat),
    "mathvision": (mathvision.strict, mathvision.compat),
    "logicvista": (logicvista.strict, logicvista.compat),
    "chartqa": (chartqa.strict, chartqa.compat),
    "digits": (digits.rule, digits.rule),
}


def score(extracted: Extracted, question: Question) -> Scores:
    """Score one answer in this process, without a deadline; `score_all` has one.

    Without a box both are wrong: the prompt demanded it. (The kits would have a language model read
    an answer out of the prose.)
    """
    strict, compat = SCORERS[question.benchmark]
    missing = Score("wrong", "no boxed answer")
    return Scores(
        missing if extracted.strict is None else strict(extracted.strict, question),
        missing if extracted.compat is None else compat(extracted.compat, question),
    )

"""LogicVista (arXiv:2407.04973): a set of option letters, all of them and no other.

Strict: the answer consists of letters ("A, C", "AC", "A and C", "B. the dot") and they are the
gold's. One question's options are digits.

Compat: VLMEvalKit, whose judge turns a response into letters; the box stands for what the judge
writes. Its accidents: small letters count as no answer; a letter named twice counts twice; the one
digit gold can't be matched.
"""

from __future__ import annotations

from megatron_mmr1.evaluation.questions import Question, Score
from megatron_mmr1.evaluation.scoring.shared import as_score, letters


def strict(answer: str, question: Question) -> Score:
    """Score by the rule above."""
    found = letters(answer)
    if found is None:
        return Score("wrong", "not letters")
    return as_score(found == letters(question.answer), f"letters {''.join(sorted(found))}")


def compat(answer: str, question: Question) -> Score:
    """Score by VLMEvalKit's comparison of sorted letters."""
    found = "".join(answer.strip().split(", "))
    if not (found.isalpha() and found.isupper()):
        return Score("wrong", "not capital letters")
    gold = "".join(question.answer.split(", ")).upper()
    return as_score(sorted(found) == sorted(gold), f"letters {''.join(sorted(found))}")

r"""MathVerse (arXiv:2403.14624): letters exactly; free answers by rule where a rule can decide.

The benchmark's own evaluation asks a language model whether extracted answer and gold agree.
Followed: VLMEvalKit (`mathverse.py`), which skips the model where both are the same string.
lmms-eval asks the model about every response. Neither is run here, so what they would ask is
unscored, never wrong.

Strict: option letters are compared as a set (a few golds name two options; the other choice golds
are values, and compared like free answers). The prompt demanded a letter: an option's text is
wrong. Free answers: what the verifier finds equal is correct, and an answer without a unit may
leave out the gold's ("9\pi" for "Area $=9\pi\mathrm{cm}^2$"). Another number or tuple of numbers is
wrong. Where the gold has words, letters or a unit left, only a reader could say that an answer is
wrong: unscored.

Compat: the same string is correct, another letter wrong, the rest unscored.
"""

from __future__ import annotations

import re

from megatron_mmr1.evaluation.questions import Question, Score
from megatron_mmr1.evaluation.scoring.shared import as_score, letters, plain, verify

# Reasons of rewards/accuracy.py that no reader would overrule, if the gold has no letters.
_DECIDED = {"different numbers", "different constants", "different mathematics", "empty box"}
# "Area $=9 \\pi$", "$$r=7.00$$": the name of the quantity, which an answer need not repeat.
_NAME = re.compile(r"[A-Za-z. ]*\$*\s*[A-Za-z]?\s*=(?=[^=]+$)")
_UNIT = re.compile(
    r"(?<=[ }0-9])(?:square |cubic )?(?:units?|[mck]?m|met(?:er|re)s?|inches|feet|lit(?:er|re)s?)"
    r"\s*\$?\s*(?:\^\s*\{?\s*[23]\s*\}?)?\s*\$?$",
    re.IGNORECASE,
)


def strict(answer: str, question: Question) -> Score:
    """Score by the rule above; the verifier may never end."""
    gold_letters = letters(question.answer) if question.answer_type == "choice" else None
    if gold_letters is not None:
        found = letters(answer)
        if found is None:
            return Score("wrong", "not a letter")
        return as_score(found == gold_letters, f"letter {''.join(sorted(found))}")
    return _free(answer, plain(question.answer))


def compat(answer: str, question: Question) -> Score:
    """Score by VLMEvalKit's exact match of stripped strings."""
    answer, gold = answer.strip(), question.answer.strip()
    if answer == gold:
        return Score("correct", "same string")
    if not answer:
        return Score("wrong", "empty box")
    if question.answer_type == "choice" and len(answer) == len(gold) == 1 and answer.isalpha():
        return Score("wrong", "another letter")
    return Score("unscored", "the kit asks a language model")


def _free(answer: str, gold: str) -> Score:
    if plain(answer) == gold:
        return Score("correct", "equal")
    gold = _NAME.sub("", gold, count=1)
    if not _has_letters(answer):
        gold = _UNIT.sub("", gold)
    score = verify(answer, gold)
    if score.outcome == "wrong" and (score.reason not in _DECIDED or _has_letters(gold)):
        return Score("unscored", f"needs a reader: {score.reason}")
    return score


def _has_letters(text: str) -> bool:
    return bool(re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", plain(text))))

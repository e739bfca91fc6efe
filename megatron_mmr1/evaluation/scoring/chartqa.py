"""ChartQA (arXiv:2203.10244, section 5.1): numbers within 5% of the gold, else the same string.

Strict: a number is read with thousands separators, and percent and dollar signs are ignored on both
sides (a chart's "12%" is 12). Gold 0 asks for 0. Other answers: the same text, ignoring case and
LaTeX's text wrappers. As in every kit, years are numbers: 2011 is within 5% of 2010.

Compat: `relaxed_correctness` of pix2struct and Qwen-VL, which lmms-eval and VLMEvalKit run. Its
accidents: "12%" is 0.12, so it is wrong for gold 12 and right for gold 0.12; "1,234" and "$5" are
strings; gold 0 is compared as a string, so "0.0" is wrong; whatever Python's `float` reads is a
number ("1_000").
"""

from __future__ import annotations

from fractions import Fraction

from megatron_mmr1.evaluation.questions import Question, Score
from megatron_mmr1.evaluation.scoring.shared import as_score, plain
from megatron_mmr1.rewards.quantities import DOLLAR, PERCENT, read_quantity

_TOLERANCE = Fraction(5, 100)


def strict(answer: str, question: Question) -> Score:
    """Score by the rule above."""
    found, gold = _number(answer), _number(question.answer)
    if found is not None and gold is not None:
        return as_score(abs(found - gold) <= _TOLERANCE * abs(gold), "numbers within 5%")
    is_equal = plain(answer).lower() == plain(question.answer).lower()
    return as_score(is_equal, "text, ignoring case")


def compat(answer: str, question: Question) -> Score:
    """Score by the kits' relaxed correctness."""
    answer, gold = answer.strip(), question.answer
    found, target = _kit_float(answer), _kit_float(gold)
    if found is not None and target:
        is_close = abs(found - target) / abs(target) <= float(_TOLERANCE)
        return as_score(is_close, "numbers within 5%")
    return as_score(answer.lower() == gold.lower(), "strings, ignoring case")


def _number(text: str) -> Fraction | None:
    text = plain(text).lstrip("$")
    sign, digits = ("-", text[1:].lstrip("$")) if text.startswith("-") else ("", text)
    quantity = read_quantity(sign + digits)
    if quantity is None or quantity.unit not in (None, PERCENT, DOLLAR):
        return None
    return quantity.number


def _kit_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None

"""MathVista (arXiv:2310.02255): integer, float of a given precision, option, list.

Strict:
- option: the answer names one (its letter, its text, an equal value) and its text is the gold;
- integer: the same number, however it is written ("1,000", "5 cm");
- float: within half a unit of the gold's last decimal, both ends included;
- list: the same elements in the same order.

Compat: the benchmark's `normalize_extracted_answer` (`calculate_score.py`), the same in lmms-eval,
then equality of strings. Its accidents: `int(float(x))` cuts decimals off (3.7 is 3); "5 cm" and
"1,000" are no numbers; Python's `round` is binary (2.675 is 2.67); text that is no option counts as
the option nearest by edit distance, so that some wrong answers are correct and an empty box is the
shortest option; lists need the same spaces. VLMEvalKit differs: it compares whole letters, `int(x)`
and unrounded floats.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_mmr1.evaluation.questions import Question, Score
from megatron_mmr1.evaluation.scoring.shared import (
    as_score,
    edit_distance,
    numeric_value,
    pick_option,
    plain,
    verify,
)
from megatron_mmr1.rewards.quantities import read_quantity


def strict(answer: str, question: Question) -> Score:
    """Score by the rule above; the verifier may never end."""
    if question.answer_type == "choice":
        option, reason = pick_option(answer, question.choices)
        return as_score(option == question.answer, reason)
    if question.answer_type == "float":
        return _rounds_to(answer, question)
    if question.answer_type == "list":
        return as_score(_elements(answer) == _elements(question.answer), "element by element")
    return verify(answer, question.answer)


def compat(answer: str, question: Question) -> Score:
    """Score by the kit's normal form of the answer."""
    normal = _normal_form(answer, question)
    return as_score(normal == question.answer.strip(), f"normal form {normal!r}")


def _rounds_to(answer: str, question: Question) -> Score:
    """Compare numbers; 24% may stand for 24 and for 0.24."""
    half_unit = Fraction(1, 2 * 10 ** (question.precision or 0))
    gold = Fraction(question.answer)
    if quantity := read_quantity(plain(answer)):
        numbers = [quantity.number, quantity.value]
    else:
        value = numeric_value(plain(answer))
        if value is None or value in (float("inf"), float("-inf")) or value != value:
            return Score("wrong", "not a number")
        numbers = [Fraction(value)]
    is_close = any(abs(number - gold) <= half_unit for number in numbers)
    return as_score(is_close, f"to {question.precision} decimals")


def _elements(text: str) -> list[Fraction | str]:
    elements = [part.strip(" '\"") for part in plain(text).strip("[](){}\\ ").split(",")]
    quantities = [read_quantity(element) for element in elements]
    return [q.number if q else e.casefold() for q, e in zip(quantities, elements, strict=True)]


def _normal_form(answer: str, question: Question) -> str | None:
    if question.answer_type == "choice":
        text = answer.strip()
        if bracketed := re.search(r"\(([a-zA-Z])\)", text):
            text = bracketed[1].upper()
        if len(text) == 1 and 0 <= ord(text) - ord("A") < len(question.choices):
            return question.choices[ord(text) - ord("A")]
        return min(question.choices, key=lambda choice: edit_distance(text, choice))
    try:
        if question.answer_type == "integer":
            return str(int(float(answer)))
        if question.answer_type == "float":
            return str(round(float(answer), question.precision))
    except (ValueError, OverflowError):  # no number; infinity
        return None
    return answer.strip()

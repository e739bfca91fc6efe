r"""MathVision (arXiv:2402.14804): the option's letter or value; else an equal value.

Strict: an answer that names the gold's option (letter, text or an equal value) is correct. A free
answer is judged as the reward is; a gold that the verifier can't read is unscored.

Compat: the benchmark's own `is_equal`, which lmms-eval runs too: lower case; only what follows the
last "=" or `\approx` counts; degrees, percent signs, "units", "km" and "m^3" are dropped; equal as
strings to the letter or to the option's text, or equal as numbers rounded to 2 decimals (1/3 is
0.33, 2.004 is 2); what can't be computed is wrong. It passes LaTeX through latex2sympy2 and
Python's `eval`; here latex2sympy2_extended and sympy compute, which may read some rare LaTeX
differently. VLMEvalKit differs: numbers must agree within 1e-6, and an option's text goes through
the kit's guess of a letter.
"""

from __future__ import annotations

import re

from megatron_mmr1.evaluation.questions import Question, Score
from megatron_mmr1.evaluation.scoring.shared import as_score, numeric_value, pick_option, verify

# Removed in this order.
_DROPPED = (
    *("\\left", "\\right", "^{\\circ}", "^\\circ", "\\text", "\\mbox", "\\,", "\\!", "\\%", "\\$"),
    *("$", " ", "\n", "{m}^3", "m^3", "{units}", "units", "{km}", "km"),
)


def strict(answer: str, question: Question) -> Score:
    """Score by the rule above; the verifier may never end."""
    if not question.choices:
        return verify(answer, question.answer)
    option, reason = pick_option(answer, question.choices)
    return as_score(option == _gold_option(question), reason)


def compat(answer: str, question: Question) -> Score:
    """Score by the benchmark's `is_equal`; the numbers' computation may never end."""
    form = _answer_form(answer)
    golds = [question.answer, *([_gold_option(question)] if question.choices else [])]
    return as_score(any(_is_equal(gold, form) for gold in golds), f"normal form {form!r}")


def _gold_option(question: Question) -> str:
    return question.choices[ord(question.answer) - ord("A")]


def _answer_form(answer: str) -> str:
    text = answer.lower().rpartition("=")[2].rpartition("\\approx")[2]
    for dropped in _DROPPED:
        text = text.replace(dropped, "")
    text = re.sub(r"\\[td]frac", r"\\frac", text)
    text = re.sub(r"[({]([a-e])[)}]", r"\1", text)
    return text.rstrip(".").lstrip(":")


def _is_equal(gold: str, answer: str) -> bool:
    gold, answer = gold.lower().strip(), answer.strip()
    if not gold or not answer:
        return False
    if gold == answer or _tuple_form(gold) == _tuple_form(answer):
        return True
    values = numeric_value(gold), numeric_value(answer)
    if values[0] is None or values[1] is None:
        return False
    return round(values[0], 2) == round(values[1], 2)


def _tuple_form(text: str) -> str:
    """Round every element of a bracketed list; return anything else, and what fails, unchanged."""
    elements = text[1:-1].split(",")
    if (text[0], text[-1]) not in {("(", ")"), ("[", "]")} or len(elements) < 2:
        return text
    values = [numeric_value(element) for element in elements]
    if None in values:
        return text
    rounded = ",".join(str(round(value, 2)) for value in values if value is not None)
    return f"{text[0]}{rounded}{text[-1]}"

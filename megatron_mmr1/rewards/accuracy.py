r"""Is the boxed answer the gold answer? Correct, wrong, or could not judge: never mixed.

Both are brought to one spelling (text.py); then, in this order:

1. No box inside `<answer>` is wrong; an empty or broken gold can't be judged; equal is correct.
2. A gold that is an option asks for its letter, its text, or both (choices.py).
3. A unit that the gold lacks is ignored, and one that the answer lacks is supplied; another unit
   than the gold's is wrong (units.py). 50% is 0.5.
4. Numbers are compared exactly: 0.333 is not 1/3 (numbers.py).
5. What enumerates, hedges or explains where the gold doesn't ("1, 2, 3...", "5 or 6") is wrong.
6. Words are compared as text, without regard to case and surrounding punctuation.
7. Sets, tuples, intervals, vectors, matrices, equations and inequalities: part by part, brackets
   and relations told apart (structure.py).
8. Constants are compared by intervals of 60 digits (constants.py). Anything else is mathematics for
   math-verify, and what it calls equal must be so to 40 digits (mathematics.py). A
   gold that it can't read can't be judged; an answer that it can't read is wrong.

It imports no torch, because verifier workers import it. It sets no alarm: hard deadlines belong to
`pool.py`.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import TYPE_CHECKING

from megatron_mmr1.rewards import choices
from megatron_mmr1.rewards.constants import are_equal_constants
from megatron_mmr1.rewards.format import extract_answer
from megatron_mmr1.rewards.mathematics import compare_mathematics
from megatron_mmr1.rewards.numbers import read_number
from megatron_mmr1.rewards.structure import COMMAND, has_relation, why_not_one_answer
from megatron_mmr1.rewards.text import MAX_CHARACTERS, WORD_OPEN, is_balanced, normal_form, words
from megatron_mmr1.rewards.units import is_counted_thing, read_unit, split_unit

if TYPE_CHECKING:
    from megatron_mmr1.types import Outcome, Verdict

    Judgement = tuple[Outcome, str]

_ASSIGNED = re.compile(r"[a-zA-Z](?:_\w+|_\{\w+\})?\s*=\s*(?=[^=<>]+$)")
# What math-verify can't read, or reads too kindly: statements of geometry, reactions, ions, number
# bases, sets by a condition. Compared as they are written.
_NOTATION = re.compile(
    r"\\(?:cong|parallel|perp|sim|rightarrow|triangle|angle|mid)(?![a-z])"
    r"|[A-Z][a-z]?\^\{?[0-9]*[+-]\}?$|^[0-9A-F]+_\{?[0-9]+\}?$|^\\?\{\s*[a-z]\s*:"
)
_FORMULA = re.compile(r"(?=.*[0-9])(?:[A-Z][a-z]?(?:_?[0-9]+)?|[()]|\)_?[0-9]+)+")  # of chemistry


def score(response: str, gold: str) -> Verdict:
    """Judge a response against the gold answer, in this process and without a deadline.

    A hostile answer can take hours; `VerifierPool` bounds that. A response cut at the token limit
    is judged as it stands: it has no complete answer, so it is wrong.

    Args:
        response: the model's whole text, tags included.
        gold: the gold answer, bare (no box, no tags).
    """
    from megatron_mmr1.types import Verdict  # it imports torch, which a worker must not

    return Verdict(*judge(response, gold))


def judge(response: str, gold: str) -> Judgement:
    """Return the (outcome, reason) of a response; what `score` does, in plain values."""
    return judge_quickly(response, gold) or judge_mathematics(response, gold)


def judge_quickly(response: str, gold: str) -> Judgement | None:
    """Return the (outcome, reason) that needs no algebra, in microseconds, or None."""
    boxed = extract_answer(response)
    if boxed is None:
        return "wrong", "no boxed answer"
    gold_form = normal_form(gold)
    if not words(gold_form):
        return "could_not_judge", "empty gold"
    if not is_balanced(gold):
        return "could_not_judge", "gold is not mathematics"
    if len(boxed) > MAX_CHARACTERS:
        return "wrong", "too long"
    answer = normal_form(boxed)
    if not words(answer):
        return "wrong", "empty box"
    return _judge_forms(answer, gold_form)


def judge_mathematics(response: str, gold: str) -> Judgement:
    """Return the (outcome, reason) of what `judge_quickly` left; may never end."""
    gold_form, answer = normal_form(gold), normal_form(extract_answer(response) or "")
    answer = _without_name(answer, gold_form)
    (gold_form, gold_unit), (answer, unit) = split_unit(gold_form), split_unit(answer)
    scale = (_scale(unit), _scale(gold_unit))
    return compare_mathematics(answer, gold_form, scale)


def _judge_forms(answer: str, gold: str) -> Judgement | None:
    if words(answer) == words(gold):
        return "correct", "equal"
    if (judged := _judge_choice(answer, gold)) is not None:
        return judged
    answer = _without_name(answer, gold)
    return _judge_quantity(answer, gold)


def _judge_choice(answer: str, gold: str) -> Judgement | None:
    """Rule 2; None: the gold is no option."""
    if letters := choices.gold_letters(gold):
        is_equal = choices.answer_letters(answer) == letters
        return ("correct", "equal letters") if is_equal else ("wrong", "different letters")
    if (letters := choices.run_of_letters(gold)) and (mine := choices.answer_letters(answer)):
        return ("correct", "equal letters") if mine == letters else ("wrong", "different letters")
    option = choices.gold_option(gold)
    if option is None:
        return None
    if (letter := choices.answer_letter(answer)) is not None:
        is_equal = letter == option.letter
        return ("correct", "equal letter") if is_equal else ("wrong", "different letter")
    both = choices.answer_option(answer)
    if not option.text:
        is_equal = both and both.letter == option.letter and not choices.has_other_letter(both.text)
        return ("correct", "equal letter") if is_equal else ("wrong", "not the letter")
    text = answer
    if both:
        if both.letter != option.letter:
            return "wrong", "different letter"
        text = normal_form(both.text)
    judged = _judge_forms(text, normal_form(option.text))
    return judged or compare_mathematics(text, normal_form(option.text), (1, 1))


def _judge_quantity(answer: str, gold: str) -> Judgement | None:
    """Rules 3 to 6, and 7 where the parts are easy."""
    (answer_value, answer_tail), (gold_value, gold_tail) = split_unit(answer), split_unit(gold)
    unit, gold_unit = read_unit(answer_tail), read_unit(gold_tail)
    is_measured = bool(gold_unit) or not gold_tail
    if gold_unit and answer_tail.startswith(WORD_OPEN) and not unit:
        return "wrong", "another unit"
    if answer_tail and not unit and not is_counted_thing(answer_tail):
        answer_value, answer_tail = answer, ""
    if is_measured and (number := read_number(answer_value)) is not None:
        gold_number = read_number(gold_value)
        if gold_number is not None:
            if unit and gold_unit and unit != gold_unit:
                return "wrong", "another unit"
            if answer_tail and not unit and gold_unit:
                return "wrong", "another unit"
            return _compare_numbers(number, unit, gold_number, gold_unit)
    if unit and gold_unit and unit != gold_unit:
        return "wrong", "another unit"
    if _NOTATION.search(gold):
        is_equal = _without_spaces(answer) == _without_spaces(gold)
        return ("correct", "equal notation") if is_equal else ("wrong", "different notation")
    if _is_text(gold):
        is_equal = _as_text(answer) == _as_text(gold)
        return ("correct", "equal text") if is_equal else ("wrong", "different text")
    if _is_same_formula(answer, gold):
        return "correct", "equal notation"
    if refusal := why_not_one_answer(answer_value, gold_value):
        return "wrong", refusal
    scale = (_scale(answer_tail), _scale(gold_tail))
    is_equal = are_equal_constants(answer_value, gold_value, scale)
    if is_equal is None:
        return None
    return ("correct", "equal constants") if is_equal else ("wrong", "different constants")


def _compare_numbers(
    number: Fraction, unit: object, gold_number: Fraction, gold_unit: object
) -> Judgement:
    is_percent, is_gold_percent = unit == _PERCENT, gold_unit == _PERCENT
    values = number / (100 if is_percent else 1), gold_number / (100 if is_gold_percent else 1)
    is_sign_ignored = is_percent and not gold_unit and number == gold_number
    if values[0] == values[1] or is_sign_ignored:
        return "correct", "equal numbers"
    return "wrong", "different numbers"


_PERCENT = (("%", 1),)


def _scale(unit: str) -> int:
    return 100 if read_unit(unit) == _PERCENT else 1


def _is_text(gold: str) -> bool:
    """Whether a gold is words: a run of letters that is no command, no unit and no product."""
    plain = COMMAND.sub(" ", words(gold))
    if re.search(r"[\\^_{}=<>]", words(gold).replace(r"^\circ", "")):
        return False
    is_foreign = any(c.isalpha() and ord(c) > 0xBF and not 0x3B1 <= ord(c) <= 0x3C9 for c in plain)
    return (
        is_foreign
        or bool(re.search(r"[^\W\d_]{3,}|\b(?:or|to|is|no)\b", plain))
        or (bool(re.fullmatch(r"[A-Za-z() '-]+", plain)))
    )


def _without_spaces(text: str) -> str:
    plain = re.sub(r"\{([0-9]+[+-]?|[+-])\}", r"\1", words(text))
    return re.sub(r"\s", "", re.sub(r"\\mid(?![a-z])", ":", plain))


def _is_same_formula(answer: str, gold: str) -> bool:
    """H2O is H_2O."""
    plain, gold_plain = _without_spaces(answer), _without_spaces(gold)
    return bool(_FORMULA.fullmatch(gold_plain)) and plain.replace("_", "") == gold_plain.replace(
        "_", ""
    )


def _as_text(text: str) -> str:
    """Case, accents' encoding, spaces and what surrounds a word don't matter."""
    plain = " ".join(unicodedata.normalize("NFC", words(text)).casefold().split())
    start, stop = 0, len(plain)
    while start < stop and not plain[start].isalnum():
        start += 1
    while stop > start and not plain[stop - 1].isalnum():
        stop -= 1
    return plain[start:stop]


def _without_name(answer: str, gold: str) -> str:
    """Drop "x =" where the gold has no equation."""
    if not has_relation(gold) and (name := _ASSIGNED.match(answer)):
        return answer[name.end() :].strip()
    return answer

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
   and relations told apart.
8. Anything else is mathematics for math-verify, and what it calls equal must be so to 50 digits. A
   gold that it can't read can't be judged; an answer that it can't read is wrong.

It imports no torch, because verifier workers import it. It sets no alarm: hard deadlines belong to
`pool.py`.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from megatron_mmr1.rewards import choices
from megatron_mmr1.rewards.format import extract_answer
from megatron_mmr1.rewards.numbers import read_number
from megatron_mmr1.rewards.text import (
    MAX_CHARACTERS,
    WORD_OPEN,
    is_balanced,
    normal_form,
    split,
    words,
)
from megatron_mmr1.rewards.units import is_counted_thing, read_unit, split_unit

if TYPE_CHECKING:
    from megatron_mmr1.types import Outcome, Verdict

    Judgement = tuple[Outcome, str]

_COMMAND = re.compile(r"\\[a-zA-Z]+")
_LONG_WORD = re.compile(r"[^\W\d_]{3,}|\b(?:or|to|is|no|by|as)\b")
_SEVERAL = re.compile(r"(?<!_[0-9])(?<=[0-9]) (?=[0-9])|[,;…]|\.\.\.|\\(?:ldots|pm|mp|lor|vee)\b")
_ASSIGNED = re.compile(r"[a-zA-Z](?:_\w+|_\{\w+\})?\s*=\s*(?=[^=<>]+$)")
_RELATION = re.compile(r"<=|>=|!=|\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<|>|=")
_ONE_RELATION = {"<=": r"\le", ">=": r"\ge", "!=": r"\ne"}
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}
# What math-verify can't read, or reads too kindly: statements of geometry, reactions, ions, number
# bases, sets by a condition. Compared as they are written.
_NOTATION = re.compile(
    r"\\(?:cong|parallel|perp|sim|rightarrow|triangle|angle|mid)(?![a-z])"
    r"|[A-Z][a-z]?\^\{?[0-9]*[+-]\}?$|^[0-9A-F]+_\{?[0-9]+\}?$|^\\?\{\s*[a-z]\s*:"
)
_JOINT = re.compile(r"\band\b|\bor\b")
_MATRIX = re.compile(r"\\begin\{([a-z]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)


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
    return _compare_mathematics(answer, gold_form, scale)


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
    return judged or _compare_mathematics(text, normal_form(option.text), (1, 1))


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
    if refusal := _refuse(answer_value, gold_value):
        return refusal
    return None


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


def _refuse(answer: str, gold: str) -> Judgement | None:
    """Rule 5."""
    outside = " ".join(split(answer)) if answer[:1] in "([{\\" else answer
    extra = set(_SEVERAL.findall(outside)) - set(_SEVERAL.findall(gold))
    if extra and not (_is_bracketed(answer) and _is_bracketed(gold)):
        return "wrong", "several answers"
    if _LONG_WORD.search(_COMMAND.sub(" ", words(answer))) and not _LONG_WORD.search(
        _COMMAND.sub(" ", words(gold))
    ):
        return "wrong", "words, not mathematics"
    return None


def _is_text(gold: str) -> bool:
    """Whether a gold is words: a run of letters that is no command, no unit and no product."""
    plain = _COMMAND.sub(" ", words(gold))
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
    return re.sub(r"\\mid(?![a-z])", ":", re.sub(r"\s", "", plain))


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
    if not _RELATION.search(gold) and (name := _ASSIGNED.match(answer)):
        return answer[name.end() :].strip()
    return answer


def _compare_mathematics(answer: str, gold: str, scale: tuple[int, int]) -> Judgement:
    """Rules 7 and 8.

    Args:
        scale: what answer and gold are divided by (percent).
    """
    gold_values = _read(gold)
    if gold_values is None:
        return "could_not_judge", "gold is not mathematics"
    if refusal := _refuse(answer, gold):
        return refusal
    try:
        is_equal = _is_equal(answer, gold, scale)
    except _UnreadableError:
        return "wrong", "answer is not mathematics"
    except Exception as error:  # sympy's own failures, of any type: our lack, not the model's
        return "could_not_judge", f"verifier failed: {type(error).__name__}"
    return ("correct", "equal mathematics") if is_equal else ("wrong", "different mathematics")


class _UnreadableError(ValueError):
    """An answer, or a part of it, that is no mathematics."""


def _is_bracketed(text: str) -> bool:
    return bool(_brackets(text))


def _brackets(text: str) -> tuple[str, str, str] | None:
    """Return (opening, inside, closing) of a set, tuple, interval or vector; None if it is none."""
    text = text.strip().replace(r"\langle", "(").replace(r"\rangle", ")")
    text = text.replace(r"\{", "{").replace(r"\}", "}")
    if len(text) < 2 or text[0] not in "([{" or text[-1] not in ")]}":
        return None
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and place < len(text) - 1:
            return None
    inside = text[1:-1]
    is_set = text[0] == "{"
    return (text[0], inside, text[-1]) if is_set or len(split(inside)) > 1 else None


def _parts(text: str) -> tuple[str, list[str], bool] | None:
    """Return (kind, parts, whether their order counts) of what is made of parts."""
    if r"\cup" in text:
        return "union", [part.strip() for part in text.split(r"\cup")], False
    if match := _MATRIX.fullmatch(text.strip()):
        rows = [row for row in match.group(2).strip().split("\\\\") if row.strip()]
        cells = [cell.strip() for row in rows for cell in row.split("&")]
        kind = "determinant" if match.group(1) == "v" else "matrix"
        return f"{kind} of {len(rows)} rows", cells, True
    if found := _brackets(text):
        opening, inside, closing = found
        return opening + closing, split(inside) if inside.strip() else [], opening != "{"
    plain = re.sub(r"\s*(?:\band\b|\bor\b|\\lor\b|\\vee\b)\s*", ",", words(text))
    if len(pieces := split(plain)) > 1:
        return "several", pieces, False
    return None


def _are_joined_otherwise(answer: str, gold: str) -> bool:
    """Whether one says "and" where the other says "or" between inequalities."""
    if not re.search(r"[<>]|\\[lg]e(?![a-z])", gold):
        return False
    joints = [set(_JOINT.findall(words(text))) for text in (answer, gold)]
    return bool(joints[0]) and bool(joints[1]) and joints[0] != joints[1]


def _relations(text: str) -> tuple[list[str], list[str]] | None:
    """Return (sides, relations) of an equation, an inequality or a chain of them."""
    found = [_ONE_RELATION.get(r.group(), r.group()) for r in _RELATION.finditer(text)]
    return ([side.strip() for side in _RELATION.split(text)], found) if found else None


def _is_equal(answer: str, gold: str, scale: tuple[int, int] = (1, 1)) -> bool:
    """Compare part by part; raises `_UnreadableError` for an answer that is no mathematics."""
    parts, gold_parts = _parts(answer), _parts(gold)
    if parts or gold_parts:
        if not parts or not gold_parts:
            return False
        (kind, mine, is_ordered), (gold_kind, theirs, _) = parts, gold_parts
        if kind != gold_kind or len(mine) != len(theirs) or _are_joined_otherwise(answer, gold):
            return False
        return _are_equal(mine, theirs, is_ordered)
    relations, gold_relations = _relations(answer), _relations(gold)
    if relations or gold_relations:
        if not relations or not gold_relations:
            return False
        return _are_equal_relations(relations, gold_relations) or (
            relations[1] == gold_relations[1] == ["="] and _verify(answer, gold)
        )
    numbers = read_number(answer), read_number(gold)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] / scale[0] == numbers[1] / scale[1]
    return _verify(answer, gold, scale)


def _are_equal(mine: list[str], theirs: list[str], is_ordered: bool) -> bool:
    if is_ordered:
        return all(_is_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    left = list(theirs)
    for a in mine:
        place = next((i for i, b in enumerate(left) if a == b or _is_equal(a, b)), None)
        if place is None:
            return False
        del left[place]
    return True


def _are_equal_relations(
    mine: tuple[list[str], list[str]], theirs: tuple[list[str], list[str]]
) -> bool:
    """Whether a chain is another, read forwards or backwards."""
    sides, relations = mine
    backwards = sides[::-1], [_FLIPPED[r] for r in relations[::-1]]
    return any(
        r == theirs[1] and all(_is_equal(a, b) for a, b in zip(s, theirs[0], strict=True))
        for s, r in (mine, backwards)
    )


def _verify(answer: str, gold: str, scale: tuple[int, int] = (1, 1)) -> bool:
    """Rule 8, on two single expressions."""
    answer_value, gold_value = _parse(answer), _parse(gold)
    if answer_value is None:
        raise _UnreadableError(answer)
    if gold_value is None:
        return False
    if scale != (1, 1):
        answer_value, gold_value = answer_value / scale[0], gold_value / scale[1]

    from math_verify import verify

    return verify(
        gold_value, answer_value, strict=True, timeout_seconds=None, raise_on_error=True
    ) and _is_exact(gold_value, answer_value)


def _read(gold: str) -> bool | None:
    """Whether every part of a gold is mathematics; None: it isn't."""
    if found := _parts(gold):
        return True if all(_read(part) for part in found[1]) else None
    if found := _relations(gold):
        return True if all(_read(side) for side in found[0]) else None
    if read_number(gold) is not None:
        return True
    return True if _parse(gold) is not None else None


def _parse(text: str) -> Any:
    """Return the one sympy object that the whole of `text` denotes, or None."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # No fallback to a part of the text: it would credit "15" for "5".
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)
    if WORD_OPEN in text or "$" in text or _LONG_WORD.search(_COMMAND.sub(" ", text)):
        return None
    found = parse(
        f"${_in_radians(text)}$",
        [config],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=0,  # no signal.alarm
    )
    return found[0] if len(found) == 1 else None


def _in_radians(text: str) -> str:
    """Degrees inside an expression, as in a sine, are pi/180 each."""
    return re.sub(r"([0-9.]+)\s*\^\s*\{?\s*\\circ\s*\}?", r"(\1 \\cdot \\frac{\\pi}{180})", text)


def _is_exact(gold: Any, answer: Any) -> bool:
    """Refuse what math-verify's rounding lets through: 2e-8 is not 1e-8, 1.41421356 no root."""
    from sympy import Expr, nsimplify

    are_numbers = all(isinstance(side, Expr) and side.is_number for side in (gold, answer))
    if not are_numbers or gold == answer:
        return True
    gold, answer = (nsimplify(side, rational=True) for side in (gold, answer))
    scale = max(abs(gold.evalf(60)), abs(answer.evalf(60)))
    return bool(abs((gold - answer).evalf(60)) <= Fraction(1, 10**40) * scale)

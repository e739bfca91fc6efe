"""Whether two normal forms are the same mathematics: part by part, then by math-verify.

Rules 7 and 8 of `accuracy.py`. Only workers run what is here: nothing bounds the time of sympy.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from megatron_mmr1.rewards.numbers import read_number
from megatron_mmr1.rewards.structure import (
    are_joined_otherwise,
    has_words,
    parts,
    relations,
    why_not_one_answer,
)
from megatron_mmr1.rewards.text import WORD_OPEN

if TYPE_CHECKING:
    from megatron_mmr1.types import Outcome

_DIGITS = 30  # at which two expressions are looked at before anything is simplified
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}


def compare_mathematics(answer: str, gold: str, scale: tuple[int, int]) -> tuple[Outcome, str]:
    """Return the (outcome, reason) of two normal forms; may never end.

    Args:
        scale: what answer and gold are divided by (percent).
    """
    if not _is_readable(gold):
        return "could_not_judge", "gold is not mathematics"
    if refusal := why_not_one_answer(answer, gold):
        return "wrong", refusal
    try:
        is_equal = _is_equal(answer, gold, scale)
    except _UnreadableError:
        return "wrong", "answer is not mathematics"
    except Exception as error:  # sympy's own failures, of any type: our lack, not the model's
        return "could_not_judge", f"verifier failed: {type(error).__name__}"
    return ("correct", "equal mathematics") if is_equal else ("wrong", "different mathematics")


class _UnreadableError(ValueError):
    """An answer, or a part of it, that is no mathematics."""


def _is_equal(answer: str, gold: str, scale: tuple[int, int] = (1, 1)) -> bool:
    """Compare part by part; raises `_UnreadableError` for an answer that is no mathematics."""
    made, gold_made = parts(answer), parts(gold)
    if made or gold_made:
        if not made or not gold_made:
            return False
        (kind, mine, is_ordered), (gold_kind, theirs, _) = made, gold_made
        if kind != gold_kind or len(mine) != len(theirs) or are_joined_otherwise(answer, gold):
            return False
        return _are_equal(mine, theirs, is_ordered)
    chain, gold_chain = relations(answer), relations(gold)
    if chain or gold_chain:
        if not chain or not gold_chain:
            return False
        return _are_equal_chains(chain, gold_chain) or (
            chain[1] == gold_chain[1] == ["="] and _verify(answer, gold)
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


def _are_equal_chains(
    mine: tuple[list[str], list[str]], theirs: tuple[list[str], list[str]]
) -> bool:
    """Whether a chain is another, read forwards or backwards."""
    sides, signs = mine
    backwards = sides[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
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

    if _differ_somewhere(answer_value, gold_value):
        return False

    from math_verify import verify

    return verify(
        gold_value, answer_value, strict=True, timeout_seconds=None, raise_on_error=True
    ) and _is_exact(gold_value, answer_value)


def _is_readable(gold: str) -> bool:
    """Whether every part of a gold is mathematics."""
    if found := parts(gold):
        return all(_is_readable(part) for part in found[1])
    if found := relations(gold):
        return all(_is_readable(side) for side in found[0])
    return read_number(gold) is not None or _parse(gold) is not None


@lru_cache(maxsize=4096)  # a group's responses share their gold, and often their answer
def _parse(text: str) -> Any:
    """Return the one sympy object that the whole of `text` denotes, or None."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # No fallback to a part of the text: it would credit "15" for "5".
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)
    if WORD_OPEN in text or "$" in text or has_words(text):
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


def _differ_somewhere(first: Any, second: Any) -> bool:
    """Whether two expressions differ at a point with positive coordinates: then they aren't equal.

    Saves sympy's simplification, which takes longest where nothing cancels.
    """
    from sympy import Expr, Rational

    if not (isinstance(first, Expr) and isinstance(second, Expr)):
        return False
    symbols = first.free_symbols | second.free_symbols
    if not symbols:
        return False
    names = sorted({str(symbol) for symbol in symbols})
    place = {name: Rational(7 * i + 11, 3 * i + 8) for i, name in enumerate(names)}
    point: dict[Any, Any] = {symbol: place[str(symbol)] for symbol in symbols}
    values = [side.evalf(_DIGITS, subs=point) for side in (first, second)]
    if not all(value.is_Float or value.is_Rational for value in values):
        return False  # complex, undefined, or an unknown function
    difference = abs(values[0] - values[1])
    return bool(difference > Rational(1, 10 ** (_DIGITS // 2)) * max(map(abs, values)))

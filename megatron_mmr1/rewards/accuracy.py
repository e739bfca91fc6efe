r"""Is the boxed answer the gold answer? Correct, wrong, or could not judge: never mixed.

Rules, in this order. A guard only ever refuses: an error of ours costs credit, never gives it.

1. No box inside `<answer>` is wrong; an empty gold can't be judged; equal strings are correct.
2. Numbers ("1,234.5", "50%" = 0.5, "5 cm") are compared exactly. A unit (or percent sign) that the
   gold lacks is ignored; another unit than the gold's is wrong. Only units listed here are units.
3. A gold of words or letters is compared as text, without regard to case.
4. What enumerates, hedges or explains where the gold doesn't ("1, 2, 3...", "5 or 6", "4 = 5") is
   wrong.
5. Anything else is mathematics for math-verify: a gold that it can't read can't be judged; an
   answer that it can't read is wrong.

It imports no torch, because verifier workers import it. It sets no alarm: hard deadlines belong to
`pool.py`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_mmr1.rewards.format import extract_answer

if TYPE_CHECKING:
    from megatron_mmr1.types import Outcome, Verdict

# One unit a line: its name, other spellings. A single letter counts after a space only: "5 m".
_UNIT_NAMES = (
    "mm millimeter millimeters",
    "cm centimeter centimeters",
    "m meter meters",
    "km kilometer kilometers",
    "in inch inches",
    "ft foot feet",
    "mg milligram milligrams",
    "g gram grams",
    "kg kilogram kilograms",
    "ml mL milliliter milliliters",
    "l L liter liters",
    "ms milliseconds",
    "s sec second seconds",
    "min minute minutes",
    "h hr hour hours",
    "day days",
    "dollar dollars",
    "° \\circ ^\\circ ^{\\circ} degree degrees",
)
_UNITS = {name: names.split()[0] for names in _UNIT_NAMES for name in names.split()}

_LONG = "|".join(re.escape(name) for name in _UNITS if len(name) > 1 or name == "°")
_SHORT = "|".join(name for name in _UNITS if len(name) == 1 and name != "°")
_QUANTITY = re.compile(
    r"(?P<number>[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+))"
    rf"(?:\s*(?P<percent>%)|(?:\s*(?P<long>{_LONG})|\s+(?P<short>{_SHORT}))"
    r"\s*(?P<power>\^\{?[23]\}?)?)?"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORDS = re.compile(r"[a-zA-Z]{3,}|\b(?:or|to|is|no|by|as)\b")
_TEXT_GOLD = re.compile(
    r"[A-Za-z() '-]+|[^\\^_{}=]*(?:[a-zA-Z]{3,}|\b(?:or|to|is|no)\b)[^\\^_{}=]*"
)
_ASSIGNED = re.compile(r"[a-zA-Z](?:_\w+|_\{\w+\})?\s*=\s*(?=[^=]+$)")
_SEVERAL = re.compile(r"(?<=[0-9]) (?=[0-9])|[,;=…]|\.\.\.|\\(?:[lc]?dots|pm|mp|lor|vee)")


class Quantity(NamedTuple):
    """A plain number with an optional unit; a percent sign is the unit "%"."""

    number: Fraction  # as written: 50 for "50%"
    unit: str | None

    @property
    def value(self) -> Fraction:
        """What it denotes: 1/2 for "50%"."""
        return self.number / 100 if self.unit == "%" else self.number


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


def judge(response: str, gold: str) -> tuple[Outcome, str]:
    """Return the (outcome, reason) of a response; what `score` does, in plain values."""
    return judge_quickly(response, gold) or judge_mathematics(response, gold)


def judge_quickly(response: str, gold: str) -> tuple[Outcome, str] | None:
    """Return the (outcome, reason) that rules 1 to 4 give, in microseconds, or None."""
    boxed = extract_answer(response)
    if boxed is None:
        return "wrong", "no boxed answer"
    answer, gold = clean(boxed), clean(gold)
    if not gold:
        return "could_not_judge", "empty gold"
    if answer == gold:
        return "correct", "equal"
    if not answer:
        return "wrong", "empty box"

    gold_quantity, quantity = read_quantity(gold), read_quantity(_without_name(answer, gold))
    if gold_quantity and quantity:
        return _compare(quantity, gold_quantity)
    if _TEXT_GOLD.fullmatch(gold) and not gold_quantity:
        equal = _as_text(answer) == _as_text(gold)
        return ("correct", "equal text") if equal else ("wrong", "different text")

    # Whether any other gold is sound only math-verify can say; a broken one must not make "wrong".
    return _refuse(_without_name(answer, gold), gold) if gold_quantity else None


def judge_mathematics(response: str, gold: str) -> tuple[Outcome, str]:
    """Return the (outcome, reason) of rule 5, for what `judge_quickly` left; may never end."""
    gold = clean(gold)
    answer = _without_name(clean(extract_answer(response) or ""), gold)
    gold_value = _parse(gold)
    if gold_value is None:
        return "could_not_judge", "gold is not mathematics"
    if refusal := _refuse(answer, gold):
        return refusal
    answer_value = _parse(answer)
    if answer_value is None:
        return "wrong", "answer is not mathematics"

    from math_verify import verify

    try:
        is_equal = verify(
            gold_value, answer_value, strict=True, timeout_seconds=None, raise_on_error=True
        ) and _is_close(gold_value, answer_value)
    except Exception as error:  # sympy's own failures, of any type: our lack, not the model's
        return "could_not_judge", f"verifier failed: {type(error).__name__}"
    return ("correct", "equal mathematics") if is_equal else ("wrong", "different mathematics")


def _refuse(answer: str, gold: str) -> tuple[Outcome, str] | None:
    """Rule 4."""
    if set(_SEVERAL.findall(answer)) - set(_SEVERAL.findall(gold)):
        return "wrong", "several answers"
    if _WORDS.search(_COMMAND.sub(" ", answer)):
        return "wrong", "words, not mathematics"
    return None


def clean(text: str) -> str:
    """Undo LaTeX's wrapping and spacing, which never carry a value."""
    text = text.replace("\\$", "").strip().removesuffix(".").strip("$ \n\t")
    text = re.sub(r"(?<=[0-9])\\,([0-9]{3})(?![0-9])", r"\1", text)  # 1\,234 is 1234
    text = re.sub(r"\\[,;: ]", " ", text.replace("\\!", "").replace("{,}", ","))
    text = _WRAPPED.sub(r" \1 ", text.replace("\\%", "%"))
    return " ".join(text.split())


def _without_name(answer: str, gold: str) -> str:
    """Drop "x =" where the gold has no equation."""
    if "=" not in gold and (name := _ASSIGNED.match(answer)):
        return answer[name.end() :]
    return answer


def _as_text(text: str) -> str:
    return text.casefold().strip(" ().")


def read_quantity(text: str) -> Quantity | None:
    """Read a plain number with an optional unit or percent sign; None for anything else."""
    match = _QUANTITY.fullmatch(text)
    if match is None or len(match["number"]) > 1000:  # int() refuses 4300 digits
        return None
    unit = match["percent"]
    if name := match["long"] or match["short"]:
        unit = _UNITS[name] + (match["power"] or "").strip("^{}")
    return Quantity(Fraction(match["number"].replace(",", "")), unit)


def _compare(answer: Quantity, gold: Quantity) -> tuple[Outcome, str]:
    if answer.unit and gold.unit and answer.unit != gold.unit:
        return "wrong", "another unit"
    is_percent_ignored = gold.unit is None and answer.number == gold.number
    if answer.value == gold.value or is_percent_ignored:
        return "correct", "equal numbers"
    return "wrong", "different numbers"


def _parse(text: str) -> Any:
    """Return the one sympy object that the whole of `text` denotes, or None."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units are ours (rule 2). No fallback to a part of the text: it would credit "15" for "5".
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)
    quantity = read_quantity(text)
    if quantity and quantity.unit:  # two quantities were compared before, units and all
        text = str(quantity.value)
    if "$" in text or _WORDS.search(_COMMAND.sub(" ", text)):
        return None
    found = parse(
        f"${text}$",
        [config],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=0,  # no signal.alarm
    )
    return found[0] if len(found) == 1 else None


def _is_close(gold: Any, answer: Any) -> bool:
    """Refuse what math-verify's rounding to 6 decimals lets through: 2e-8 is not 1e-8."""
    from sympy import Expr

    are_numbers = all(isinstance(side, Expr) and side.is_number for side in (gold, answer))
    if not are_numbers or gold == answer:
        return True
    scale = max(abs(gold.evalf()), abs(answer.evalf()))
    return bool(abs((gold - answer).evalf()) <= 1e-5 * scale)

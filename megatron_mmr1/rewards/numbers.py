"""Plain numbers as exact fractions: decimals, fractions, mixed and repeating, powers of ten."""

from __future__ import annotations

import re
from fractions import Fraction

_MAX_DIGITS, _MAX_EXPONENT = 4000, 1000  # int() refuses 4,300 digits
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?"
_PLAIN = re.compile(_DECIMAL)
_FRACTION = re.compile(
    r"(?:(?P<whole>[0-9]+)\s*(?= |\\))?\s*"
    r"(?:(?P<top>[0-9]+)\s*/\s*(?P<bottom>[0-9]+)"
    r"|\\frac\s*(?:\{(?P<a>-?[0-9.]+)\}|(?P<c>[0-9]))\s*(?:\{(?P<b>[0-9.]+)\}|(?P<d>[0-9])))"
)
_REPEATING = re.compile(
    r"(?P<whole>[0-9]*)\.(?P<fixed>[0-9]*)"
    r"(?:\\(?:overline|bar)\s*(?:\{(?P<many>[0-9]+)\}|(?P<one>[0-9]))|\\dot\s*\{?(?P<dot>[0-9])\}?)"
)
_SCIENTIFIC = re.compile(
    rf"(?P<factor>{_DECIMAL})\s*(?:[eE]\s*(?P<e>[+-]?[0-9]+)"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<p>[+-]?[0-9]+)\s*\}|(?P<q>[+-]?[0-9])))"
)


def read_number(text: str) -> Fraction | None:
    """Read a number that stands alone; None for anything else, and for one that is too long.

    Args:
        text: in normal form, without a unit.
    """
    text = text.strip()
    sign = 1
    if text[:1] in ("+", "-"):
        sign, text = (-1 if text[0] == "-" else 1), text[1:].strip()
    if not text or len(text) > _MAX_DIGITS or not any(c.isdigit() for c in text):
        return None
    found = _read(text)
    return None if found is None else sign * found


def _read(text: str) -> Fraction | None:
    if _PLAIN.fullmatch(text):
        return _decimal(text)
    if match := _FRACTION.fullmatch(text):
        whole = int(match["whole"] or 0)
        top = match["top"] or match["a"] or match["c"]
        bottom = match["bottom"] or match["b"] or match["d"]
        if match["whole"] and not (top.isdigit() and bottom.isdigit()):
            return None
        try:
            return whole + Fraction(top) / Fraction(bottom)
        except (ValueError, ZeroDivisionError):
            return None
    if match := _REPEATING.fullmatch(text):
        repeated = match["many"] or match["one"] or match["dot"]
        fixed = match["fixed"]
        head = Fraction(int((match["whole"] or "0") + fixed), 10 ** len(fixed))
        return head + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
    if match := _SCIENTIFIC.fullmatch(text):
        exponent = int(match["e"] or match["p"] or match["q"])
        if not match["factor"] or abs(exponent) > _MAX_EXPONENT:
            return None
        return _decimal(match["factor"]) * Fraction(10) ** exponent
    return None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))

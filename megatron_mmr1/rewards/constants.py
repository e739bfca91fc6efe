r"""Constants such as `12\pi` and `\frac{3\sqrt{2}}{2}`, compared by intervals around their values.

A small reader of its own, for what needs no algebra: numbers, the four operations, powers, roots
and pi. Two constants whose intervals are apart differ, which is exact. Two whose intervals of 60
digits overlap, and are narrow, are taken as equal: with numbers as short, and products as far from
0 and infinity, as are read here no different ones come that close. What is ambiguous (`1/2\pi`, or
`2\frac{1}{2}`, a mixed number) or large is left to math-verify.
"""

from __future__ import annotations

import re
from typing import Any

from mpmath.ctx_iv import MPIntervalContext

_MAX_CHARACTERS, _MAX_DIGITS, _MAX_EXPONENT, _MAX_DEPTH = 120, 12, 30, 12
_MAX_SIZE = 10**15  # and the inverse of the smallest
_TOKEN = re.compile(
    r"\s*(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(\\(?:frac|sqrt|pi|cdot|times)(?![a-zA-Z])|[-+*/^(){}\[\]]))"
)
_iv: Any = MPIntervalContext()
_iv.dps = 60


def are_equal_constants(answer: str, gold: str, scale: tuple[int, int] = (1, 1)) -> bool | None:
    """Say whether two constants are equal; None if one is no constant, or is not for this reader.

    Args:
        answer: in normal form, without a unit; `gold` likewise.
        scale: what each is divided by (percent).
    """
    try:
        values = [
            _Reader(text).value() / by for text, by in zip((answer, gold), scale, strict=True)
        ]
        difference = abs(values[0] - values[1])
        size = max(abs(values[0]).b, abs(values[1]).b)
    except (_NotReadError, ZeroDivisionError):
        return None
    if difference.a > 0:
        return False
    return True if difference.b <= size * _iv.mpf(10) ** -40 else None


class _NotReadError(ValueError):
    """No constant, or one that is left to math-verify."""


class _Reader:
    """Reads one constant from left to right, by descent; an instance is used once."""

    def __init__(self, text: str) -> None:
        if len(text) > _MAX_CHARACTERS:
            raise _NotReadError
        self._tokens: list[str] = []
        place, text = 0, text.rstrip()
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise _NotReadError
            self._tokens.append(match.group().strip())
            place = match.end()
        self._place = 0
        self._depth = 0

    def value(self) -> Any:
        """Return the interval of the whole text."""
        found = self._sum()
        if self._place < len(self._tokens):
            raise _NotReadError
        return found

    def _next(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def _take(self, expected: str = "") -> str:
        token = self._next()
        if not token or (expected and token != expected):
            raise _NotReadError
        self._place += 1
        return token

    def _sum(self) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _NotReadError
        total = self._signed()
        while self._next() in ("+", "-"):
            sign = self._take()
            term = self._product()
            total = total + term if sign == "+" else total - term
        self._depth -= 1
        return total

    def _signed(self) -> Any:
        sign = self._take() if self._next() in ("+", "-") else "+"
        return -self._product() if sign == "-" else self._product()

    def _product(self) -> Any:
        found, is_divided = self._power(), False
        while True:
            token = self._next()
            if token in (r"\cdot", r"\times", "*"):
                self._take()
                found *= self._power()
            elif token == "/":
                self._take()
                found, is_divided = _divide(found, self._power()), True
            elif token in (r"\pi", r"\sqrt", "(", r"\frac"):
                # 1/2\pi is read in two ways, and 2\frac{1}{2} is 2.5, no product
                if is_divided or (token == r"\frac" and _is_number(self._tokens[self._place - 1])):
                    raise _NotReadError
                found *= self._power()
            else:
                return _bounded(found)

    def _power(self) -> Any:
        base = self._atom()
        if self._next() != "^":
            return base
        self._take()
        exponent = self._group() if self._next() == "{" else _number(self._take())
        if self._next() == "^" or not -_MAX_EXPONENT <= exponent.a <= _MAX_EXPONENT:
            raise _NotReadError
        whole = int(exponent.a) if exponent.a == exponent.b == int(exponent.a) else None
        if whole is not None:
            power = _bounded(base ** abs(whole))
            return power if whole >= 0 else _divide(_iv.mpf(1), power)
        return self._real_power(base, exponent)

    def _atom(self) -> Any:
        token = self._take()
        if token == r"\pi":
            return _iv.pi + 0
        if token == r"\frac":
            top = self._argument()
            return _divide(top, self._argument())
        if token == r"\sqrt":
            index = self._inside("]") if self._next() == "[" else _iv.mpf(2)
            if not 1 <= index.a <= _MAX_EXPONENT:
                raise _NotReadError
            return self._real_power(self._argument(), 1 / index)
        if token == "(":
            self._place -= 1
            return self._inside(")")
        return _number(token)

    def _argument(self) -> Any:
        """What stands behind a command: a group, or one digit."""
        if self._next() == "{":
            return self._group()
        token = self._take()
        if len(token) > 1:
            raise _NotReadError
        return _number(token)

    def _group(self) -> Any:
        return self._inside("}")

    def _inside(self, closing: str) -> Any:
        self._take({"}": "{", "]": "[", ")": "("}[closing])
        found = self._sum()
        self._take(closing)
        return found

    @staticmethod
    def _real_power(base: Any, exponent: Any) -> Any:
        if base.a == base.b == 0:
            return base
        if base.a <= 0:
            raise _NotReadError
        return _iv.exp(exponent * _iv.log(base))


def _is_number(token: str) -> bool:
    return token[0].isdigit() or token[0] == "."


def _bounded(value: Any) -> Any:
    """Refuse what is too large, or too near 0 without being 0."""
    size = abs(value)
    if size.b > _MAX_SIZE or (size.b > 0 and size.a * _MAX_SIZE < 1):
        raise _NotReadError
    return value


def _number(token: str) -> Any:
    if not _is_number(token) or len(token) > _MAX_DIGITS:
        raise _NotReadError
    return _iv.mpf(token)


def _divide(top: Any, bottom: Any) -> Any:
    if bottom.a <= 0 <= bottom.b:
        raise _NotReadError
    return top / bottom

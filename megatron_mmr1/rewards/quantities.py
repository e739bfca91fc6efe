"""A number with its unit, if the whole of an answer is that."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from megatron_mmr1.rewards.numbers import read_number
from megatron_mmr1.rewards.text import normal_form
from megatron_mmr1.rewards.units import Unit, read_unit, split_unit

PERCENT: Unit = (("%", 1),)
DOLLAR: Unit = (("$", 1),)


class Quantity(NamedTuple):
    """A number as written (50 for "50%"), and its unit."""

    number: Fraction
    unit: Unit | None

    @property
    def value(self) -> Fraction:
        """The number, with a percent sign taken at its word."""
        return self.number / 100 if self.unit == PERCENT else self.number


def read_quantity(text: str) -> Quantity | None:
    """Read a number with a known unit or none; None for anything else."""
    expression, tail = split_unit(normal_form(text))
    number, unit = read_number(expression), read_unit(tail) if tail else None
    return None if number is None or (tail and unit is None) else Quantity(number, unit)

"""What the doctor says of one thing: a line that starts with OK, DO or -."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    Attributes:
        status: OK; DO = something is to be done; "-" = does not apply to this machine.
        topic: what was looked at.
        text: what was found; after a DO also what to do.
    """

    status: Literal["OK", "DO", "-"]
    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.status:<3}{self.topic}: {self.text}"


def ok(topic: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding("OK", topic, text)


def do(topic: str, text: str) -> Finding:
    """`text` says what is wrong, and what to do."""
    return Finding("DO", topic, text)


def not_here(topic: str, text: str) -> Finding:
    """The machine has no use for it."""
    return Finding("-", topic, text)

"""Multiple choice: what a gold like "B", "(B) red" or "B. 5 cm" asks for."""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_mmr1.rewards.text import words

_GOLD = re.compile(r"(?:\((?P<a>[A-J])\)|(?P<b>[A-J])[.:)])\s*(?P<text>.+)", re.DOTALL)
_LETTER = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)?(?:\s+is)?\s*:?\s*[(\[]?\s*([A-Ja-j])\s*[)\]]?\s*[.:)]?",
    re.IGNORECASE,
)
_LETTER_AND_TEXT = re.compile(
    r"(?:option|choice)?\s*(?:\(\s*(?P<a>[A-J])\s*\)|(?P<b>[A-J])\s*[.:)])\s*(?P<text>.+)",
    re.IGNORECASE | re.DOTALL,
)
_LETTERS = re.compile(r"[A-J](?:\s*(?:,|and|&)\s*[A-J])+")


class Option(NamedTuple):
    """A letter, and the text of its option ("" if the gold has none)."""

    letter: str
    text: str


def gold_option(gold: str) -> Option | None:
    """Read a gold that is an option's letter, alone or with its text; None if it is none.

    Args:
        gold: in normal form.
    """
    plain = words(gold)
    if re.fullmatch(r"\(?[A-J]\)?", plain):
        return Option(plain.strip("()"), "")
    match = _GOLD.fullmatch(plain)
    return Option(match["a"] or match["b"], match["text"].strip()) if match else None


def gold_letters(gold: str) -> frozenset[str] | None:
    """Read a gold of several letters, "A, C"; None if it is none."""
    plain = words(gold)
    return frozenset(re.findall("[A-J]", plain)) if _LETTERS.fullmatch(plain) else None


def run_of_letters(gold: str) -> frozenset[str] | None:
    """Read a gold such as "ACD": letters if the answer lists letters, else any text."""
    plain = words(gold)
    is_run = re.fullmatch("[A-J]{2,6}", plain) and list(plain) == sorted(set(plain))
    return frozenset(plain) if is_run else None


def has_other_letter(text: str) -> bool:
    """Whether an option's text names an option itself, or hedges."""
    return bool(re.search(r"\([A-Ja-j]\)|\b(?:or|and|not)\b|^[A-J]\W*$", text))


def answer_letters(answer: str) -> frozenset[str] | None:
    """Read an answer that is one letter or several, in any dress; None if it is something else."""
    plain = words(answer).strip("*")
    if letter := answer_letter(plain):
        return frozenset(letter)
    plain = re.sub(r"[()]", "", plain).upper().replace("AND", ",")
    if re.fullmatch(r"[A-J](?:\s*,\s*[A-J])+", plain):
        return frozenset(re.findall("[A-J]", plain))
    return None


def answer_letter(answer: str) -> str | None:
    """Read an answer that is one option's letter and nothing else."""
    match = _LETTER.fullmatch(words(answer).strip("*"))
    return match.group(1).upper() if match else None


def answer_option(answer: str) -> Option | None:
    """Read an answer that is a letter and the text of an option."""
    match = _LETTER_AND_TEXT.fullmatch(words(answer).strip("*"))
    return Option((match["a"] or match["b"]).upper(), match["text"].strip()) if match else None

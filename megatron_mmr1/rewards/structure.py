"""What an answer is made of: the parts of sets, tuples, intervals and matrices, relations, lists.

Owns string work on normal forms; whether two parts are equal is the business of `mathematics.py`.
"""

from __future__ import annotations

import re

from megatron_mmr1.rewards.text import split, words

COMMAND = re.compile(r"\\[a-zA-Z]+")
LONG_WORD = re.compile(r"[^\W\d_]{3,}|\b(?:or|to|is|no|by|as)\b")
_SEVERAL = re.compile(r"(?<!_[0-9])(?<=[0-9]) (?=[0-9])|[,;…]|\.\.\.|\\(?:ldots|pm|mp|lor|vee)\b")
_RELATION = re.compile(r"<=|>=|!=|\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<|>|=")
_ONE_RELATION = {"<=": r"\le", ">=": r"\ge", "!=": r"\ne"}
_JOINT = re.compile(r"\band\b|\bor\b")
_MATRIX = re.compile(r"\\begin\{([a-z]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)


def why_not_one_answer(answer: str, gold: str) -> str | None:
    """Say what an answer has that its gold has not: several answers, or words; None if neither."""
    outside = " ".join(split(answer)) if answer[:1] in "([{\\" else answer
    extra = set(_SEVERAL.findall(outside)) - set(_SEVERAL.findall(gold))
    if extra and not (brackets(answer) and brackets(gold)):
        return "several answers"
    if has_words(answer) and not has_words(gold):
        return "words, not mathematics"
    return None


def has_words(text: str) -> bool:
    """Whether a text has words that are no commands and no products of letters."""
    return bool(LONG_WORD.search(COMMAND.sub(" ", words(text))))


def has_relation(text: str) -> bool:
    """Whether a text is an equation, an inequality, or has one inside."""
    return bool(_RELATION.search(text))


def brackets(text: str) -> tuple[str, str, str] | None:
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


def parts(text: str) -> tuple[str, list[str], bool] | None:
    """Return (kind, parts, whether their order counts) of what is made of parts, else None."""
    if r"\cup" in text:
        return "union", [part.strip() for part in text.split(r"\cup")], False
    if match := _MATRIX.fullmatch(text.strip()):
        rows = [row for row in match.group(2).strip().split("\\\\") if row.strip()]
        cells = [cell.strip() for row in rows for cell in row.split("&")]
        kind = "determinant" if match.group(1) == "v" else "matrix"
        return f"{kind} of {len(rows)} rows", cells, True
    if found := brackets(text):
        opening, inside, closing = found
        return opening + closing, split(inside) if inside.strip() else [], opening != "{"
    plain = re.sub(r"\s*(?:\band\b|\bor\b|\\lor\b|\\vee\b)\s*", ",", words(text))
    if len(pieces := split(plain)) > 1:
        return "several", pieces, False
    return None


def are_joined_otherwise(answer: str, gold: str) -> bool:
    """Whether one says "and" where the other says "or" between inequalities."""
    if not re.search(r"[<>]|\\[lg]e(?![a-z])", gold):
        return False
    joints = [set(_JOINT.findall(words(text))) for text in (answer, gold)]
    return bool(joints[0]) and bool(joints[1]) and joints[0] != joints[1]


def relations(text: str) -> tuple[list[str], list[str]] | None:
    """Return (sides, relations) of an equation, an inequality or a chain of them, else None."""
    found = [_ONE_RELATION.get(r.group(), r.group()) for r in _RELATION.finditer(text)]
    return ([side.strip() for side in _RELATION.split(text)], found) if found else None

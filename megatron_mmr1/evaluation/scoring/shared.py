"""What the benchmarks' rules share: option letters, plain text, numbers, equality."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_mmr1.evaluation.questions import Score
from megatron_mmr1.rewards.accuracy import judge
from megatron_mmr1.rewards.text import normal_form
from megatron_mmr1.rewards.text import words as without_marks

# "B", "b.", "(B)", "B) 12 cm", "(B) 12 cm", "B: 12 cm"
_LABELLED = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])(?:[.:)]|$)).*", re.DOTALL)
_WHOLE_BOX = re.compile(r"\$?\s*\\boxed\s*\{(.*)\}\s*\$?", re.DOTALL)
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


def as_score(is_correct: bool, reason: str) -> Score:
    """Return correct or wrong, with `reason`."""
    return Score("correct" if is_correct else "wrong", reason)


def plain(text: str) -> str:
    """Undo LaTeX that carries no value: text wrappers, spaces, dollars, and a box around it all."""
    if boxed := _WHOLE_BOX.fullmatch(text.strip()):
        text = boxed[1]
    return without_marks(normal_form(text))


def verify(answer: str, gold: str) -> Score:
    """Judge as the reward does (rewards/accuracy.py); what it can't judge is unscored.

    May never end on a hostile answer.
    """
    outcome, reason = judge(f"<answer>\\boxed{{{plain(answer)}}}</answer>", plain(gold))
    return Score("unscored" if outcome == "could_not_judge" else outcome, reason)


def letters(text: str) -> frozenset[str] | None:
    """Return the option labels that a text consists of, upper case; None if it is anything else.

    "B", "(b)", "B. the dot" are one; "A, C", "A and C", "AC", "{A,C}" are two. A label is a letter
    or a digit.
    """
    text = plain(text)
    if labelled := _LABELLED.fullmatch(text):
        return frozenset((labelled[1] or labelled[2]).upper())
    words = re.findall(r"[^\W_]+", re.sub(r"\band\b", " ", text))
    if len(words) == 1 and words[0].isupper() and len(set(words[0])) == len(words[0]):
        words = list(words[0])
    if not words or any(len(word) > 1 for word in words):
        return None
    return frozenset(word.upper() for word in words)


def pick_option(answer: str, choices: Sequence[str]) -> tuple[str | None, str]:
    """Return the text of the option that an answer names, or None, and the reason.

    In this order: a capital letter within range, also with text after it; the option's text; a
    small letter; an option that the verifier finds equal, if it is the only one.
    """
    text = plain(answer)
    labelled = _LABELLED.fullmatch(text)
    label = (labelled[1] or labelled[2]) if labelled else ""
    index = ord(label.upper()) - ord("A") if label else len(choices)
    if label.isupper() and index < len(choices):
        return choices[index], "letter"
    for choice in choices:
        if plain(choice) == text:
            return choice, "the option's text"
    if text.strip(" ().").lower() == label and index < len(choices):
        return choices[index], "letter"
    equal = {choice for choice in choices if verify(answer, choice).outcome == "correct"}
    if len(equal) == 1:
        return equal.pop(), "equal to an option"
    return None, "equal to several options" if equal else "no option"


def numeric_value(latex: str) -> float | None:
    r"""Return the number that LaTeX such as `\frac{1}{3}` or `2\sqrt{3}` denotes, or None.

    May never end on a hostile text.
    """
    text = latex.strip().strip("$").strip()
    if _DECIMAL.fullmatch(text):
        return float(text)
    from latex2sympy2_extended import latex2sympy

    try:
        value: Any = latex2sympy(text)
        return float(value.evalf())
    except Exception:  # the parser raises its own, AttributeError, sympy's: all mean "no number"
        return None


def edit_distance(first: str, second: str) -> int:
    """Return Levenshtein's distance: insertions, deletions and substitutions of one character."""
    previous = list(range(len(second) + 1))
    for row, a in enumerate(first, start=1):
        current = [row]
        for column, b in enumerate(second, start=1):
            substituted = previous[column - 1] + (a != b)
            current.append(min(previous[column] + 1, current[-1] + 1, substituted))
        previous = current
    return previous[-1]

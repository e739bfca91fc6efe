"""The released MMR1 reward's idea of a correct answer, for comparison alone; nothing trains on it.

Written anew after reading it (LengSicong/MMR1, `r1v.py`), rule by rule: up to three candidates are
taken from a response (the text of `<answer>`, boxes, phrases such as "the answer is", the last
sentence), and one of them suffices. A candidate is right if it has the gold's option letter, equals
the gold after a rough clean-up, contains it or is contained in it (short texts), shares most of its
words, or if math-verify finds it equal to a few decimals. That accepts "15" for "5" and a list of
all candidates for any of them.

It is the same in substance and not line by line. The same: where candidates come from and that
three are tried, the substring and shared-word rules, units and number words that are cleaned away,
the comparison by option letters, math-verify as the last resort and what it tolerates. Not the
same: its spelling tables for geometry signs are left out; partial credit (0.1, 0.5) counts as
wrong; math-verify is this project's version, without its own timers; one regular expression often
stands for several. So its figures here are of its rules, and not of its program.
"""

from __future__ import annotations

import re

_BOX = re.compile(r"\\boxed\{([^}]+)\}", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PHRASES = (
    r"(?:the answer is|therefore|thus|so|hence|result is)\s*:?\s*([^.\n]+)",
    r"(?:equals?|=)\s*([^.\n]+)",
    r"(?:final answer|conclusion|solution|answer|result)\s*:?\s*([^.\n]+)",
)
_OPTION = re.compile(r"\(?([A-E])\)?(?:\.\s*|$|\s)")
_UNITS = re.compile(
    r"\b(?:degree|cm|centimeter|dm|meter|mile|gram|kilo|kilogram|kg|liter|second|minute|hour|day"
    r"|week|month|year|foot|feet|inch|in|yard|square|unit|yuan|time)(?:es)?s?\b|\^?\{?\\circ\}?|°"
)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SAME = {"yes": "true", "no": "false", "correct": "true", "right": "true", "wrong": "false"}
_MAX_CANDIDATES, _SHORT = 3, 10


def judge(response: str, gold: str) -> tuple[str, str]:
    """Return "correct" where the released reward gives full credit, else "wrong"; and no reason.

    May never end.
    """
    gold = gold.strip()
    is_correct = any(_matches(candidate, gold) for candidate in _candidates(response))
    return ("correct" if is_correct else "wrong"), ""


def _candidates(response: str) -> list[str]:
    found = [match.group(1) for match in [_ANSWER.search(response)] if match]
    found += _BOX.findall(response)
    for phrase in _PHRASES:
        found += re.findall(phrase, response, re.IGNORECASE)
    found.append(re.split(r"[.!?]\s+", response.strip())[-1][:100])
    stripped = [text.strip() for text in found if text.strip()]
    return list(dict.fromkeys(stripped))[:_MAX_CANDIDATES]


def _matches(candidate: str, gold: str) -> bool:
    boxed = _BOX.findall(candidate)
    answer = (boxed[-1] if boxed else candidate).strip()
    letters = [_OPTION.match(text.upper()) for text in (answer, gold)]
    if letters[0] and letters[1]:
        return letters[0].group(1) == letters[1].group(1)
    if any(letters):
        return answer == gold
    return answer == gold or _are_alike(_cleaned(answer), _cleaned(gold)) or _verify(answer, gold)


def _cleaned(text: str) -> str:
    text = re.sub(r"[.!?;,]+$", "", text.strip().lower())
    for value, name in enumerate(_NUMBERS):
        text = re.sub(rf"\b{name}\b", str(value), text)
    for word, other in _SAME.items():
        text = text.replace(word, other)
    text = re.sub(r"\\text\{(.*?)\}", r"\1", text)
    return " ".join(_UNITS.sub("", text).split())


def _are_alike(answer: str, gold: str) -> bool:
    if not answer or not gold:
        return False
    is_close_in_length = (
        len(gold) <= _SHORT or len(answer) <= _SHORT or abs(len(answer) - len(gold)) < 2 * _SHORT
    )
    if answer == gold or (is_close_in_length and (gold in answer or answer in gold)):
        return True
    words = set(gold.split())
    shared = len(set(answer.split()) & words) / len(words)
    is_long = len(answer) > 2 and len(gold) > 2
    return is_long and (shared >= 0.8 or (len(words) <= 3 and shared >= 0.6))


def _verify(answer: str, gold: str) -> bool:
    from math_verify import parse, verify

    try:
        parsed = [parse(f"\\boxed{{{text}}}", parsing_timeout=0) for text in (answer, gold)]
        return bool(verify(parsed[1], parsed[0], float_rounding=4, timeout_seconds=None))
    except Exception:  # the released code goes on to the next candidate, whatever happened
        return False

"""The shape of a response, `<think>...</think><answer>...</answer>`, and what its box holds.

Pure string work. Whether the boxed answer is right is the business of `accuracy.py`.
"""

from __future__ import annotations

import re

_TAG = re.compile(r"</?(?:think|answer)>")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = re.compile(r"\\boxed\s*\{")


def is_well_formed(response: str) -> bool:
    """Say whether a response is exactly one think block followed by exactly one answer block.

    Whitespace may surround the blocks. Other text there, and repeated or nested tags, are faults.
    """
    text = response.strip()
    tags = list(_TAG.finditer(text))
    if [tag.group() for tag in tags] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return False
    between = text[tags[1].end() : tags[2].start()]
    return tags[0].start() == 0 and tags[3].end() == len(text) and not between.strip()


def extract_answer(response: str) -> str | None:
    r"""Return what the last `\boxed{...}` inside `<answer>` holds, stripped; None if there is none.

    Of several answer blocks the last counts; a box outside, or one that isn't closed, doesn't.
    """
    blocks = _ANSWER.findall(response)
    boxes = list(_BOX.finditer(blocks[-1])) if blocks else []
    return _balanced(blocks[-1], boxes[-1].end()) if boxes else None


def _balanced(text: str, start: int) -> str | None:
    """Return `text` from `start` to the brace that closes the one before it; None if none does."""
    depth = 1
    for index in range(start, len(text)):
        if text[index - 1] == "\\" and index > start:  # \{ and \} are characters, not groups
            continue
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index].strip()
    return None

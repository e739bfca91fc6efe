r"""The evaluation prompt: question, options, and the demand for one \boxed{}.

In the spirit of the paper's Table 8 (arXiv:2509.21268): step by step, one box, a single letter for
multiple choice. No demonstration, no captions, no system prompt: a model trained to think in tags
brings its own chat template. Does not tokenise; that is data/processor.py.
"""

from __future__ import annotations

import re

from megatron_mmr1.data.processor import IMAGE_TAG
from megatron_mmr1.evaluation.questions import Question

_STEPS = "Solve the problem step by step, then put"
_ONE_BOX = r"in one \boxed{}."
_LISTED = re.compile(r"^choices?\s*:", re.IGNORECASE | re.MULTILINE)


def prompt_text(question: Question) -> str:
    """Return the user turn: an `<image>` for each image, question, options, instruction.

    Options are not listed a second time where the question's own text lists them. A literal
    `<image>` in the text loses its brackets: the processor would wait for a picture. The embedded
    task's text is that of its training, tags included, and stays as it is.
    """
    if question.benchmark == "digits":
        return question.text
    text = question.text.replace(IMAGE_TAG, "image").strip()
    parts = [text or "The question is in the image."]
    if question.unit:
        parts[0] += f" (Unit: {question.unit})"
    if question.choices and not _LISTED.search(text):
        parts.append("Choices:")
        parts += [f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(question.choices)]
    parts.append(f"{_STEPS} {_wanted(question)} {_ONE_BOX}")
    return IMAGE_TAG * len(question.images) + "\n".join(parts)


def _wanted(question: Question) -> str:
    if question.benchmark == "logicvista":
        return "only the letter of the right option, or the letters if several are right,"
    if question.answer_type == "choice":
        return "only the letter of the right option"
    if question.benchmark == "chartqa":
        return "the answer, a number or as few words as possible,"
    if question.answer_type == "integer":
        return "the answer, an integer,"
    if question.answer_type == "float":
        places = "place" if question.precision == 1 else "places"
        return f"the answer, a number with {question.precision} decimal {places},"
    if question.answer_type == "list":
        return "the answer, a list such as [1, 2, 3],"
    return "the final answer"

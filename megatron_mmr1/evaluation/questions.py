"""The values of a benchmark run: a question, its two scores, and a question with its response.

Plain and free of torch: scoring workers import this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Benchmark = Literal["mathverse", "mathvista", "mathvision", "logicvista", "chartqa", "digits"]
AnswerType = Literal["choice", "integer", "float", "list", "text"]
Outcome = Literal["correct", "wrong", "unscored"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a benchmark.

    Attributes:
        question_id: unique in its file.
        text: as the benchmark writes it; "" where the image holds it (MathVerse, Vision Only).
        choices: the options' texts in the order of their letters; () where there are none, or where
            they stand in `text` or in the image (MathVerse, LogicVista).
        answer: the gold answer: an option's letter (MathVerse, MathVision, LogicVista) or its text
            (MathVista), or a free answer.
        answer_type: which rule compares it.
        precision: decimals of a float answer (MathVista), else None.
        unit: what the question asks for ("years"), or "".
        groups: what accuracy is broken down by, such as {"skills": ("algebraic reasoning",)}.
        cluster: questions with the same one are not independent: MathVerse's versions of a problem.
            Elsewhere the question's id.
        images: encoded PNG or JPEG files, in order.
    """

    benchmark: Benchmark
    question_id: str
    text: str
    answer: str
    answer_type: AnswerType
    cluster: str
    choices: tuple[str, ...] = ()
    precision: int | None = None
    unit: str = ""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    images: tuple[bytes, ...] = ()


class Score(NamedTuple):
    """Whether a response is correct under one rule, and why. `unscored` is never counted wrong."""

    outcome: Outcome
    reason: str


class Scores(NamedTuple):
    """A response under both rules.

    Attributes:
        strict: the benchmark's own rule, without accidents of the kits' code.
        compat: the rule as a public kit runs it, accidents included. The box stands where the kit
            has a language model extract the answer.
    """

    strict: Score
    compat: Score


class Extracted(NamedTuple):
    """What a response's box holds, for the strict rule and for the compat rule; None without."""

    strict: str | None
    compat: str | None


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with a model's response and its scores.

    Attributes:
        question: without its images.
        prompt: the text that the model was given.
        digest: of the question with its images (`digest_of`): of another file, or of another
            version of it, a question may have the same id.
        sample_index: which of the question's responses this is.
        num_tokens: of the response.
        is_cut_off: it reached the length limit.
    """

    question: Question
    prompt: str
    response: str
    extracted: Extracted
    scores: Scores
    digest: str = ""
    sample_index: int = 0
    num_tokens: int = 0
    is_cut_off: bool = False


def digest_of(question: Question) -> str:
    """Return a hash of all that makes up a question: what is asked, shown, and held for right."""
    parts = [question.benchmark, question.question_id, question.text, question.answer]
    parts += [question.answer_type, question.unit, str(question.precision), *question.choices]
    digest = hashlib.sha256("\0".join(parts).encode())
    for image in question.images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:16]

"""Questions to replies: what is read, checked and generated, with bounded memory.

Questions are read twice: once to check them all before an engine starts (and to keep what the
report needs), once while generating. In between only texts stay in memory; images stay encoded in
their file and are decoded chunk by chunk.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_mmr1.data.dataset import BadRow, summary
from megatron_mmr1.evaluation.journal import Journal, Reply
from megatron_mmr1.evaluation.models import Model, Prepared
from megatron_mmr1.evaluation.prompts import prompt_text
from megatron_mmr1.evaluation.questions import Question, digest_of
from megatron_mmr1.evaluation.records import QuestionReader
from megatron_mmr1.evaluation.thumbnails import thumbnail
from megatron_mmr1.rollout.engine import Sampling

CHUNK_PROMPTS = 256
CHUNK_BYTES = 1 << 30  # of pixels
NUM_THUMBNAILS = 400  # questions whose images are kept small: the same ones for every model


@dataclass(frozen=True, slots=True)
class Contents:
    """What a benchmark's source holds, without images.

    Attributes:
        questions: in the order of the source.
        prompts: the user turn of each, by its id.
        digests: of each, by its id.
        thumbnails: small images of some questions, by id: those with the lowest digests.
    """

    questions: list[Question]
    prompts: dict[str, str]
    digests: dict[str, str]
    bad_rows: list[BadRow]
    thumbnails: dict[str, tuple[bytes, ...]]


def read_contents(reader: QuestionReader, num_thumbnails: int = NUM_THUMBNAILS) -> Contents:
    """Read and check everything.

    Raises:
        ValueError: the source can't be read, or has no usable row.
    """
    questions: list[Question] = []
    prompts: dict[str, str] = {}
    digests: dict[str, str] = {}
    kept: list[tuple[int, str, tuple[bytes, ...]]] = []  # a heap, the highest digest first
    for question in reader:
        digest = digest_of(question)
        prompts[question.question_id] = prompt_text(question)
        digests[question.question_id] = digest
        questions.append(replace(question, images=()))
        key = -int(digest, 16)
        if question.images and (len(kept) < num_thumbnails or key > kept[0][0]):
            images = tuple(thumbnail(data) for data in question.images)
            heapq.heappush(kept, (key, question.question_id, images))
            if len(kept) > num_thumbnails:
                heapq.heappop(kept)
    thumbnails = {question_id: images for _, question_id, images in kept}
    return Contents(questions, prompts, digests, list(reader.bad_rows), thumbnails)


def check_replies(journal: Journal, contents: Contents) -> None:
    """Refuse replies to other questions than those that the source holds now.

    Raises:
        ValueError: a question of the journal is gone, or has changed.
    """
    for reply in journal.replies.values():
        if contents.digests.get(reply.question_id) != reply.digest:
            raise ValueError(
                f"question {reply.question_id!r} was answered and has changed in data= since; "
                "give another output="
            )


def generate(
    reader: QuestionReader,
    model: Model,
    journal: Journal,
    sampling: Sampling,
    on_reply: Callable[[int], None],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Answer every question that the journal lacks.

    Args:
        on_reply: told how many questions the journal holds.
        check: called between chunks; what it raises ends the run.
    """
    for chunk in _chunks(reader, model, journal):
        check()
        for reply in model.answer(chunk, sampling):
            journal.add(reply)
            on_reply(len(journal.replies))
    check()


def _chunks(reader: QuestionReader, model: Model, journal: Journal) -> Iterator[list[Prepared]]:
    """Yield prepared prompts, at most so many and so large at once."""
    chunk: list[Prepared] = []
    num_bytes = 0
    for question in reader:
        if question.question_id in journal.replies:
            continue
        try:
            prepared = model.prepare(question)
        except ValueError as error:
            reason = str(error) or type(error).__name__
            journal.add(Reply(question.question_id, digest_of(question), (), reason))
            continue
        if chunk and (len(chunk) == CHUNK_PROMPTS or num_bytes + prepared.num_bytes > CHUNK_BYTES):
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(prepared)
        num_bytes += prepared.num_bytes
    if chunk:
        yield chunk


def check_bad_share(contents: Contents, refused: list[BadRow], max_bad_share: float) -> None:
    """Refuse to go on with too many rows set aside.

    Raises:
        ValueError: names their share's limit and the most frequent reasons.
    """
    bad = [*contents.bad_rows, *refused]
    total = len(contents.bad_rows) + len(contents.questions)
    if len(bad) > max_bad_share * total:
        raise ValueError(
            f"max_bad_share={max_bad_share}: {len(bad)} of {total} rows were set aside "
            f"({summary(bad)}); see bad_rows.jsonl in the output folder, and mend them or raise "
            "the share"
        )


def refused_rows(contents: Contents, journal: Journal) -> list[BadRow]:
    """Return the questions that this model could not be asked; their place among the questions."""
    found = []
    for number, question in enumerate(contents.questions):
        reply = journal.replies.get(question.question_id)
        if reply is not None and reply.refused:
            found.append(BadRow(number, question.question_id, reply.refused))
    return found

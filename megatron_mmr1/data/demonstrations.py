"""Conversations to imitate, in ShareGPT's form, one at a time and in constant memory.

Owns the keys and turns of a conversation. Nothing is checked ahead: with 1.6 million records that
takes hours, so whoever draws a bad one is told and draws another (trainers/sft.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mmr1.data.dataset import RowSize, row_id_of
from megatron_mmr1.data.image_files import ImageFiles
from megatron_mmr1.data.processor import (
    IMAGE_TAG,
    Measure,
    PromptProcessor,
    Turn,
    require_tags,
)
from megatron_mmr1.data.records import open_records
from megatron_mmr1.types import Demonstration

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class Conversation(NamedTuple):
    """A system turn if there is one, then user and assistant by turns; and the encoded images."""

    turns: list[Turn]
    files: list[bytes]

    def answered(self) -> Iterator[tuple[list[Turn], Turn, Turn, int]]:
        """Yield what is before a question, the question, its response, and the number of images
        up to there; once for each turn of the assistant.
        """
        num_images = 0
        for place, turn in enumerate(self.turns):
            num_images += turn.text.count(IMAGE_TAG)
            if turn.role == "assistant":
                *history, question = self.turns[:place]
                yield history, question, turn, num_images


class Demonstrations:
    """The conversations of a source, by number.

    A record has `conversations`, [{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]
    (or `messages` with `role` and `content`), and `images` or `image`; optionally `id` and
    `system`. `<image>` stands where an image belongs.

    Args:
        source: see `records.open_records`. Image paths are relative to the file's folder.
        processor: of the model that is trained.
        max_tokens: of one training sequence; a longer one is bad, not cut.
        on_progress: told bytes done and in all while a JSON file is indexed.

    Raises:
        ValueError: there is no such source, or it has no record.
    """

    def __init__(
        self,
        source: str | Path,
        processor: PromptProcessor,
        max_tokens: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.path = str(source)
        self._records = open_records(self.path, on_progress)
        if not len(self._records):
            raise ValueError(f"{self.path} has no record")
        path = Path(source)
        self._files = ImageFiles(path.parent if path.is_file() else None)
        self._processor, self._max_tokens = processor, max_tokens

    def __len__(self) -> int:
        """How many conversations there are, bad ones among them."""
        return len(self._records)

    def sizes(self, number: int) -> list[RowSize]:
        """Check a conversation, and return the sizes of its training sequences.

        Decodes its images; pixels are processed by `load` alone.

        Raises:
            ValueError: with the reason; `row_id` names it.
        """
        conversation = read_conversation(self._records[number], self._files)
        return conversation_sizes(conversation, self._processor, self._max_tokens)

    def load(self, number: int) -> list[Demonstration]:
        """Return a good conversation's training sequences: one for each turn of the assistant,
        which has all that comes before it as its prompt.

        The loss over them is that of one pass over the whole conversation in which the assistant's
        turns alone count; what is before a turn is computed again for it.
        """
        conversation = read_conversation(self._records[number], self._files)
        return [
            Demonstration(
                self._processor.prompt(
                    f"{number}/{len(history) + 1}",  # ids may repeat
                    question.text,
                    conversation.files[:num_images],
                    history=history,
                ),
                self._processor.response_token_ids(response.text),
            )
            for history, question, response, num_images in conversation.answered()
        ]

    def row_id(self, number: int) -> str:
        """Name a record, by its id if it has one that can be read."""
        try:
            return row_id_of(self._records[number], number)
        except ValueError:
            return row_id_of({}, number)


def read_conversation(record: dict[str, Any], files: ImageFiles) -> Conversation:
    """Read a record's turns and encoded images.

    Raises:
        ValueError: with the reason why the record is bad.
    """
    turns = _turns(record)
    return Conversation(turns, files.read(_first_of(record, "images", "image")))


def conversation_sizes(
    conversation: Conversation, measure: Measure, max_tokens: int
) -> list[RowSize]:
    """Decode the images and count the tokens of each training sequence.

    Raises:
        ValueError: with the reason why the record is bad.
    """
    pictures = [measure.picture(data) for data in conversation.files]
    require_tags(conversation.turns, len(pictures))
    patches = tuple(measure.count_patches(picture) for picture in pictures)
    sizes = []
    for history, question, response, num_images in conversation.answered():
        size = RowSize(
            measure.count_tokens(question.text, pictures[:num_images], history),
            measure.count_response_tokens(response.text),
            patches[:num_images],
        )
        num_tokens = size.num_prompt_tokens + size.num_response_tokens
        if num_tokens > max_tokens:
            raise ValueError(f"{num_tokens} tokens exceed max_tokens_per_microbatch={max_tokens}")
        sizes.append(size)
    return sizes


def _turns(record: dict[str, Any]) -> list[Turn]:
    """Read a conversation: a system turn if there is one, then user and assistant by turns.

    Raises:
        ValueError: it is anything else, or an assistant's turn is empty.
    """
    listed = _first_of(record, "conversations", "messages")
    if not isinstance(listed, list) or not listed:
        raise ValueError("no conversation")
    turns = [_turn(entry) for entry in listed]
    system = record.get("system")
    if isinstance(system, str) and system.strip():
        turns.insert(0, Turn("system", system))
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != expected:
        raise ValueError(f"turns of {', '.join(roles)}: not user and assistant by turns")
    for turn in turns:
        if turn.role == "assistant" and not turn.text.strip():
            raise ValueError("empty response")
        if turn.role == "assistant" and IMAGE_TAG in turn.text:
            raise ValueError(f"a response holds {IMAGE_TAG}")
    return turns


def _first_of(record: dict[str, Any], *keys: str) -> Any:
    """Return the first value that is there and not null (a table has all columns in every row)."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _turn(entry: Any) -> Turn:
    if not isinstance(entry, dict):
        raise ValueError(f"a turn is {type(entry).__name__}, not an object")
    speaker, text = entry.get("from", entry.get("role")), entry.get("value", entry.get("content"))
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise ValueError(f"a turn is from {speaker!r}; known are {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise ValueError(f"a turn's text is {type(text).__name__}")
    return Turn(_ROLES[speaker], text)

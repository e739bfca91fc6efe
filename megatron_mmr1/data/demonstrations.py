"""Conversations to imitate, in ShareGPT's form, one at a time and in constant memory.

Owns the keys and turns of a conversation. Nothing is checked ahead: with 1.6 million records that
takes hours, so whoever draws a bad one is told and draws another (trainers/sft.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mmr1.data.dataset import RowSize
from megatron_mmr1.data.image_files import ImageFiles
from megatron_mmr1.data.processor import IMAGE_TAG, PromptProcessor, Turn
from megatron_mmr1.data.records import open_records
from megatron_mmr1.types import Demonstration

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


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

    def load(self, number: int) -> list[tuple[Demonstration, RowSize]]:
        """Return a conversation's training sequences: one for each turn of the assistant, which
        has all that comes before it as its prompt.

        The loss over them is that of one pass over the whole conversation in which the assistant's
        turns alone count; what is before a turn is computed again for it.

        Raises:
            ValueError: with the reason; `row_id` names it.
        """
        record = self._records[number]
        turns = _turns(record)
        files = self._files.read(record.get("images", record.get("image")))
        pictures = [self._processor.picture(data) for data in files]
        num_tags = sum(turn.text.count(IMAGE_TAG) for turn in turns)
        if num_tags != len(files):
            raise ValueError(f"{num_tags} {IMAGE_TAG} tags for {len(files)} images")
        found, num_images = [], 0
        for place, turn in enumerate(turns):
            if turn.role != "assistant":
                num_images += turn.text.count(IMAGE_TAG)
                continue
            *history, question = turns[:place]
            prompt = self._processor.prompt(
                f"{number}/{place}",  # ids may repeat
                question.text,
                files[:num_images],
                history=history,
            )
            response = self._processor.response_token_ids(turn.text)
            patches = tuple(self._processor.count_patches(p) for p in pictures[:num_images])
            size = RowSize(len(prompt.token_ids), len(response), patches)
            num_tokens = size.num_prompt_tokens + size.num_response_tokens
            if num_tokens > self._max_tokens:
                raise ValueError(
                    f"{num_tokens} tokens exceed max_tokens_per_microbatch={self._max_tokens}"
                )
            found.append((Demonstration(prompt, response), size))
        return found

    def row_id(self, number: int) -> str:
        """Name a record, by its id if it has one that can be read."""
        try:
            row_id = self._records[number].get("id")
        except ValueError:
            row_id = None
        return f"row-{number}" if row_id in (None, "") else str(row_id)


def _turns(record: dict[str, Any]) -> list[Turn]:
    """Read a conversation: a system turn if there is one, then user and assistant by turns.

    Raises:
        ValueError: it is anything else, or an assistant's turn is empty.
    """
    listed = record.get("conversations", record.get("messages"))
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


def _turn(entry: Any) -> Turn:
    if not isinstance(entry, dict):
        raise ValueError(f"a turn is {type(entry).__name__}, not an object")
    speaker, text = entry.get("from", entry.get("role")), entry.get("value", entry.get("content"))
    if speaker not in _ROLES:
        raise ValueError(f"a turn is from {speaker!r}; known are {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise ValueError(f"a turn's text is {type(text).__name__}")
    return Turn(_ROLES[speaker], text)

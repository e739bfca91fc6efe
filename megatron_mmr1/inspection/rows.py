"""Records of either kind to what inspection keeps of them, checked as training checks them.

A question is checked by `data.dataset`, a conversation by `data.demonstrations`. Without a model
the checks that need one are left out: lengths in tokens, vision tokens and unknown ones as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from megatron_mmr1.data.dataset import Asked, Keys, prompt_size, read_question, row_id_of
from megatron_mmr1.data.demonstrations import Conversation, conversation_sizes, read_conversation
from megatron_mmr1.data.image_files import ImageFiles
from megatron_mmr1.data.images import decode_image
from megatron_mmr1.data.processor import Measure, Turn, require_tags
from megatron_mmr1.data.records import BadRecord, open_records
from megatron_mmr1.inspection.fingerprints import ImagePrint, image_print

Kind = Literal["rl", "sft"]
_NUM_TO_FIND_OUT = 100  # records that are looked at


class Checks(NamedTuple):
    """How training would be set: see `config.schema.DataConfig` and `SftConfig`."""

    keys: Keys
    instruction: str
    max_tokens: int


@dataclass(slots=True)
class Row:
    """What is kept of a record while it is counted.

    Attributes:
        reason: why it is bad; "" if it is usable.
        question: of a conversation, the user's turns.
        text: all of it, for duplicates: of a conversation, all turns.
        answer: of a question, the gold; of a conversation, the assistant's turns.
        num_tokens: of the prompt; of a conversation, with its responses; 0 without a model.
    """

    number: int
    row_id: str
    reason: str = ""
    question: str = ""
    text: str = ""
    answer: str = ""
    num_tokens: int = 0
    prints: list[ImagePrint] = field(default_factory=list)


class WithoutModel:
    """A `Measure` that decodes images and compares them with their tags; it counts no tokens."""

    def picture(self, data: bytes) -> Image.Image:
        """Decode an image."""
        return decode_image(data)

    def fit(self, picture: Image.Image) -> Image.Image:
        """Return the image as it is."""
        return picture

    def count_tokens(
        self, question: str, pictures: Sequence[Image.Image], history: Sequence[Turn] = ()
    ) -> int:
        """Compare tags and images."""
        require_tags([*history, Turn("user", question)], len(pictures))
        return 0

    def count_patches(self, picture: Image.Image) -> int:
        """Return 0."""
        return 0

    def count_response_tokens(self, response: str) -> int:
        """Return 0."""
        return 0


class Rows:
    """The records of a source; thread-safe to read.

    Args:
        source: see `records.open_records`.
        kind: "rl" for questions with a gold answer, "sft" for conversations; None: find out.
        measure: the processor of the model that will be trained, or `WithoutModel`.

    Raises:
        ValueError: no such source, or its kind can't be told.
    """

    def __init__(
        self, source: str, kind: Kind | None, checks: Checks, measure: Measure | None = None
    ) -> None:
        self.source = source
        self._records = open_records(source)
        path = Path(source)
        self._files = ImageFiles(path.parent if path.is_file() else None)
        self._checks, self._measure = checks, measure or WithoutModel()
        self.has_model = measure is not None
        self.kind: Kind = kind or self._find_kind()

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._records)

    def read(self, number: int) -> Row:
        """Read, check and fingerprint a record; pixels are not kept."""
        row = Row(number, row_id_of({}, number))
        try:
            record = self._records[number]
            row.row_id = row_id_of(record, number)
            printing = _Printing(self._measure, row.prints)
            if self.kind == "rl":
                asked = self._asked(record)
                row.question = row.text = str(record[self._checks.keys.problem])
                row.answer = asked.answer
                row.num_tokens = prompt_size(
                    asked, printing, self._checks.max_tokens
                ).num_prompt_tokens
            else:
                conversation = self._conversation(record)
                row.question = _said(conversation, "user")
                row.answer = _said(conversation, "assistant")
                row.text = "\n".join(turn.text for turn in conversation.turns)
                size = conversation_sizes(conversation, printing, self._checks.max_tokens)[-1]
                row.num_tokens = size.num_prompt_tokens + size.num_response_tokens
        except (BadRecord, ValueError) as error:
            row.reason = str(error) or type(error).__name__
        return row

    def files(self, number: int) -> list[bytes]:
        """Return the encoded images of a record; none if it is bad."""
        try:
            record = self._records[number]
            found = self._asked(record) if self.kind == "rl" else self._conversation(record)
        except (BadRecord, ValueError):
            return []
        return found.files

    def row_id(self, number: int) -> str:
        """Name a record."""
        try:
            return row_id_of(self._records[number], number)
        except ValueError:
            return row_id_of({}, number)

    def _asked(self, record: dict[str, Any]) -> Asked:
        checks = self._checks
        return read_question(record, checks.keys, self._files, checks.instruction)

    def _conversation(self, record: dict[str, Any]) -> Conversation:
        return read_conversation(record, self._files)

    def _find_kind(self) -> Kind:
        problem = self._checks.keys.problem
        for record in islice(self._readable(), _NUM_TO_FIND_OUT):
            if "conversations" in record or "messages" in record:
                return "sft"
            if problem in record:
                return "rl"
        raise ValueError(
            f"{self.source}: no conversations, messages or {problem} in its first records; say "
            "--kind rl or --kind sft, and name the keys (--problem-key, --answer-key, --images-key)"
        )

    def _readable(self):
        for number in range(len(self)):
            try:
                yield self._records[number]
            except BadRecord:
                continue


class _Printing:
    """A `Measure` that fingerprints the images that pass, so that each is decoded once."""

    def __init__(self, measure: Measure, prints: list[ImagePrint]) -> None:
        self._measure, self._prints = measure, prints
        self.fit = measure.fit
        self.count_tokens = measure.count_tokens
        self.count_patches = measure.count_patches
        self.count_response_tokens = measure.count_response_tokens

    def picture(self, data: bytes) -> Image.Image:
        picture = decode_image(data)
        self._prints.append(image_print(picture))
        return self._measure.fit(picture)


def _said(conversation: Conversation, role: str) -> str:
    return "\n".join(turn.text for turn in conversation.turns if turn.role == role)

"""`responses.jsonl`: every reply as it comes, so that an interrupted evaluation can go on.

The first line holds what the replies depend on besides the settings (config.yaml has those); each
other line is one question's replies, or why the engine refused it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FILE = "responses.jsonl"


class Response(NamedTuple):
    """One response; it is cut off where it reached the length limit."""

    text: str
    num_tokens: int
    is_cut_off: bool


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's responses to one question.

    Attributes:
        digest: the question's (`questions.digest_of`).
        refused: why the prompt was set aside; then there are no responses.
    """

    question_id: str
    digest: str
    responses: tuple[Response, ...]
    refused: str = ""


class Journal:
    """Appends replies to a file, and knows those of an interrupted run.

    Attributes:
        replies: by question id.
    """

    def __init__(self, folder: Path, model_identity: str) -> None:
        """Open or begin the file.

        Args:
            model_identity: changes when the model's files do.

        Raises:
            ValueError: the file was begun with another model, or is not ours.
        """
        self._path = folder / FILE
        self.replies: dict[str, Reply] = {}
        header = {"model": model_identity}
        lines = self._whole_lines() if self._path.exists() else []
        if lines:
            found = self._read(lines)
            if found != header:
                raise ValueError(
                    f"output={str(folder)!r} holds responses of a model whose files have changed "
                    "since; give another output="
                )
        self._file = self._path.open("a", encoding="utf-8", newline="\n")
        if not lines:
            self._write(header)

    def add(self, reply: Reply) -> None:
        """Append a reply; it survives what ends the process afterwards."""
        self._write(
            {
                "question_id": reply.question_id,
                "digest": reply.digest,
                "responses": [list(response) for response in reply.responses],
                "refused": reply.refused,
            }
        )
        self.replies[reply.question_id] = reply

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, value: Mapping[str, object]) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def _whole_lines(self) -> list[bytes]:
        """Return the lines, after cutting off one that was being written when the process died."""
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        return whole.split(b"\n")[:-1]

    def _read(self, lines: list[bytes]) -> dict[str, str]:
        try:
            header, *values = (json.loads(line) for line in lines)
            for value in values:
                responses = tuple(Response(*response) for response in value["responses"])
                reply = Reply(value["question_id"], value["digest"], responses, value["refused"])
                self.replies[reply.question_id] = reply
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self._path} is damaged or no file of an evaluation ({error!r}); remove it, or "
                "give another output="
            ) from error
        return header

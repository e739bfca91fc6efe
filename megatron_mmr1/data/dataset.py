"""Parquet rows to `Prompt` and `Demonstration`, checked when the file is opened.

Owns the columns, the checks of each row and a small cache. A bad row is set aside with its id and
the reason, never repaired and never cut; the rest is used. Does not own who is drawn (sampling/) or
how a prompt is tokenised (processor.py).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from megatron_mmr1.data.images import decode_image, read_below
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.types import Demonstration, Prompt

CACHE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was set aside.

    Attributes:
        row: its number in the file, from 0.
    """

    row: int
    row_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class RowSize:
    """What balancing and packing know of a row before it is loaded.

    Attributes:
        num_prompt_tokens: visual tokens included.
        num_response_tokens: of the demonstration; 0 where there is none.
        patches: of each image, before patches are merged into visual tokens.
    """

    num_prompt_tokens: int
    num_response_tokens: int
    patches: tuple[int, ...]


class _ParquetRows:
    """The checked rows of one file, and the prompts made of them.

    The file is held in memory as Arrow columns (encoded images). Prompts are made when asked for
    and kept, least recently used first out, within `cache_bytes`: RL draws them repeatedly.
    """

    required_columns: tuple[str, ...]
    optional_columns = ("id", "category", "source")
    limit: str  # what a message calls `max_tokens`

    def __init__(
        self,
        path: str | Path,
        processor: PromptProcessor,
        max_tokens: int = 2048,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Read the file and check every row.

        Args:
            path: a parquet file. Image paths in it are relative to its folder.
            processor: of the model that is trained.
            max_tokens: longer rows are set aside: prompt, visual tokens included, and response.
            cache_bytes: of prompts to keep in memory.

        Raises:
            ValueError: no such file, missing or unknown columns, or every row is bad.
        """
        self.path = Path(path)
        self.bad_rows: list[BadRow] = []
        self._processor = processor
        self._table = self._read_table()
        self._cache: OrderedDict[int, tuple[Prompt, str]] = OrderedDict()
        self._cached_bytes = 0
        self._max_cached_bytes = cache_bytes
        self._rows: list[int] = []
        self.prompt_ids: list[str] = []
        self.categories: list[str] = []
        self.sources: list[str] = []
        self.sizes: list[RowSize] = []
        self._check_rows(max_tokens)
        self._index_of = {prompt_id: index for index, prompt_id in enumerate(self.prompt_ids)}

    def __len__(self) -> int:
        """How many rows are usable."""
        return len(self._rows)

    def _parse(self, row: dict[str, Any]) -> tuple[str, str, str]:
        """The question, the gold answer and the response of a row ("" where it has none)."""
        raise NotImplementedError

    def _read_table(self) -> pa.Table:
        if not self.path.is_file():
            raise ValueError(f"{self.path} does not exist; give the path of a parquet file")
        try:
            table = pq.read_table(self.path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.path} is not a parquet file ({error})") from error
        allowed = {*self.required_columns, *self.optional_columns}
        expected = (
            f"expected {', '.join(self.required_columns)}, and optionally id, category, source"
        )
        for column in self.required_columns:
            if column not in table.column_names:
                raise ValueError(
                    f"{self.path} has no column {column!r} ({expected}); rename or add it"
                )
        for column in table.column_names:
            if column not in allowed:
                raise ValueError(
                    f"{self.path} has an unknown column {column!r} ({expected}); drop or rename it"
                )
        return table

    def _check_rows(self, max_tokens: int) -> None:
        seen = set()
        for number in range(self._table.num_rows):
            row = self._row(number)
            try:
                if row["id"] in seen:
                    raise ValueError("duplicate id")
                size = self._check_row(row, max_tokens)
            except ValueError as error:
                self.bad_rows.append(BadRow(number, row["id"], str(error)))
                continue
            seen.add(row["id"])
            self._rows.append(number)
            self.prompt_ids.append(row["id"])
            self.categories.append(row["category"])
            self.sources.append(row.get("source") or "")
            self.sizes.append(size)
        if not self._rows:
            reasons = Counter(bad.reason for bad in self.bad_rows).most_common(3)
            counted = "; ".join(f"{count} x {reason}" for reason, count in reasons)
            raise ValueError(f"{self.path} has no usable row ({counted or 'it is empty'})")

    def _check_row(self, row: dict[str, Any], max_tokens: int) -> RowSize:
        question, _, response = self._parse(row)
        pictures = [decode_image(data) for data in self._image_files(row)]
        size = RowSize(
            self._processor.count_tokens(question, pictures),
            len(self._processor.response_token_ids(response)) if response else 0,
            tuple(self._processor.count_patches(picture) for picture in pictures),
        )
        num_tokens = size.num_prompt_tokens + size.num_response_tokens
        if num_tokens > max_tokens:
            raise ValueError(f"{num_tokens} tokens exceed {self.limit}={max_tokens}")
        return size

    def _row(self, number: int) -> dict[str, Any]:
        """One row as a dict; a file without ids names its rows by number."""
        row = self._table.slice(number, 1).to_pylist()[0]
        row_id = row.get("id")
        row["id"] = f"row-{number}" if row_id in (None, "") else str(row_id)
        row["category"] = row.get("category") or ""
        return row

    def _image_files(self, row: dict[str, Any]) -> list[bytes]:
        """The encoded images of a row: its own bytes, or files below the parquet file's folder."""
        files = []
        for image in row["images"] or []:
            data, path = (image.get("bytes"), image.get("path")) if image else (None, None)
            if data is None and not path:
                raise ValueError("an image has neither bytes nor path")
            files.append(data if data is not None else read_below(self.path.parent, str(path)))
        return files

    def index_of(self, prompt_id: str) -> int:
        """The index of a usable row."""
        return self._index_of[prompt_id]

    def image_files(self, index: int) -> tuple[bytes, ...]:
        """The encoded images of a usable row, without processing them."""
        return tuple(self._image_files(self._row(self._rows[index])))

    def _prompt(self, index: int) -> tuple[Prompt, str]:
        """The prompt of a usable row, from the cache or made, and the response of its row."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        row = self._row(self._rows[index])
        question, answer, response = self._parse(row)
        images = self._image_files(row)
        prompt = self._processor.prompt(row["id"], question, images, answer, row["category"])
        self._cache[index] = prompt, response
        self._cached_bytes += _size_bytes(prompt)
        while self._cached_bytes > self._max_cached_bytes:
            _, (dropped, _) = self._cache.popitem(last=False)
            self._cached_bytes -= _size_bytes(dropped)
        return prompt, response


class PromptDataset(_ParquetRows, Dataset[Prompt]):
    """Questions with a gold answer, in MMR1-RL's schema: `problem`, `answer`, `images`.

    `images` is a list of {bytes, path}; `problem` has one `<image>` for each. Optional columns:
    `id`, `category` and `source`.

    Attributes:
        prompt_ids, categories, sources, sizes: of the usable rows, in the order of the indices.
        bad_rows: what was set aside, and why.
    """

    required_columns = ("problem", "answer", "images")
    limit = "max_prompt_tokens"

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a usable row; processed the first time, then kept."""
        return self._prompt(index)[0]

    def _parse(self, row: dict[str, Any]) -> tuple[str, str, str]:
        answer = (row["answer"] or "").strip()
        if not answer:
            raise ValueError("empty answer")
        return row["problem"] or "", answer, ""


class DemonstrationDataset(_ParquetRows, Dataset[Demonstration]):
    """Questions with a response to imitate, in MMR1-SFT's schema: `conversations`, `images`.

    `conversations` is one human turn, with an `<image>` for each image, and one gpt turn. Optional
    columns: `id` and `category`. The prompts' gold answers are "".

    Attributes:
        prompt_ids, categories, sizes, bad_rows: as in `PromptDataset`.
    """

    required_columns = ("conversations", "images")
    limit = "max_tokens_per_microbatch"

    def __getitem__(self, index: int) -> Demonstration:
        """The demonstration of a usable row."""
        prompt, response = self._prompt(index)
        return Demonstration(prompt, self._processor.response_token_ids(response))

    def _parse(self, row: dict[str, Any]) -> tuple[str, str, str]:
        turns = row["conversations"] or []
        speakers = [turn["from"] for turn in turns]
        if speakers != ["human", "gpt"]:
            raise ValueError(f"conversation of {speakers}, not of one human and one gpt turn")
        question, response = (turn["value"] or "" for turn in turns)
        if not response.strip():
            raise ValueError("empty response")
        return question, "", response


def _size_bytes(prompt: Prompt) -> int:
    """Memory of a prompt's tensors and files."""
    tensors: Sequence[torch.Tensor | None] = (
        prompt.token_ids,
        prompt.position_ids,
        prompt.pixel_values,
        prompt.image_grid_thw,
    )
    return sum(t.nbytes for t in tensors if t is not None) + sum(len(i) for i in prompt.images)

"""Records to `Prompt`, checked when the source is opened.

Owns the keys of a record, the checks of each and a cache of prompts within a budget. A bad row is
set aside with its id and the reason, never repaired and never cut; the rest is used. Does not own
who is drawn (sampling/) or how a prompt is tokenised (processor.py).

Checking decodes every image once. What it found is kept on disk, so that it is done once for a
source, a model's processor and these settings.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from decimal import Decimal
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from megatron_mmr1 import __version__
from megatron_mmr1.data.image_files import ImageFiles
from megatron_mmr1.data.processor import Measure, PromptProcessor
from megatron_mmr1.data.records import BadRecord, Records, cache_folder, open_records
from megatron_mmr1.types import Prompt

CACHE_BYTES = 512 << 20
_NUM_LOOKED_AT = 100  # records, to see whether images are files of their own


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was set aside.

    Attributes:
        row: its number in the source, from 0.
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


class Keys(NamedTuple):
    """What a record calls its parts; by default as MMR1-RL and EasyR1 do.

    `id`, `category` and `source` are optional and always called so. Other keys are passed over.
    """

    problem: str = "problem"
    answer: str = "answer"
    images: str = "images"


class Asked(NamedTuple):
    """What a record asks: text with an `<image>` for each of the encoded images, and the gold."""

    question: str
    answer: str
    files: list[bytes]


@dataclass(frozen=True, slots=True)
class _Checked:
    """What checking found of a row; `reason`: "" if it is usable."""

    row_id: str
    category: str
    source: str
    num_tokens: int
    patches: tuple[int, ...]
    reason: str


class PromptDataset(Dataset[Prompt]):
    """Questions with a gold answer.

    Attributes:
        prompt_ids, categories, sources, sizes: of the usable rows, in the order of the indices.
        bad_rows: what was set aside, and why.
    """

    def __init__(
        self,
        source: str | Path,
        processor: PromptProcessor,
        max_tokens: int = 2048,
        max_images: int | None = None,
        keys: Keys | None = None,
        instruction: str = "",
        cache_bytes: int = CACHE_BYTES,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Open the source and check every row, or look up what an earlier check found.

        Args:
            source: see `records.open_records`. Image paths are relative to the file's folder.
            processor: of the model that is trained.
            max_tokens: longer prompts, visual tokens included, are set aside.
            max_images: prompts with more of them are set aside.
            instruction: put before every question, in the user's turn.
            cache_bytes: of prompts to keep in memory; those in use come on top.
            on_progress: told rows checked and rows in all.

        Raises:
            ValueError: no such source, a key that no row has, or every row is bad.
        """
        self.path = str(source)
        self.bad_rows: list[BadRow] = []
        self._keys, self._instruction = keys or Keys(), instruction
        self._processor, self._max_tokens, self._max_images = processor, max_tokens, max_images
        self._records = open_records(self.path)
        path = Path(source)
        self._files = ImageFiles(path.parent if path.is_file() else None)
        self._cache: OrderedDict[int, Prompt] = OrderedDict()
        self._cached_bytes, self._max_cached_bytes = 0, cache_bytes
        self._rows: list[int] = []
        self.prompt_ids: list[str] = []
        self.categories: list[str] = []
        self.sources: list[str] = []
        self.sizes: list[RowSize] = []
        _require_keys(self._records, self._keys, self.path)
        self._sort(self._known_or_checked(on_progress))
        self._index_of = {prompt_id: index for index, prompt_id in enumerate(self.prompt_ids)}

    def __len__(self) -> int:
        """How many rows are usable."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a usable row, from the cache or made."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        record = self._records[self._rows[index]]
        asked = read_question(record, self._keys, self._files, self._instruction)
        prompt = self._processor.prompt(
            self.prompt_ids[index],
            asked.question,
            asked.files,
            asked.answer,
            self.categories[index],
        )
        self._cache[index] = prompt
        self._cached_bytes += _size_bytes(prompt)
        while self._cached_bytes > self._max_cached_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= _size_bytes(dropped)
        return prompt

    def index_of(self, prompt_id: str) -> int:
        """The index of a usable row."""
        return self._index_of[prompt_id]

    def image_files(self, index: int) -> tuple[bytes, ...]:
        """The encoded images of a usable row, without processing them."""
        return tuple(self._files.read(self._records[self._rows[index]].get(self._keys.images)))

    def _known_or_checked(self, on_progress: Callable[[int, int], None]) -> list[_Checked]:
        """Look up what an earlier check found, or check; of several processes one checks."""
        from filelock import FileLock

        settings = {
            "version": __version__,
            "records": self._records.identity,
            "image_files": self._image_stamp(),
            "processor": self._processor.identity,
            "keys": self._keys,
            "instruction": self._instruction,
            "max_tokens": self._max_tokens,
            "max_images": self._max_images,
        }
        name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
        path = cache_folder() / f"{name}.checked.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if path.exists():
                with path.open(encoding="utf-8", newline="\n") as file:
                    lines = [json.loads(line) for line in file]
                return [_Checked(**{**line, "patches": tuple(line["patches"])}) for line in lines]
            found = list(self._checked(on_progress))
            partial = path.with_suffix(".partial")
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in found)
            partial.replace(path)
        return found

    def _image_stamp(self) -> str:
        """A hash of names, sizes and times of the image files that the records name.

        "" where the first records have their images in them: then all are taken to, and looking at
        all would read the whole file.
        """
        total, digest = len(self._records), hashlib.sha256()
        if not any(self._stamps(number) for number in range(min(total, _NUM_LOOKED_AT))):
            return ""
        for number in range(total):
            digest.update(repr(self._stamps(number)).encode(errors="surrogatepass"))
        return digest.hexdigest()

    def _stamps(self, number: int) -> list[tuple[str, int, int]]:
        try:
            return self._files.stamps(self._records[number].get(self._keys.images))
        except ValueError:
            return []

    def _checked(self, on_progress: Callable[[int, int], None]) -> Iterator[_Checked]:
        """Check all rows, in threads: what takes time, decoding, lets other threads run."""
        total = len(self._records)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for numbers in batched(range(total), 64):  # so many rows are in memory at once
                yield from threads.map(self._check, numbers)
                on_progress(numbers[-1] + 1, total)

    def _check(self, number: int) -> _Checked:
        record: dict[str, Any] = {}
        row_id, size, reason = f"row-{number}", RowSize(0, 0, ()), ""
        try:
            record = self._records[number]
            row_id = row_id_of(record, number)
            asked = read_question(record, self._keys, self._files, self._instruction)
            if self._max_images is not None and len(asked.files) > self._max_images:
                raise ValueError(
                    f"{len(asked.files)} images exceed rollout.max_images_per_prompt="
                    f"{self._max_images}"
                )
            size = prompt_size(asked, self._processor, self._max_tokens)
        except (BadRecord, ValueError) as error:
            reason = str(error) or type(error).__name__
        category, source = (_label(record.get(key)) for key in ("category", "source"))
        return _Checked(row_id, category, source, size.num_prompt_tokens, size.patches, reason)

    def _sort(self, checked: Sequence[_Checked]) -> None:
        """Keep what is usable, the first row of each id, and set aside the rest."""
        seen = set[str]()
        for number, row in enumerate(checked):
            reason = row.reason or ("duplicate id" if row.row_id in seen else "")
            if reason:
                self.bad_rows.append(BadRow(number, row.row_id, reason))
                continue
            seen.add(row.row_id)
            self._rows.append(number)
            self.prompt_ids.append(row.row_id)
            self.categories.append(row.category)
            self.sources.append(row.source)
            self.sizes.append(RowSize(row.num_tokens, 0, row.patches))
        if not self._rows:
            raise ValueError(f"{self.path} has no usable row ({summary(self.bad_rows)})")


def summary(bad_rows: Sequence[BadRow]) -> str:
    """Return the most frequent reasons and how often each came."""
    reasons = Counter(bad.reason for bad in bad_rows).most_common(3)
    return "; ".join(f"{count} x {reason}" for reason, count in reasons) or "it is empty"


def read_question(record: dict[str, Any], keys: Keys, files: ImageFiles, instruction: str) -> Asked:
    """Read a record's text, gold and encoded images.

    Raises:
        ValueError: with the reason why the row is bad.
    """
    answer, question = _answer(record, keys), record.get(keys.problem)
    if not isinstance(question, str):
        raise ValueError(f"{keys.problem} is {type(question).__name__}, not text")
    if not question.strip():
        raise ValueError(f"empty {keys.problem}")
    found = files.read(record.get(keys.images))
    return Asked(f"{instruction}\n{question}" if instruction else question, answer, found)


def prompt_size(asked: Asked, measure: Measure, max_tokens: int) -> RowSize:
    """Decode the images and count the tokens of a question.

    Raises:
        ValueError: with the reason why the row is bad.
    """
    pictures = [measure.picture(data) for data in asked.files]
    num_tokens = measure.count_tokens(asked.question, pictures)
    if num_tokens > max_tokens:
        raise ValueError(f"{num_tokens} tokens exceed max_prompt_tokens={max_tokens}")
    return RowSize(num_tokens, 0, tuple(measure.count_patches(picture) for picture in pictures))


def _require_keys(records: Records, keys: Keys, name: str) -> None:
    """Refuse a table that lacks a column; JSON records are checked one by one."""
    for part, key in keys._asdict().items():
        is_left_out = part == "images" and key == Keys().images  # text alone
        if records.columns is not None and key not in records.columns and not is_left_out:
            raise ValueError(
                f"{name} has no column {key!r}; it has {', '.join(records.columns)}: name the right"
                f" one as data.{part}_key"
            )


def row_id_of(record: dict[str, Any], number: int) -> str:
    """Return a record's id; one without is named by its number."""
    return _label(record.get("id")) or f"row-{number}"


def _label(value: Any) -> str:
    """Write a name as text; null and NaN (pandas' empty cell) are ""."""
    return "" if value is None or value != value else str(value)


def _answer(record: dict[str, Any], keys: Keys) -> str:
    answer = record.get(keys.answer)
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        raise ValueError("empty answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal):
        raise ValueError(f"{keys.answer} is {type(answer).__name__}, not text or a number")
    text = str(answer).strip()
    if not text:
        raise ValueError("empty answer")
    return text


def _size_bytes(prompt: Prompt) -> int:
    """Memory of a prompt's tensors and files."""
    tensors: Sequence[torch.Tensor | None] = (
        prompt.token_ids,
        prompt.position_ids,
        prompt.pixel_values,
        prompt.image_grid_thw,
    )
    return sum(t.nbytes for t in tensors if t is not None) + sum(len(i) for i in prompt.images)

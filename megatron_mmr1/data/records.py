"""Records of a data file by number, in constant memory: parquet, JSON arrays, JSON lines, hub ids.

Owns where a record is and how it becomes a dict. Does not own what a record means (dataset.py,
demonstrations.py), nor where its images are (image_files.py).

Parquet and hub ids go through the `datasets` library, whose cache on disk is memory-mapped. JSON is
read in place: an index of byte ranges is made once, kept in the same cache, and looked up by the
file's path, size and time. A record is then one slice of a memory map.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from megatron_mmr1.config.validate import is_hub_id

_CHUNK = 64 << 20  # bytes scanned between two words of progress
_MAX_RECORD_BYTES = 256 << 20


class BadRecord(ValueError):
    """A record that can't be read; the others can."""


class Records(ABC):
    """So many records; thread-safe to read."""

    columns: tuple[str, ...] | None = None  # None: each record has its own
    identity: str  # of the source as it is now

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a record.

        Raises:
            BadRecord: with the reason.
        """


def open_records(
    source: str, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Records:
    """Open a file by its name: .parquet, .json (an array), .jsonl; or OWNER/NAME[:SPLIT][@REVISION]
    of the hub.

    Args:
        on_progress: told bytes done and bytes in all while a JSON index is made.

    Raises:
        ValueError: there is no such file, its kind is unknown, or it is damaged as a whole.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix == ".parquet":
            return _of_parquet(path)
        if path.suffix in (".json", ".jsonl", ".ndjson"):
            return JsonRecords(path, on_progress)
        raise ValueError(f"{path} is neither .parquet nor .json nor .jsonl; convert or rename it")
    if is_hub_id(source):
        return _of_hub(source)
    raise ValueError(
        f"{source} does not exist; give a .parquet, .json or .jsonl file, or a hub id as "
        "OWNER/NAME:SPLIT"
    )


class ArrowRecords(Records):
    """Rows of a memory-mapped table of the `datasets` library; images stay encoded."""

    def __init__(self, dataset: Any) -> None:
        self.columns = tuple(dataset.column_names)
        self.identity = str(dataset._fingerprint)  # the library's name of its cache
        self._rows = dataset.with_format("arrow")  # no feature decodes anything

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a row."""
        return self._rows[number].to_pylist()[0]


def _of_parquet(path: Path) -> ArrowRecords:
    import datasets
    import pyarrow
    import pyarrow.dataset
    import pyarrow.parquet as pq
    from datasets.exceptions import DatasetGenerationError

    try:
        pq.read_schema(path)  # the library's own words for a damaged file are a page long
        dataset = datasets.load_dataset(
            "parquet",
            data_files={"train": str(path)},
            split="train",
            verification_mode="no_checks",
            # Otherwise the whole file is read ahead; so, at most Arrow's limit of 1 GiB.
            fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False),
        )
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error})") from error
    pyarrow.default_memory_pool().release_unused()  # what was read ahead goes back to the system
    return ArrowRecords(dataset)


def _of_hub(source: str) -> ArrowRecords:
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, revision = source.partition("@")
    name, _, split = name.partition(":")
    try:
        dataset = datasets.load_dataset(name, split=split or "train", revision=revision or None)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"{source} can't be loaded from the hub ({error}); hubs are asked only with "
            "HF_HUB_OFFLINE=0 in the environment; check name and split, or download it and give "
            "the file"
        ) from error
    return ArrowRecords(dataset)


class JsonRecords(Records):
    """Records of a JSON array, or of JSON lines, each a slice of a memory map.

    Memory: 16 bytes a record.
    """

    def __init__(
        self, path: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        self.path = path
        self._size = path.stat().st_size
        if self._size == 0:
            raise ValueError(f"{path} is empty")
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        status = path.stat()
        self.identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        self._ranges_N2 = self._index(on_progress)

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._ranges_N2)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Parse a record."""
        start, stop = self._ranges_N2[number].tolist()
        if stop - start > _MAX_RECORD_BYTES:
            raise BadRecord(f"a record of {stop - start} bytes; the limit is {_MAX_RECORD_BYTES}")
        try:
            # UnicodeDecodeError, huge integers and broken syntax are ValueErrors.
            record = _parse(self._bytes[start:stop])
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"not readable as JSON ({type(error).__name__}: {error})") from error
        if not isinstance(record, dict):
            raise BadRecord(f"a JSON {type(record).__name__}, not an object")
        return record

    def _index(self, on_progress: Callable[[int, int], None]) -> np.ndarray:
        """Return every record's [start, stop) in bytes, int64 [N, 2], kept or made."""
        name = hashlib.sha256(self.identity.encode()).hexdigest()[:32]
        cached = cache_folder() / f"{name}.npy"
        if cached.exists():
            return np.load(cached, mmap_mode="r", allow_pickle=False)
        data = np.frombuffer(self._bytes, np.uint8)
        ranges_N2 = scan(data, str(self.path), on_progress)
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, ranges_N2)
        partial.replace(cached)
        return ranges_N2


def _parse(encoded: bytes) -> Any:
    record = json.loads(encoded.decode("utf-8"))
    if b"\\ud" in encoded or b"\\uD" in encoded:  # half of a pair, which no tokenizer takes
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    return record


def cache_folder() -> Path:
    """Return where indexes are kept: in the cache of the `datasets` library (HF_DATASETS_CACHE)."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "megatron_mmr1"


def scan(
    data: np.ndarray, name: str, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> np.ndarray:
    """Return the byte ranges of the records of a file, int64 [N, 2].

    A file whose first character is "[" is an array; any other is JSON lines. Lines end in "\\n"
    alone: other line separators may stand inside a string.

    Args:
        data: uint8, the whole file.

    Raises:
        ValueError: an array that doesn't end, or goes on after its end.
    """
    begin = 3 if data[:3].tobytes() == b"\xef\xbb\xbf" else 0  # a byte order mark
    while begin < len(data) and data[begin] in b" \t\r\n":
        begin += 1
    is_array = begin < len(data) and data[begin] == ord("[")
    state = np.zeros(5, np.int64)
    state[_START] = -1
    found = []
    for start in range(begin, len(data), _CHUNK):
        stop = min(start + _CHUNK, len(data))
        # A record takes two bytes at least: itself, and a comma or a line end.
        ranges = np.empty(((stop - start) // 2 + 2, 2), np.int64)
        count = (_scan_array if is_array else _scan_lines)(data, start, stop, state, ranges)
        found.append(ranges[:count].copy())
        on_progress(stop, len(data))
        if count < 0:
            raise ValueError(f"{name} goes on after the end of its array, at byte {state[_START]}")
    if is_array and not state[_IS_OVER]:
        done = sum(len(ranges) for ranges in found)
        raise ValueError(f"{name} ends in the midst of record {done}: it is cut off; copy it again")
    if not is_array and state[_START] >= 0:
        found.append(np.array([[state[_START], len(data)]], np.int64))
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


# State of a scan that goes on in the next chunk.
_DEPTH, _IN_STRING, _ESCAPED, _START, _IS_OVER = range(5)
_QUOTE, _BACKSLASH, _COMMA, _NEWLINE = ord('"'), ord("\\"), ord(","), ord("\n")
_OPEN_LIST, _CLOSE_LIST, _OPEN_DICT, _CLOSE_DICT = (ord(c) for c in "[]{}")
_SPACE, _TAB, _RETURN = ord(" "), ord("\t"), ord("\r")


@njit(cache=True)
def _scan_array(
    data: np.ndarray, start: int, stop: int, state: np.ndarray, ranges: np.ndarray
) -> int:
    """Find the elements of the outermost array that end in [start, stop); -1: what follows it."""
    count = 0
    for i in range(start, stop):
        c = data[i]
        if state[_IN_STRING]:
            if state[_ESCAPED]:
                state[_ESCAPED] = 0
            elif c == _BACKSLASH:
                state[_ESCAPED] = 1
            elif c == _QUOTE:
                state[_IN_STRING] = 0
            continue
        if c in (_SPACE, _NEWLINE, _TAB, _RETURN):
            continue
        if state[_IS_OVER]:
            state[_START] = i
            return -1
        if state[_DEPTH] == 1 and (c in (_COMMA, _CLOSE_LIST)):
            if state[_START] >= 0:
                ranges[count, 0], ranges[count, 1] = state[_START], i
                count += 1
                state[_START] = -1
            if c == _CLOSE_LIST:
                state[_DEPTH] = 0
                state[_IS_OVER] = 1
            continue
        if state[_DEPTH] == 1 and state[_START] < 0:
            state[_START] = i
        if c == _QUOTE:
            state[_IN_STRING] = 1
        elif c in (_OPEN_LIST, _OPEN_DICT):
            state[_DEPTH] += 1
        elif c in (_CLOSE_LIST, _CLOSE_DICT):
            state[_DEPTH] -= 1
    return count


@njit(cache=True)
def _scan_lines(
    data: np.ndarray, start: int, stop: int, state: np.ndarray, ranges: np.ndarray
) -> int:
    """Find the lines that end in [start, stop) and are not blank."""
    count = 0
    for i in range(start, stop):
        c = data[i]
        if c == _NEWLINE:
            if state[_START] >= 0:
                ranges[count, 0], ranges[count, 1] = state[_START], i
                count += 1
                state[_START] = -1
        elif state[_START] < 0 and c != _SPACE and c != _TAB and c != _RETURN:
            state[_START] = i
    return count

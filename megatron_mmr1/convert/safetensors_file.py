"""The safetensors format: a checked header, and tensors read and written at their offsets.

8 bytes N | N bytes of JSON: name -> dtype, shape, data_offsets | the tensors, end to end
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mmr1.convert.open_file import BLOCK_BYTES, OpenFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """How many bytes its values take."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds.

    Attributes:
        tensors: by name, in the order of their bytes.
        offsets: of each tensor's first byte in the file.
        metadata: the file's own, as `{"format": "pt"}`.
    """

    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check a file's header: every byte of the file belongs to exactly one tensor.

    Raises:
        ValueError: it is no safetensors file, or cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise _corrupt(path, f"its header would take {length} bytes of {size}")
        text = file.read(length)
    try:
        entries: Any = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are no strings")
        placed = sorted((_placed(name, entry) for name, entry in entries.items()), key=_first_byte)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(path, f"its header cannot be read ({error!r})") from error
    start, tensors, offsets = 8 + length, {}, {}
    end = 0
    for begin, name, info in placed:
        if begin != end:
            raise _corrupt(path, f"{name} starts at byte {begin} of the data, expected {end}")
        tensors[name], offsets[name] = info, start + begin
        end += info.num_bytes
    if start + end != size:
        raise _corrupt(path, f"it has {size} bytes, but its header describes {start + end}")
    return Header(tensors, offsets, metadata)


def header_bytes(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], length: int | None = None
) -> bytes:
    """Return a header, with its length in front, for tensors that lie in the order given.

    Args:
        length: fill up with spaces to this many bytes; None: to the next multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, info in tensors.items():
        begin, end = end, end + info.num_bytes
        dtype = _NAME_OF[info.dtype]
        entries[name] = {"dtype": dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text.ljust(len(text) + -len(text) % 8 if length is None else length)
    return len(padded).to_bytes(8, "little") + padded


class FileReader:
    """One safetensors file, open."""

    def __init__(self, path: Path, is_read_once: bool = True) -> None:
        self.header = read_header(path)
        self._file = OpenFile(path, is_read_once=is_read_once)

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """Return a tensor, in `out` if that is given: contiguous, of its dtype and shape."""
        info = self.header.tensors[name]
        if out is None:
            out = torch.empty(info.shape, dtype=info.dtype)
        self._file.read_into(out, self.header.offsets[name])
        return out

    def blocks(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in bounded blocks."""
        offset, left = self.header.offsets[name], self.header.tensors[name].num_bytes
        while left:
            block = memoryview(bytearray(min(left, BLOCK_BYTES)))
            self._file.read_bytes_into(block, offset)
            yield block
            offset, left = offset + len(block), left - len(block)

    def will_need(self, name: str) -> None:
        """Have the system read a tensor ahead."""
        self._file.will_need(self.header.offsets[name], self.header.tensors[name].num_bytes)

    def close(self) -> None:
        """Give the descriptor back."""
        self._file.close()


class FileWriter:
    """One safetensors file whose tensors are known before the first is written, in any order.

    Several processes may write one file: one with `is_new`, the others once that one has begun.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str],
        is_new: bool = True,
    ) -> None:  # fmt: skip
        header = header_bytes(tensors, metadata)
        self._tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        end = len(header)
        for name, info in tensors.items():
            self._offsets[name] = end
            end += info.num_bytes
        self._file = OpenFile(path, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if is_new else 0))
        if is_new:
            self._file.truncate(end)
            self._file.write_bytes(header, 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place."""
        info = self._tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape), name
        self._file.write(tensor, self._offsets[name])

    def close(self) -> None:
        """Wait until all of it is on disk, and give the descriptor back."""
        self._file.sync()
        self._file.close()


class GrowingFile:
    """One safetensors file whose tensors are not known before: room is kept for its header."""

    HEADER_BYTES = 1 << 20

    def __init__(self, path: Path) -> None:
        self._file = OpenFile(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self.tensors: dict[str, TensorInfo] = {}
        self.num_bytes = 0
        self._header_bytes = 1000

    def has_room(self, name: str, num_bytes: int, max_bytes: int) -> bool:
        """Say whether a tensor fits in; the first one always does."""
        header_fits = self._header_bytes + self._entry_bytes(name) <= self.HEADER_BYTES
        return not self.tensors or (header_fits and self.num_bytes + num_bytes <= max_bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        self._file.write(tensor, 8 + self.HEADER_BYTES + self.num_bytes)
        self.tensors[name] = TensorInfo(tensor.dtype, tuple(tensor.shape))
        self.num_bytes += tensor.nbytes
        self._header_bytes += self._entry_bytes(name)

    def close(self) -> None:
        """Write the header, and wait until all is on disk."""
        header = header_bytes(self.tensors, {"format": "pt"}, self.HEADER_BYTES)
        self._file.write_bytes(header, 0)
        self._file.sync()
        self._file.close()

    @staticmethod
    def _entry_bytes(name: str) -> int:
        return 6 * len(name) + 300


def _placed(name: str, entry: Any) -> tuple[int, str, TensorInfo]:
    begin, end = entry["data_offsets"]
    numbers: Sequence[Any] = [begin, end, *entry["shape"]]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name} has numbers that are none: {entry}")
    info = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if end - begin != info.num_bytes:
        raise ValueError(f"{name} has {end - begin} bytes for {entry['dtype']} {entry['shape']}")
    return begin, name, info


def _first_byte(placed: tuple[int, str, TensorInfo]) -> tuple[int, int]:
    return placed[0], placed[2].num_bytes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _corrupt(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is no complete safetensors file: {why}; copy it again")

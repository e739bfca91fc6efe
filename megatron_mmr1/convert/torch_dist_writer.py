"""Writes checkpoints in Megatron's `torch_dist` format (see torch_dist.py), tensor by tensor."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mmr1.convert.open_file import OpenFile
from megatron_mmr1.convert.torch_dist import Box

_MARK = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_HINT_BYTES = 8 << 20


class TorchDistWriter:
    """One rank's `.distcp` file, and what `.metadata` says of it.

    Attributes:
        entries: what was written: a box and its dtype (None for an object), and where.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._name = f"__{rank}_0.distcp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._file: Any = _Appender(OpenFile(folder / self._name, flags))
        self.entries: list[tuple[Box, torch.dtype | None, _StorageInfo]] = []

    def write(self, box: Box, tensor: Tensor) -> None:
        """Write a box; the tensor has no memory but its own (torch.save would write all of it)."""
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        self._save(box, tensor.reshape(box.sizes), tensor.dtype)

    def write_object(self, key: str, value: Any) -> None:
        """Write something else than a tensor."""
        self._save(Box(key, (), (), ()), value, None)

    def _save(self, box: Box, value: Any, dtype: torch.dtype | None) -> None:
        start = self._file.tell()
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # a third of the time of writing
        try:
            torch.save(value, self._file)
        finally:
            torch.serialization.set_crc32_options(before)
        place = _StorageInfo(self._name, start, self._file.tell() - start)
        self.entries.append((box, dtype, place))

    def close(self) -> None:
        """Wait until all is on disk."""
        self._file.file.sync()
        self._file.file.close()


def write_metadata(
    folder: Path, entries: Iterable[tuple[Box, torch.dtype | None, _StorageInfo]]
) -> None:
    """Write `.metadata` and `metadata.json` for what all ranks have written."""
    state: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for box, dtype, place in entries:
        if dtype is None:
            state[box.key] = BytesStorageMetadata()
            storage[MetadataIndex(box.key)] = place
            continue
        if box.key not in state:
            size = torch.Size(box.global_shape)
            state[box.key] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [])
        chunks = state[box.key].chunks
        index = MetadataIndex(box.key, box.offset, len(chunks))
        assert index not in storage, box
        chunks.append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.sizes)))
        storage[index] = place
    metadata = Metadata(state, None, storage, StorageMeta(), "1.0.0")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps(_MARK), encoding="utf-8")


class _Appender:
    """The end of a file, for torch.save."""

    def __init__(self, file: OpenFile) -> None:
        self.file, self._at, self._hinted = file, 0, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.file.write_bytes(view, self._at)
        self._at += len(view)
        if self._at - self._hinted >= _HINT_BYTES:  # torch.save writes in small pieces
            self.file.give_back(self._hinted, self._at - self._hinted)
            self._hinted = self._at
        return len(view)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        pass

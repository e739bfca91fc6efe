"""Megatron's `torch_dist` checkpoints, read one tensor at a time, without Megatron.

    .metadata        a pickle: which part of which global tensor lies where
    __R_I.distcp     rank R's tensors, each as torch.save writes it
    metadata.json    Megatron's mark of the format

Megatron stacks the layers: `language.decoder.layers.mlp.linear_fc2.weight` is one global tensor of
all layers, and a parameter of one layer is a box in it (`Box`).

Security: `.metadata` goes through an unpickler that knows an allow-list of harmless classes, and
everything else is read with weights_only.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_mmr1.convert.hf_files import is_plain_file
from megatron_mmr1.convert.open_file import OpenFile
from megatron_mmr1.convert.safetensors_file import TensorInfo

_ALLOWED = {
    "torch": {
        "Size",
        "float32",
        "bfloat16",
        "float16",
        "float64",
        "int64",
        "int32",
        "uint8",
        "bool",
    },
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a global tensor.

    Attributes:
        key: the global tensor's name.
        offset: of the part's first element in each dim.
        sizes: of the part in each dim.
        global_shape: the whole tensor's.
        may_be_padded: the global tensor may be longer in its first dim (a padded vocabulary).
    """

    key: str
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    global_shape: tuple[int, ...]
    may_be_padded: bool = False


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a global tensor as it was saved, and where."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    place: _StorageInfo


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _ALLOWED.get(module_name, ()):
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def read_metadata(path: Path) -> Metadata:
    """Read a `.metadata` file that names nothing but the classes which torch writes there.

    Raises:
        ValueError: another class or function is named (unpickling it could run code), or it's no
            pickle of a checkpoint's metadata.
    """
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise _not_metadata(path, str(error)) from error
    except (IndexError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise _not_metadata(path, f"it is damaged ({error!r})") from error
    if not isinstance(metadata, Metadata):
        raise _not_metadata(path, f"it holds a {type(metadata).__name__}")
    return metadata


class TorchDistReader:
    """The tensors of a checkpoint: any box of any global tensor, whatever layout it was saved at.

    Args:
        folder: the checkpoint.

    Attributes:
        tensors: every global tensor's dtype and shape, the optimizer's among them.

    Raises:
        ValueError: the checkpoint is half-written, damaged, or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_mark(folder)
        if not (folder / ".metadata").is_file():
            raise ValueError(f"{folder} has no .metadata: its writing was never finished")
        metadata = read_metadata(folder / ".metadata")
        self.tensors: dict[str, TensorInfo] = {}
        # By their extent in the first dim, as a rule the layer: there may be 10,000s of experts.
        self._parts: dict[str, dict[tuple[int, int], list[_Part]]] = {}
        try:
            for key, value in metadata.state_dict_metadata.items():
                if isinstance(value, TensorStorageMetadata):
                    self.tensors[key] = TensorInfo(value.properties.dtype, tuple(value.size))
                    self._parts[key] = {}
                    for chunk in value.chunks:
                        place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                        part = _Part(tuple(chunk.offsets), tuple(chunk.sizes), place)
                        self._parts[key].setdefault(_first_dim(part), []).append(part)
        except (AttributeError, KeyError, TypeError) as error:
            raise _not_metadata(folder / ".metadata", f"it is damaged ({error!r})") from error
        self._files = self._open_files()

    def _open_files(self) -> dict[str, OpenFile]:
        ends: dict[str, int] = {}
        for groups in self._parts.values():
            for part in (part for group in groups.values() for part in group):
                place = part.place
                if not is_plain_file(place.relative_path) or place.offset < 0:
                    raise _not_metadata(
                        self.folder / ".metadata", f"it points to {place.relative_path!r}"
                    )
                end = place.offset + place.length
                ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
        for file, end in sorted(ends.items()):
            path = self.folder / file
            if not path.is_file():
                raise ValueError(
                    f"{self.folder} lacks {file}, which its .metadata names; "
                    "complete the copy of the checkpoint"
                )
            if path.stat().st_size < end:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, but .metadata describes {end}: it "
                    "is cut short; copy it again"
                )
        return {file: OpenFile(self.folder / file) for file in ends}

    def check(self, box: Box) -> None:
        """Refuse a checkpoint that does not hold a box's global tensor in the expected shape.

        Raises:
            ValueError: the tensor is missing or of another shape.
        """
        if box.key not in self.tensors:
            raise ValueError(
                f"{self.folder} has no tensor {box.key!r}: it is a checkpoint of another model; "
                "give the model's own folder as --template"
            )
        found, expected = self.tensors[box.key].shape, box.global_shape
        is_padded = box.may_be_padded and found[1:] == expected[1:] and found[0] >= expected[0]
        if found != expected and not is_padded:
            raise ValueError(
                f"{self.folder}: {box.key} is of shape {found}, but config.json describes "
                f"{expected}; it is a checkpoint of another model, give that one as --template"
            )

    def read(self, box: Box) -> Tensor:
        """Return a box's values.

        Raises:
            ValueError: the checkpoint's parts do not cover it, or one is damaged.
        """
        out: Tensor | None = None
        num_found = 0
        for part in self._parts_in(box):
            tensor = self._read_part(box.key, part)
            if (part.offset, part.sizes) == (box.offset, box.sizes):
                return tensor
            if out is None:
                out = torch.empty(box.sizes, dtype=self.tensors[box.key].dtype)
            low, sizes = _overlap(box, part)
            out[_slices(low, sizes, box.offset)] = tensor[_slices(low, sizes, part.offset)]
            num_found += torch.Size(sizes).numel()
        if out is None or num_found != out.numel():
            raise ValueError(
                f"{self.folder}: the parts of {box.key} do not cover it; its .metadata is damaged, "
                "copy the checkpoint again"
            )
        return out

    def will_need(self, box: Box) -> None:
        """Have the system read a box ahead."""
        for part in self._parts_in(box):
            self._files[part.place.relative_path].will_need(part.place.offset, part.place.length)

    def position(self, box: Box) -> tuple[str, int]:
        """Return where the first part of a box lies, to read in the order of the files."""
        places = [part.place for part in self._parts_in(box)]
        return min(((place.relative_path, place.offset) for place in places), default=("", 0))

    def _parts_in(self, box: Box) -> Iterator[_Part]:
        start, size = _first_dim(box)
        for (first, length), parts in self._parts[box.key].items():
            if first < start + size and start < first + length:
                yield from (part for part in parts if 0 not in _overlap(box, part)[1])

    def _read_part(self, key: str, part: _Part) -> Tensor:
        place = part.place
        file: Any = _Slice(self._files[place.relative_path], place.offset, place.length)
        where = f"{self.folder / place.relative_path}: the part of {key} at byte {place.offset}"
        try:
            tensor = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{where} is damaged; copy the file again") from error
        is_tensor = isinstance(tensor, Tensor)
        if not is_tensor or tensor.shape != part.sizes or tensor.dtype != self.tensors[key].dtype:
            raise ValueError(f"{where} is not what .metadata says; copy the checkpoint again")
        return tensor

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


class _Slice(io.RawIOBase):
    """A part of a file, for torch.load: values go straight into the tensor."""

    def __init__(self, file: OpenFile, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._length - self._at)]
        self._file.read_bytes_into(view, self._start + self._at)
        self._at += len(view)
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _check_mark(folder: Path) -> None:
    if folder.name.endswith(".partial") or any(p.startswith("partial_") for p in folder.parts[-2:]):
        raise ValueError(f"{folder} is half-written: its writing was never finished; give another")
    path = folder / "metadata.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is no Megatron checkpoint, or a half-written one (no metadata.json); give "
            "a folder that convert_hf_to_megatron.py wrote, or RUN/checkpoints/step_N"
        )
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); copy the checkpoint again") from error
    if backend != "torch_dist":
        raise ValueError(f"{path}: sharded_backend={backend!r} is not read; save as 'torch_dist'")


def _first_dim(place: Box | _Part) -> tuple[int, int]:
    return (place.offset[0], place.sizes[0]) if place.sizes else (0, 1)


def _overlap(box: Box, part: _Part) -> tuple[list[int], list[int]]:
    """Return the first element and the sizes of what a box and a part share."""
    low = [max(a, b) for a, b in zip(box.offset, part.offset, strict=True)]
    ends = zip(low, box.offset, box.sizes, part.offset, part.sizes, strict=True)
    return low, [max(0, min(a + n, b + m) - at) for at, a, n, b, m in ends]


def _slices(low: Sequence[int], sizes: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, a - o + n) for a, n, o in zip(low, sizes, origin, strict=True))


def _not_metadata(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is not the metadata of a Megatron checkpoint: {why}")

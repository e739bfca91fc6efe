"""Hugging Face model folders: reading safetensors (single or sharded) and writing a complete
folder, one tensor in memory at a time.

Only safetensors are read; pickled weights are refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_mmr1.config.model_folder import INDEX, SINGLE, check_model_folder, read_index
from megatron_mmr1.convert.safetensors_file import (
    FileReader,
    FileWriter,
    GrowingFile,
    TensorInfo,
)

MAX_SHARD_BYTES = 5_000_000_000
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
_SUBFOLDERS = ("additional_chat_templates",)


class HfWeights:
    """The tensors of a model folder by name, read one at a time.

    Args:
        key: the setting or option that named the folder, for messages.
        is_read_once: see OpenFile. A node's processes load the same files: they keep the pages.

    Attributes:
        tensors: every tensor's dtype and shape.

    Raises:
        ValueError: the folder has no safetensors, a file is missing or damaged, or index and files
            name other tensors.
    """

    def __init__(
        self, folder: str | Path, key: str = "model.path", is_read_once: bool = False
    ) -> None:
        self.folder = Path(folder)
        check_model_folder(self.folder, key)
        index = read_index(self.folder / INDEX) if (self.folder / INDEX).is_file() else None
        weight_map: dict[str, str] | None = index and index["weight_map"]
        files = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        self._files = {file: FileReader(self.folder / file, is_read_once) for file in files}
        self._file_of: dict[str, str] = {}
        for file, reader in self._files.items():
            for name in reader.header.tensors:
                if weight_map is not None and weight_map.get(name) != file:
                    raise ValueError(
                        f"{self.folder / file} holds {name}, which {INDEX} does not name there; "
                        "complete the copy of the model"
                    )
                self._file_of[name] = file
        ghosts = sorted((weight_map or {}).keys() - self._file_of.keys())
        if ghosts:
            raise ValueError(
                f"{self.folder / INDEX} names {', '.join(ghosts[:5])}, which "
                f"{weight_map and weight_map[ghosts[0]]} does not hold; "
                "complete the copy of the model"
            )
        self.tensors: dict[str, TensorInfo] = {
            name: self._files[file].header.tensors[name] for name, file in self._file_of.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def info(self, name: str) -> TensorInfo:
        """Return a tensor's dtype and shape."""
        if name not in self.tensors:
            raise ValueError(f"{self.folder} has no tensor {name!r}: it is not a complete model")
        return self.tensors[name]

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """Return a tensor, in `out` if that is given (contiguous, of its dtype and shape)."""
        self.info(name)
        return self._files[self._file_of[name]].read(name, out)

    def will_need(self, name: str) -> None:
        """Have the system read a tensor ahead."""
        self._files[self._file_of[name]].will_need(name)

    def position(self, name: str) -> tuple[str, int]:
        """Return where a tensor lies, to read in the order of the files."""
        file = self._file_of[name]
        return file, self._files[file].header.offsets[name]

    def are_equal(self, first: str, second: str) -> bool:
        """Say whether two tensors are the same, byte for byte; in bounded memory."""
        if self.info(first) != self.info(second):
            return False
        blocks = [self._files[self._file_of[name]].blocks(name) for name in (first, second)]
        return all(a == b for a, b in zip(*blocks, strict=True))

    def layout(self) -> HfLayout:
        """Return which file holds which tensors, in which order."""
        index = read_index(self.folder / INDEX) if (self.folder / INDEX).is_file() else None
        return HfLayout(
            {file: list(reader.header.tensors) for file, reader in self._files.items()},
            {file: reader.header.metadata for file, reader in self._files.items()},
            None if index is None else index.get("metadata", {}),
        )

    def close(self) -> None:
        """Close the files."""
        for reader in self._files.values():
            reader.close()


@dataclass(frozen=True, slots=True)
class HfLayout:
    """Which files a model's tensors lie in.

    Attributes:
        files: the tensors of each file, in the order of their bytes.
        metadata: of each file.
        index: the metadata of the index; None for a single file without one.
    """

    files: dict[str, list[str]]
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    index: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, path: Path) -> HfLayout:
        """Read what `to_json` returned.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            layout = cls(**values)
            names = [name for held in layout.files.values() for name in held]
            is_good = all(is_plain_file(file) for file in layout.files) and all(
                isinstance(name, str) for name in names
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); convert the model again") from error
        if not is_good or len(set(names)) != len(names):
            raise ValueError(f"{path} names no plain files and tensors; convert the model again")
        return layout

    @classmethod
    def by_size(cls, tensors: Mapping[str, TensorInfo]) -> HfLayout:
        """Lay tensors, in their order, into one file or into shards of at most 5 GB."""
        shards: list[list[str]] = [[]]
        num_bytes = 0
        for name, info in tensors.items():
            if shards[-1] and num_bytes + info.num_bytes > MAX_SHARD_BYTES:
                shards.append([])
                num_bytes = 0
            shards[-1].append(name)
            num_bytes += info.num_bytes
        for shard in shards:  # as safetensors aligns them: wide types first
            shard.sort(key=lambda name: -tensors[name].dtype.itemsize)
        files = dict(zip(shard_names(len(shards)), shards, strict=True))
        return cls(files, index=None if len(shards) == 1 else {})

    def only(self, names: Iterable[str]) -> HfLayout:
        """Leave out all other tensors, and files that then hold nothing."""
        kept = set(names)
        files = {f: [n for n in held if n in kept] for f, held in self.files.items()}
        files = {file: held for file, held in files.items() if held}
        return HfLayout(files, self.metadata, self.index)


class HfFolderWriter:
    """Writes tensors, in any order, to their places in a folder's files.

    Args:
        layout: of exactly the tensors in `tensors`.
        is_first: makes the files; other processes that write too begin after this one.
    """

    def __init__(
        self, folder: Path, layout: HfLayout, tensors: Mapping[str, TensorInfo], is_first: bool
    ) -> None:
        self._folder, self._layout, self._tensors = folder, layout, tensors
        self._file_of = {name: file for file, names in layout.files.items() for name in names}
        assert self._file_of.keys() == tensors.keys()
        self._files = {
            file: FileWriter(
                folder / file,
                {name: tensors[name] for name in names},
                layout.metadata.get(file) or {"format": "pt"},
                is_first,
            )
            for file, names in layout.files.items()
        }
        self.written: set[str] = set()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; each only once."""
        assert name not in self.written, name
        self._files[self._file_of[name]].write(name, tensor)
        self.written.add(name)

    def close(self) -> None:
        """Wait until what was written is on disk."""
        for file in self._files.values():
            file.close()

    def write_index(self) -> None:
        """Write the index, if the layout has one."""
        if self._layout.index is not None:
            total = sum(info.num_bytes for info in self._tensors.values())
            write_index(self._folder, {**self._layout.index, "total_size": total}, self._file_of)


def write_hf_folder(
    folder: str | Path,
    named_tensors: Iterable[tuple[str, Tensor]],
    template: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `named_tensors`, as they come, as a model folder with the template's config, tokenizer
    and processor files.

    The folder appears under its name only when it is complete.
    """
    folder, template = Path(folder), Path(template)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_model_files(template, partial)
    shards: list[GrowingFile] = []
    for name, tensor in named_tensors:
        tensor = tensor.detach().cpu()
        if not shards or not shards[-1].has_room(name, tensor.nbytes, max_shard_bytes):
            if shards:
                shards[-1].close()
            shards.append(GrowingFile(partial / f"shard_{len(shards)}"))
        shards[-1].add(name, tensor)
    if shards:
        shards[-1].close()
    names = shard_names(len(shards))
    for number, name in enumerate(names):
        (partial / f"shard_{number}").rename(partial / name)
    if len(shards) > 1:
        total = sum(shard.num_bytes for shard in shards)
        weight_map = {n: file for file, s in zip(names, shards, strict=True) for n in s.tensors}
        write_index(partial, {"total_size": total}, weight_map)
    shutil.rmtree(folder, ignore_errors=True)
    finish_folder(partial, folder)


def copy_model_files(template: Path, folder: Path) -> None:
    """Copy config, tokenizer, processor, chat template and the like: all but weights."""
    for file in sorted(template.iterdir()):
        if file.is_file() and not file.name.endswith((*_WEIGHTS, ".index.json")):
            shutil.copy2(file, folder / file.name)
        elif file.is_dir() and file.name in _SUBFOLDERS:
            shutil.copytree(file, folder / file.name)


def finish_folder(partial: Path, folder: Path) -> None:
    """Give a complete folder its name; what is in it reaches the disk before the name does."""
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    partial.rename(folder)
    _sync(folder.parent)


def shard_names(count: int) -> list[str]:
    """Return the names that Hugging Face gives to so many files."""
    if count <= 1:
        return [SINGLE] * count
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def is_plain_file(name: object) -> bool:
    """Say whether it is a file's name and leads nowhere else."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")


def write_index(folder: Path, metadata: dict[str, Any], weight_map: dict[str, str]) -> None:
    """Write the index of a sharded model as transformers does."""
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

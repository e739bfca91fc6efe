"""Hugging Face model folders: reading safetensors (single or sharded)
and writing a complete folder.

Only safetensors are read; pickled weights are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_mmr1.config.model_folder import check_model_folder

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class HfWeights:
    """The tensors of a model folder by name, read one at a time.

    Raises:
        ValueError: the folder has no safetensors, or its index names a missing file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file_of = self._locate()

    def _locate(self) -> dict[str, Path]:
        check_model_folder(self.folder)
        index = self.folder / _INDEX
        if index.exists():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return {name: self.folder / file for name, file in weight_map.items()}
        with safe_open(self.folder / _SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), self.folder / _SINGLE)

    @property
    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._file_of.keys()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise ValueError(f"{self.folder} has no tensor {name!r}: it is not a complete model")
        with safe_open(self._file_of[name], "pt") as file:
            return file.get_tensor(name)


def write_hf_folder(
    folder: str | Path, named_tensors: Iterable[tuple[str, Tensor]], template: str | Path
) -> None:
    """Write `named_tensors` as a model folder with the template's config,
    tokenizer and processor files.

    The folder appears under its name only when it is complete.
    """
    folder, template = Path(folder), Path(template)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in sorted(template.iterdir()):
        if file.is_file() and not file.name.endswith((".safetensors", ".bin", ".index.json")):
            shutil.copy2(file, partial / file.name)
    tensors = {name: t.detach().cpu().contiguous() for name, t in named_tensors}
    save_file(tensors, partial / _SINGLE, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)

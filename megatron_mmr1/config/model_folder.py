"""What a Hugging Face model folder must hold, checked before anything heavy loads.

Owns the lists of files; does not read weights (convert/hf_files.py) or build a processor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Each as alternatives: without one of them transformers would build a default model, or fetch.
_PROCESSOR_FILES = {
    "model config": ("config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json", "tokenizer.model"),
    "processor": ("preprocessor_config.json", "processor_config.json"),
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def check_processor_files(folder: str | Path, key: str = "model.path") -> None:
    """Refuse a folder without a model config or tokenizer, or with a vision tower and no processor.

    Args:
        folder: the model folder.
        key: the setting that named it, for the message.

    Raises:
        ValueError: the folder or one of its files does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{key}={str(folder)!r} is no folder; give a local Hugging Face folder (models are not "
            "fetched; digits: `python -m megatron_mmr1.data.digits`, then "
            "`python -m megatron_mmr1.sft run=demo`)"
        )
    for what, names in _PROCESSOR_FILES.items():
        if what == "processor" and not has_vision(folder, key):
            continue
        if not any((folder / name).is_file() for name in names):
            raise ValueError(
                f"{key}={str(folder)!r} has no {what} ({' or '.join(names)}); "
                "copy it there from the original model"
            )


def has_vision(folder: str | Path, key: str = "model.path") -> bool:
    """Whether config.json tells of a vision tower.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{key}={str(folder)!r}: config.json is not JSON ({error}); copy it from the model"
        ) from error
    return config.get("vision_config") is not None


def check_model_folder(folder: str | Path, key: str = "model.path") -> None:
    """Refuse a folder that `check_processor_files` refuses or whose safetensors are not all there.

    Args:
        folder: the model folder.
        key: the setting that named it, for the message.

    Raises:
        ValueError: the folder or one of its files does not exist.
    """
    check_processor_files(folder, key)
    folder = Path(folder)
    if (folder / INDEX).is_file():
        files = set(read_index(folder / INDEX)["weight_map"].values())
        missing = sorted(name for name in files if not (folder / name).is_file())
        if missing:
            raise ValueError(
                f"{key}={str(folder)!r} lacks {', '.join(missing)}, which {INDEX} names; "
                "complete the copy of the model"
            )
    elif not (folder / SINGLE).is_file():
        raise ValueError(
            f"{key}={str(folder)!r} holds neither {SINGLE} nor {INDEX}; "
            "give a folder with safetensors (pickled weights are not read)"
        )


def is_megatron_checkpoint(folder: str | Path) -> bool:
    """Whether a folder is a training checkpoint, or of tools/convert_hf_to_megatron.py."""
    folder = Path(folder)
    return any((part / "metadata.json").is_file() for part in (folder, folder / "megatron"))


def read_index(path: Path) -> dict[str, Any]:
    """Return the index of a sharded model: `weight_map` from tensor to file, and metadata.

    Raises:
        ValueError: it holds something else, or names a file outside its folder.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        files = list(index["weight_map"].values())
        is_good = files and all(Path(file).name == file != ".." for file in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of a model ({error!r}); copy it again") from error
    if not is_good:
        raise ValueError(f"{path}: weight_map names no files of its folder; copy it again")
    return index

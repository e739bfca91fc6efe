"""A model folder's config, as transformers reads it, and the family that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_mmr1.config.model_folder import check_processor_files
from megatron_mmr1.convert.families import check_model_type


def read_config(folder: str | Path, key: str = "model.path") -> Any:
    """Read config.json of a model of a known family; no code of the folder runs.

    Args:
        key: the setting or option that named the folder, for messages.

    Raises:
        ValueError: it is missing or damaged, or no conversion table knows the model.
    """
    from transformers import AutoConfig

    check_processor_files(folder, key)
    path = Path(folder) / "config.json"
    try:
        check_model_type(json.loads(path.read_text(encoding="utf-8"))["model_type"], str(path))
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); copy it again") from error

"""A model folder's config, as transformers reads it, and the family that it names."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from megatron_mmr1.config.model_folder import check_processor_files
from megatron_mmr1.convert.families import check_model_type, family_of
from megatron_mmr1.convert.rules import required_hf_names

EMBEDDING = "language.embedding.word_embeddings.weight"
OUTPUT_LAYER = "language.output_layer.weight"


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


def settle_ties(
    hf_config: Any, file_names: Collection[str], are_equal: Callable[[str, str], bool]
) -> None:
    """Decide whether the output layer is the embedding, and write it into the config.

    As transformers does, by the files: a tied config with an output layer of other values is not
    tied. Where the files have no output layer, either config's word counts, the model's or the
    decoder's: which of them says so depends on the version that wrote it.

    Args:
        file_names: of the model's tensors; none where there are no files.
        are_equal: compares two of them.
    """
    family = family_of(hf_config)
    spelling = family.spelling_of(file_names)
    first, second = (
        spelling.in_files(required_hf_names(family.rules, name)[1][0])
        for name in (EMBEDDING, OUTPUT_LAYER)
    )
    says = bool(hf_config.tie_word_embeddings)
    if second in file_names:
        hf_config.tie_word_embeddings = says and are_equal(first, second)
    else:
        decoder_says = getattr(hf_config.get_text_config(), "tie_word_embeddings", False)
        hf_config.tie_word_embeddings = says or bool(decoder_says)

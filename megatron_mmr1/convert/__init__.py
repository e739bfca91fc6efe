"""Hugging Face <-> Megatron names and layouts: one table of rules a model family."""

from typing import Any

from megatron_mmr1.convert.family import Family, Spelling
from megatron_mmr1.convert.internvl import INTERNVL_LLAMA, INTERNVL_QWEN2
from megatron_mmr1.convert.qwen2_vl import QWEN2_VL
from megatron_mmr1.convert.qwen3_vl import QWEN3_VL
from megatron_mmr1.convert.rules import AttentionShape, Rule, megatron_to_hf, required_hf_names
from megatron_mmr1.convert.text import LLAMA, QWEN2, QWEN3, QWEN3_MOE

# By `model_type`; where a family takes several decoders, with the decoder's after a plus sign.
FAMILIES: dict[str, Family] = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_VL,
    "qwen3_vl": QWEN3_VL,
    "internvl+qwen2": INTERNVL_QWEN2,
    "internvl+llama": INTERNVL_LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "llama": LLAMA,
    "mistral": LLAMA,
}


def family_of(hf_config: Any, key: str = "model.path") -> Family:
    """Return the family of a Hugging Face config.

    Raises:
        ValueError: no table knows it.
    """
    name = hf_config.model_type
    if name not in FAMILIES and getattr(hf_config, "text_config", None) is not None:
        name += "+" + hf_config.text_config.model_type
    if name not in FAMILIES:
        raise ValueError(
            f"{key}: its config.json says model_type={name!r}, which has no conversion table; "
            f"known are {', '.join(FAMILIES)} (to add one: CONTRIBUTING.md, 'A model family')"
        )
    return FAMILIES[name]


__all__ = [
    "FAMILIES",
    "AttentionShape",
    "Family",
    "Rule",
    "Spelling",
    "family_of",
    "megatron_to_hf",
    "required_hf_names",
]

"""All families, by what config.json says."""

from typing import Any

from megatron_mmr1.convert.family import Family
from megatron_mmr1.convert.internvl import INTERNVL_LLAMA, INTERNVL_QWEN2
from megatron_mmr1.convert.qwen2_vl import QWEN2_VL
from megatron_mmr1.convert.qwen3_vl import QWEN3_VL
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


def family_of(hf_config: Any) -> Family:
    """Return the family of a Hugging Face config.

    Raises:
        ValueError: no table knows it.
    """
    name = hf_config.model_type
    if name not in FAMILIES and getattr(hf_config, "text_config", None) is not None:
        name += "+" + hf_config.text_config.model_type
    if name not in FAMILIES:
        raise _unknown(name, "config.json")
    return FAMILIES[name]


def check_model_type(model_type: str, where: str) -> None:
    """Refuse a `model_type` that no table knows, whatever its decoder.

    Raises:
        ValueError: names it and those that are known.
    """
    if model_type not in {name.split("+")[0] for name in FAMILIES}:
        raise _unknown(model_type, where)


def _unknown(name: str, where: str) -> ValueError:
    return ValueError(
        f"{where}: model_type={name!r} has no conversion table; known are {', '.join(FAMILIES)} "
        "(to add one: CONTRIBUTING.md, 'A model family')"
    )

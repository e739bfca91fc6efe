"""Hugging Face <-> Megatron names and layouts: one table of rules a model family."""

from megatron_mmr1.convert.qwen2_5_vl import RULES as QWEN2_5_VL_RULES
from megatron_mmr1.convert.rules import AttentionShape, Rule, megatron_to_hf, required_hf_names

FAMILIES: dict[str, tuple[Rule, ...]] = {"qwen2_5_vl": QWEN2_5_VL_RULES}

__all__ = ["FAMILIES", "AttentionShape", "Rule", "megatron_to_hf", "required_hf_names"]

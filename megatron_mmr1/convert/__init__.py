"""Hugging Face <-> Megatron names and layouts: one table of rules a model family; their files."""

from megatron_mmr1.convert.families import FAMILIES, family_of
from megatron_mmr1.convert.family import Family, Spelling
from megatron_mmr1.convert.hf_config import read_config, settle_ties
from megatron_mmr1.convert.rules import AttentionShape, Rule, megatron_to_hf, required_hf_names

__all__ = [
    "FAMILIES",
    "AttentionShape",
    "Family",
    "Rule",
    "Spelling",
    "family_of",
    "megatron_to_hf",
    "read_config",
    "required_hf_names",
    "settle_ties",
]

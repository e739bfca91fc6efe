"""Qwen2-VL (2B, 7B, 72B) and Qwen2.5-VL (3B, 7B, 32B, 72B)."""

from megatron_mmr1.convert.decoder import decoder_rules
from megatron_mmr1.convert.family import Family, Spelling
from megatron_mmr1.convert.rules import Rule

QWEN2_VL = Family(
    rules=(Rule("vision.**", "replicated", ("visual.**",)), *decoder_rules(qkv_bias=True)),
    # As transformers' modules are named since 4.52; the published files are older.
    spellings=(Spelling((("model.", "model.language_model."), ("visual.", "model.visual."))),),
)

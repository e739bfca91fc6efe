"""Qwen3-VL, dense (2B, 4B, 8B, 32B). Its tower's features also go in after the first layers."""

from megatron_mmr1.convert.decoder import decoder_rules
from megatron_mmr1.convert.family import Family
from megatron_mmr1.convert.rules import Rule

QWEN3_VL = Family(
    rules=(
        Rule("vision.**", "replicated", ("model.visual.**",)),
        *decoder_rules("model.language_model.", qk_norm=True),
    ),
    interleaved_positions=True,
)

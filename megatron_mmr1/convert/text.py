"""Text models: Qwen2 and Qwen2.5, Qwen3, Qwen3 with experts, Llama 2 and 3, Mistral."""

from megatron_mmr1.convert.decoder import decoder_rules
from megatron_mmr1.convert.family import Family

QWEN2 = Family(decoder_rules(qkv_bias=True))
QWEN3 = Family(decoder_rules(qk_norm=True))
QWEN3_MOE = Family(decoder_rules(qk_norm=True, experts=True))
LLAMA = Family(decoder_rules())

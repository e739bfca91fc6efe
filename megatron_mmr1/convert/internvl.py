"""InternVL in transformers' own format, on Qwen2 or on Llama (to which InternLM2 is converted)."""

from megatron_mmr1.convert.decoder import decoder_rules
from megatron_mmr1.convert.family import Family, Spelling
from megatron_mmr1.convert.rules import Rule


def _internvl(qkv_bias: bool) -> Family:
    parts = ("vision_tower.", "multi_modal_projector.")
    return Family(
        rules=(
            *(Rule(f"vision.{part}**", "replicated", (f"{part}**",)) for part in parts),
            *decoder_rules("language_model.model.", "language_model.lm_head.", qkv_bias=qkv_bias),
        ),
        # As transformers' modules are named since 4.52; the published files are older.
        spellings=(
            Spelling(
                (
                    ("language_model.model.", "model.language_model."),
                    ("language_model.lm_head.", "lm_head."),
                    *((part, f"model.{part}") for part in parts),
                )
            ),
        ),
    )


INTERNVL_QWEN2, INTERNVL_LLAMA = _internvl(qkv_bias=True), _internvl(qkv_bias=False)

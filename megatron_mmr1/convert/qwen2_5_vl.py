"""Qwen2.5-VL (3B, 7B, 32B, 72B):
Megatron parameter names -> the names in the model's safetensors files.
"""

from megatron_mmr1.convert.rules import Rule

_LAYER = "language.decoder.layers.*."
_HF_LAYER = "model.layers.*."
_INPUT_NORM = _HF_LAYER + "input_layernorm.weight"
_MLP_NORM = _HF_LAYER + "post_attention_layernorm.weight"

RULES: tuple[Rule, ...] = (
    Rule("vision.**", "replicated", ("visual.**",)),
    Rule("language.embedding.word_embeddings.weight", "vocab", ("model.embed_tokens.weight",)),
    Rule(
        _LAYER + "self_attention.linear_qkv.weight",
        "qkv",
        tuple(_HF_LAYER + f"self_attn.{x}_proj.weight" for x in "qkv"),
    ),
    Rule(
        _LAYER + "self_attention.linear_qkv.bias",
        "qkv",
        tuple(_HF_LAYER + f"self_attn.{x}_proj.bias" for x in "qkv"),
    ),
    Rule(
        _LAYER + "self_attention.linear_proj.weight",
        "row",
        (_HF_LAYER + "self_attn.o_proj.weight",),
    ),
    # Each norm by its name in Megatron's local layers, and in Transformer Engine's, which fuse it
    # with the linear layer that follows.
    Rule(_LAYER + "input_layernorm.weight", "replicated", (_INPUT_NORM,)),
    Rule(_LAYER + "self_attention.linear_qkv.layer_norm_weight", "replicated", (_INPUT_NORM,)),
    Rule(_LAYER + "pre_mlp_layernorm.weight", "replicated", (_MLP_NORM,)),
    Rule(_LAYER + "mlp.linear_fc1.layer_norm_weight", "replicated", (_MLP_NORM,)),
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        "gated",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
    ),
    Rule(_LAYER + "mlp.linear_fc2.weight", "row", (_HF_LAYER + "mlp.down_proj.weight",)),
    Rule("language.decoder.final_layernorm.weight", "replicated", ("model.norm.weight",)),
    Rule("language.output_layer.weight", "vocab", ("lm_head.weight",)),
)

"""The decoder that all families share, in rules: what differs is a prefix and a few parts."""

from megatron_mmr1.convert.rules import Rule

_LAYER = "language.decoder.layers.*."


def decoder_rules(
    model: str = "model.",
    head: str = "lm_head.",
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    experts: bool = False,
) -> tuple[Rule, ...]:
    """Return the rules of a decoder of Llama's kind: RMSNorm, gated MLP, grouped queries.

    Args:
        model: what its names start with in the model's files.
        head: what the output layer's name starts with there.
        qkv_bias: the query, key and value projections have biases.
        qk_norm: queries and keys are normalised, a head at a time.
        experts: a router and experts stand in place of every layer's MLP.
    """
    layer = model + "layers.*."
    input_norm = layer + "input_layernorm.weight"
    mlp_norm = layer + "post_attention_layernorm.weight"
    return (
        Rule(
            "language.embedding.word_embeddings.weight", "vocab", (model + "embed_tokens.weight",)
        ),
        *(
            Rule(
                _LAYER + f"self_attention.linear_qkv.{part}",
                "qkv",
                tuple(layer + f"self_attn.{x}_proj.{part}" for x in "qkv"),
            )
            for part in ("weight", *(["bias"] if qkv_bias else []))
        ),
        *(
            Rule(
                _LAYER + f"self_attention.{x}_layernorm.weight",
                "replicated",
                (layer + f"self_attn.{x}_norm.weight",),
            )
            for x in ("qk" if qk_norm else "")
        ),
        Rule(
            _LAYER + "self_attention.linear_proj.weight",
            "row",
            (layer + "self_attn.o_proj.weight",),
        ),
        # Each norm by its name in Megatron's local layers, and in Transformer Engine's, which fuse
        # it with the linear layer that follows (a router is not fused).
        Rule(_LAYER + "input_layernorm.weight", "replicated", (input_norm,)),
        Rule(_LAYER + "self_attention.linear_qkv.layer_norm_weight", "replicated", (input_norm,)),
        Rule(_LAYER + "pre_mlp_layernorm.weight", "replicated", (mlp_norm,)),
        *(_expert_rules(layer) if experts else _mlp_rules(layer, mlp_norm)),
        Rule("language.decoder.final_layernorm.weight", "replicated", (model + "norm.weight",)),
        Rule("language.output_layer.weight", "vocab", (head + "weight",)),
    )


def _mlp_rules(layer: str, norm: str) -> tuple[Rule, ...]:
    return (
        Rule(_LAYER + "mlp.linear_fc1.layer_norm_weight", "replicated", (norm,)),
        Rule(
            _LAYER + "mlp.linear_fc1.weight",
            "gated",
            (layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight"),
        ),
        Rule(_LAYER + "mlp.linear_fc2.weight", "row", (layer + "mlp.down_proj.weight",)),
    )


def _expert_rules(layer: str) -> tuple[Rule, ...]:
    """Experts by their names in Megatron's local layers, and in Transformer Engine's."""
    gate_and_up = (layer + "mlp.experts.*.gate_proj.weight", layer + "mlp.experts.*.up_proj.weight")
    down = (layer + "mlp.experts.*.down_proj.weight",)
    local = _LAYER + "mlp.experts.local_experts.*."
    return (
        Rule(_LAYER + "mlp.router.weight", "replicated", (layer + "mlp.gate.weight",)),
        Rule(local + "linear_fc1.weight", "expert_gated", gate_and_up),
        Rule(local + "linear_fc2.weight", "expert", down),
        Rule(_LAYER + "mlp.experts.linear_fc1.weight*", "expert_gated", gate_and_up),
        Rule(_LAYER + "mlp.experts.linear_fc2.weight*", "expert", down),
    )

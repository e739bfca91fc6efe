"""Core attention for the local layer spec, and the spec itself.

Megatron's own DotProductAttention materialises the scores; this one hands them to torch's fused
scaled_dot_product_attention. It is where packed sequences and context parallelism will come in.

S sequence length, B sequences, H query heads, K key/value heads (both of this tensor-parallel
rank), E head size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class CausalAttention(MegatronModule):
    """Causal grouped-query attention over right-padded sequences.

    Padding lies to the right of every sequence, so the causal mask alone keeps it from real tokens.
    """

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config=config)

    def forward(
        self,
        query_SBHE: Tensor,
        key_SBKE: Tensor,
        value_SBKE: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend; returns [S, B, H * E] in the query's dtype."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        context_BHSE = scaled_dot_product_attention(
            query_SBHE.permute(1, 2, 0, 3),
            key_SBKE.permute(1, 2, 0, 3),
            value_SBKE.permute(1, 2, 0, 3),
            is_causal=True,
            enable_gqa=query_SBHE.shape[2] != key_SBKE.shape[2],
        )
        context_SBHE = context_BHSE.permute(2, 0, 1, 3)
        return context_SBHE.reshape(*context_SBHE.shape[:2], -1)


def layer_spec() -> ModuleSpec:
    """Return the transformer layer: Megatron's local modules with RMSNorm
    and our core attention.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer: Any = spec.submodules
    layer.self_attention.submodules.core_attention = CausalAttention
    return spec

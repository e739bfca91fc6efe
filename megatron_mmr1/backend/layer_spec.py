"""The transformer layers: which module stands for which part, on a CPU and on CUDA.

`layer_spec` is the one place that chooses. Transformer Engine's modules need CUDA; Megatron's local
ones, with our norm and our attention, run anywhere.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.backend.attention import LocalSequences, PackedAttention


class RmsNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight says when its gradient is a part (sequence parallelism).

    Each tensor-parallel rank then normalises other tokens, and Megatron adds the gradients of
    parameters that carry the mark. Megatron's own wrapper refuses sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the layers of one pipeline stage (of one virtual stage), and the norm after them."""
    spec = layer_spec(config)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=vp_stage),
        layer_norm=_transformer_engine().TENorm if device.has_gpu() else RmsNorm,
    )


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Return one transformer layer, dense or with experts as the config says.

    Raises:
        ValueError: CUDA without Transformer Engine.
    """
    experts = config.num_moe_experts
    if device.has_gpu():
        _transformer_engine()
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=bool(experts), qk_layernorm=config.qk_layernorm
        )
        layer: Any = spec.submodules
        layer.self_attention.submodules.core_attention = _packed_te_attention()
        return spec
    # Megatron would run local layers in full precision without a word.
    assert not config.fp8, "precision.check_machine comes first"
    spec = get_gpt_layer_local_spec(
        num_experts=experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    layer: Any = spec.submodules
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if experts:
        # As Transformer Engine's layers, which don't fuse this norm with experts: checkpoints are
        # the same on both. Megatron's local spec renames it whatever follows.
        names = dict(layer.sharded_state_dict_keys_map)
        names.pop("pre_mlp_layernorm.")
        layer.sharded_state_dict_keys_map = names
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RmsNorm
    layer.input_layernorm = RmsNorm
    layer.pre_mlp_layernorm = RmsNorm
    return spec


def _transformer_engine() -> Any:
    if find_spec("transformer_engine") is None:
        raise ValueError(
            "the module transformer_engine is not installed, and training on CUDA needs it; "
            "install requirements-cuda.txt"
        )
    from megatron.core.extensions import transformer_engine

    return transformer_engine


def _packed_te_attention() -> type:
    """Return Transformer Engine's attention, told of the sequences only where it attends."""

    class PackedTEAttention(_transformer_engine().TEDotProductAttention):
        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Tensor:
            sequences = kwargs.pop("packed_seq_params")
            assert isinstance(sequences, LocalSequences)
            kwargs["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=sequences.boundaries,  # type: ignore[arg-type]
                cu_seqlens_kv=sequences.boundaries,  # type: ignore[arg-type]
                max_seqlen_q=sequences.longest,
                max_seqlen_kv=sequences.longest,
            )
            return super().forward(query, key, value, *args, **kwargs)

    return PackedTEAttention

"""Qwen2.5-VL on Megatron-Core: Hugging Face's vision tower in front of a GPTModel
with multimodal rotary positions.

Every Megatron configuration object is made here, from the Hugging Face configuration and ours.

S sequence length, N sequences, R response tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from megatron_mmr1 import device
from megatron_mmr1.backend.attention import layer_spec
from megatron_mmr1.config.schema import ParallelConfig
from megatron_mmr1.types import MicroBatch


def transformer_config(
    hf_config: Qwen2_5_VLConfig, parallel: ParallelConfig, dtype: torch.dtype
) -> TransformerConfig:
    """Build Megatron's TransformerConfig; sets only what we use.

    `calculate_per_token_loss` keeps Megatron from dividing by the number of micro-batches and from
    averaging over ranks: our losses carry their own global denominator, so that gradients are plain
    sums.
    """
    text: Any = hf_config.text_config
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rotary_interleaved=False,
        mrope_section=list(text.rope_parameters["mrope_section"]),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        context_parallel_size=parallel.cp_size,
        use_cpu_initialization=not device.has_gpu(),
        perform_initialization=False,
        calculate_per_token_loss=True,
    )


class Qwen25VL(MegatronModule):
    """The policy network: tokens and pixels in, logits of the response tokens out."""

    def __init__(self, hf_config: Qwen2_5_VLConfig, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder  # Megatron's schedules ask for it
        self.image_token_id: int = hf_config.image_token_id
        text_config: Any = hf_config.text_config
        vision_config: Any = hf_config.vision_config
        vision_config._attn_implementation = "sdpa"
        self.vision: Any = Qwen2_5_VisionTransformerPretrainedModel(vision_config)
        self.language = GPTModel(
            config=config,
            transformer_layer_spec=layer_spec(),
            vocab_size=text_config.vocab_size,
            max_sequence_length=text_config.max_position_embeddings,
            position_embedding_type="mrope",
            rotary_base=text_config.rope_parameters["rope_theta"],
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            scatter_embedding_sequence_parallel=False,
        )
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings
        # Parameters only: the vision tower's rotary frequencies, a buffer, stay float32, as Hugging
        # Face keeps them. Torch norms come in float32; with both dtypes in one model Megatron saves
        # optimizer states under other parameters' names.
        for parameter in self.parameters():
            parameter.data = parameter.data.to(config.params_dtype)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous pipeline stage's activations (called by Megatron's schedules)."""
        self.language.set_input_tensor(input_tensor)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Return the logits that predict the response tokens.

        Returns:
            [R, V] in the parameters' dtype, for the True entries of `batch.response_mask_NS` row by
            row. Only these rows go through the output layer.
        """
        embeddings_SND = self.language.embedding(
            input_ids=batch.token_ids_NS, position_ids=batch.position_ids_3NS[0]
        )
        if batch.pixel_values is not None:
            embeddings_SND = self._insert_images(embeddings_SND, batch)
        return self.language(
            input_ids=batch.token_ids_NS,
            position_ids=batch.position_ids_3NS,
            attention_mask=None,
            decoder_input=embeddings_SND,
            output_processor=_logits_of_response_rows,
            output_processor_context=batch.response_mask_NS,
        )

    def _insert_images(self, embeddings_SND: Tensor, batch: MicroBatch) -> Tensor:
        assert batch.pixel_values is not None
        features = self.vision(
            batch.pixel_values.to(self.config.params_dtype), grid_thw=batch.image_grid_thw
        ).pooler_output
        is_image_NS = batch.token_ids_NS == self.image_token_id
        assert int(is_image_NS.sum()) == batch.visual_index.numel()
        embeddings_NSD = embeddings_SND.transpose(0, 1).clone()
        embeddings_NSD[is_image_NS] = features[batch.visual_index]
        return embeddings_NSD.transpose(0, 1).contiguous()


def _logits_of_response_rows(
    *,
    hidden_states: Tensor,
    output_layer: torch.nn.Module,
    output_weight: Tensor | None,
    context: Tensor,
    **kwargs: Any,
) -> Tensor:
    """Apply the output layer to the positions that predict a response token: one before each."""
    predicts_response_NS = torch.zeros_like(context)
    predicts_response_NS[:, :-1] = context[:, 1:]
    hidden_RD = hidden_states.transpose(0, 1)[predicts_response_NS]
    logits_R1V, _ = output_layer(hidden_RD.unsqueeze(1), weight=output_weight)
    return logits_R1V.squeeze(1)

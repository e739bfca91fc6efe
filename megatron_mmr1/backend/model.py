"""The policy network on Megatron-Core: Hugging Face's vision tower, if the model has one,
in front of a GPTModel with our rotary positions.

Every Megatron configuration object is made here, from the Hugging Face configuration and ours.

Parallelism: the vision tower and the embedding are on the first pipeline stage, the output layer on
the last. Order on the first stage: tokens are cut over context-parallel ranks, embedded, image
features put in, and then cut over tensor-parallel ranks (sequence parallelism).

T tokens of this rank, R its response tokens, D hidden, M image tokens, K layers that take image
features of their own (deepstack).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.attention import VisualRows
from megatron_mmr1.backend.layer_spec import block_spec
from megatron_mmr1.backend.layout import LocalView
from megatron_mmr1.backend.packing import pad_to
from megatron_mmr1.backend.precision import megatron_settings
from megatron_mmr1.backend.rotary import Rotary
from megatron_mmr1.backend.towers import build_tower, num_deepstack_layers
from megatron_mmr1.config.schema import ParallelConfig, PrecisionConfig
from megatron_mmr1.convert import family_of
from megatron_mmr1.kernels.contract import SoftmaxRule, Vocabulary
from megatron_mmr1.kernels.head import OutputHead

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    hf_config: Any,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    fuses_accumulation: bool = False,
) -> TransformerConfig:
    """Build Megatron's TransformerConfig; sets only what we use.

    `calculate_per_token_loss` keeps Megatron from dividing by the number of micro-batches and from
    averaging over ranks: our losses carry their own global denominator, so that gradients are plain
    sums.

    The interleaved schedule overlaps single sends and receives: batched ones confuse the two
    directions between two stages (config/validate.py refuses them there).

    Experts are whole, whatever the tensor parallelism (so `parallel.lay_groups` lays their groups).
    Their tokens are sent to them: Megatron's default gathers all tokens everywhere, and wants the
    same number of every rank. No loss balances them: RL keeps the router that it was given. The
    router computes in float32.

    Args:
        fuses_accumulation: see adam.Found.

    Raises:
        ValueError: the model has a part that we don't (see `_refuse_other_parts`).
    """
    text: Any = hf_config.get_text_config()
    family = family_of(hf_config)
    _refuse_other_parts(text, family.has_qkv_bias)
    experts = getattr(text, "num_experts", None)
    dtype = DTYPES[precision.dtype]
    recompute: Any = None if parallel.recompute == "none" else parallel.recompute
    is_interleaved = parallel.vpp_size > 1
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
        gradient_accumulation_fusion=fuses_accumulation,
        persist_layer_norm=False,
        add_bias_linear=False,
        add_qkv_bias=family.has_qkv_bias,
        qk_layernorm=family.has_qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rotary_interleaved=False,
        mrope_section=[],  # Megatron asks for it; ours is backend/rotary.py's
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        **megatron_settings(precision),
        tensor_model_parallel_size=parallel.tp_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pp_size,
        virtual_pipeline_model_parallel_size=parallel.vpp_size if is_interleaved else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        context_parallel_size=parallel.cp_size,
        expert_model_parallel_size=parallel.ep_size,
        expert_tensor_parallel_size=1,
        num_moe_experts=experts,
        moe_ffn_hidden_size=text.moe_intermediate_size if experts else None,
        moe_router_topk=text.num_experts_per_tok if experts else 2,
        # Softmax over the chosen experts only, as good as over all and normalised again.
        moe_router_pre_softmax=bool(experts) and not text.norm_topk_prob,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_grouped_gemm=bool(experts) and device.has_gpu(),
        moe_token_dispatcher_type="alltoall",
        overlap_p2p_comm=is_interleaved and not parallel.batch_p2p,
        batch_p2p_comm=parallel.batch_p2p,
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        recompute_modules=["core_attn"] if recompute == "selective" else None,
        use_cpu_initialization=not device.has_gpu(),
        perform_initialization=False,
        calculate_per_token_loss=True,
    )


def _refuse_other_parts(text: Any, has_qkv_bias: bool) -> None:
    """Refuse what the config asks for and our decoder lacks: numbers would be silently wrong."""
    reasons = {
        "attention_bias": getattr(text, "attention_bias", False) and not has_qkv_bias,
        "mlp_bias": getattr(text, "mlp_bias", False),
        "hidden_act": getattr(text, "hidden_act", "silu") != "silu",
        "sliding_window": getattr(text, "use_sliding_window", True)
        and bool(getattr(text, "sliding_window", None)),
        "mlp_only_layers": bool(getattr(text, "mlp_only_layers", None)),
        "decoder_sparse_step": getattr(text, "decoder_sparse_step", 1) != 1,
    }
    for key, is_there in reasons.items():
        if is_there:
            raise ValueError(
                f"config.json: {key}={getattr(text, key)!r} is not supported by our decoder; "
                "use a model without it"
            )


class PolicyStage(MegatronModule):
    """One pipeline stage of the policy network: tokens and image features in, hidden states out.

    The output layer's weight is on the last stage; `output_head` says what it and the loss make of
    the hidden states, chunk by chunk (kernels/head.py). Megatron's own layer is not called.

    Attributes:
        vision: the tower, on the first stage of a vision-language model.

    Args:
        vp_stage: which of this rank's model chunks this is; None without interleaving.
    """

    def __init__(
        self, hf_config: Any, config: TransformerConfig, vp_stage: int | None = None
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder  # Megatron's schedules ask for it
        self.vp_stage = vp_stage
        self.pre_process = parallel_state.is_pipeline_first_stage(
            ignore_virtual=False, vp_stage=vp_stage
        )
        self.post_process = parallel_state.is_pipeline_last_stage(
            ignore_virtual=False, vp_stage=vp_stage
        )
        text: Any = hf_config.get_text_config()
        if self.pre_process and getattr(hf_config, "vision_config", None) is not None:
            self.vision: Any = build_tower(hf_config)
        self.vocab_size: int = text.vocab_size
        layers: Any = block_spec(config, vp_stage)
        self.language: Any = GPTModel(
            config=config,
            transformer_layer_spec=layers,
            vocab_size=pad_to(text.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=text.max_position_embeddings,
            position_embedding_type="mrope",
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            scatter_embedding_sequence_parallel=False,
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=vp_stage,
        )
        self.language.rotary_pos_emb = Rotary(text, family_of(hf_config).interleaved_positions)
        if self.pre_process:
            for index in range(num_deepstack_layers(hf_config)):
                # config/layout.py has seen to it that these layers are on the first stage.
                self.language.decoder.layers[index].register_forward_hook(
                    AddFeatures(config, index + 1), with_kwargs=True
                )
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings
        # Parameters only: the vision tower's rotary frequencies, a buffer, stay float32, as Hugging
        # Face keeps them. Torch norms come in float32; with both dtypes in one model Megatron saves
        # optimizer states under other parameters' names. FP8 parameters say the model's dtype too.
        for name, parameter in self.named_parameters():
            if parameter.dtype != config.params_dtype:
                parameter.data = parameter.data.to(config.params_dtype)
            if ".experts." in name:
                # Added up over the ranks that hold the same experts, by an optimizer of their own.
                # Without expert parallelism Megatron would take experts for dense parameters: their
                # gradients, of other tokens on every tensor-parallel rank, would not be added up
                # there, and checkpoints would not be interchangeable with those of ep_size > 1.
                parameter.allreduce = False  # type: ignore[attr-defined]

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous pipeline stage's activations (called by Megatron's schedules)."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Return the tied weight of this stage (called when Megatron adds up its gradients)."""
        return self.language.shared_embedding_or_output_weight()

    def forward(self, view: LocalView, features_MD: Tensor | None) -> Tensor:
        """Run this stage on one micro-batch.

        Args:
            view: this context-parallel rank's part of it.
            features_MD: the step's visual features, [M, (1 + K) D], on the first stage; None
                without images.

        Returns:
            On the last stage the hidden states [R, D] that predict `view.rows`, the same on every
            tensor-parallel rank. On other stages the activations [T, 1, D].
        """
        if self.pre_process and features_MD is not None:
            view.sequences.visual = VisualRows(
                view.visual_position_M, view.visual_feature_M, features_MD
            )
        return self.language(
            input_ids=view.token_ids_T.unsqueeze(0),
            position_ids=view.position_ids_3T.unsqueeze(1),
            attention_mask=None,
            decoder_input=self._embed(view, features_MD) if self.pre_process else None,
            packed_seq_params=view.sequences,
            output_processor=self._response_rows,
            output_processor_context=view,
        )

    def _embed(self, view: LocalView, features_MD: Tensor | None) -> Tensor:
        embeddings_T1D = self.language.embedding(
            input_ids=view.token_ids_T.unsqueeze(0), position_ids=None
        )
        if features_MD is not None:
            hidden = embeddings_T1D.shape[-1]
            embeddings_T1D = embeddings_T1D.clone()
            embeddings_T1D[view.visual_position_M, 0] = features_MD[view.visual_feature_M, :hidden]
        if self.config.sequence_parallel:
            embeddings_T1D = scatter_to_sequence_parallel_region(embeddings_T1D)
        return embeddings_T1D

    def output_head(self, rule: SoftmaxRule, kernels: str) -> OutputHead:
        """Return the output layer's part of this rank (last stage)."""
        tied, layer = self.share_embeddings_and_output_weights, self.language.output_layer
        weight = self.shared_embedding_or_output_weight() if tied else layer.weight
        tp_group = parallel.tp_group()
        first = tp_group.rank() * len(weight)
        num_tokens = min(max(self.vocab_size - first, 0), len(weight))
        group = tp_group if tp_group.size() > 1 else None
        return OutputHead(weight, Vocabulary(rule, first, num_tokens, group), kernels)

    def _response_rows(self, *, hidden_states: Tensor, context: LocalView, **kwargs: Any) -> Tensor:
        """Take the positions that predict a response token: nothing else needs logits."""
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        return hidden_states[context.predicts_R].squeeze(1)


class AddFeatures:
    """After a layer: add its own image features to the hidden states of the image tokens.

    A forward hook that finds everything in the layer's arguments: full recomputation calls the
    layer again, when other micro-batches have gone through it since.

    Args:
        place: which of the tower's 1 + K outputs.
    """

    def __init__(self, config: TransformerConfig, place: int) -> None:
        self._cuts_sequence = config.sequence_parallel
        self._hidden, self._place = config.hidden_size, place

    def __call__(self, layer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Return the layer's output, features added."""
        visual = kwargs["packed_seq_params"].visual
        if visual is None:
            return output
        hidden_T1D, *others = output
        start = self._place * self._hidden
        rows_MD = visual.features_MD[visual.feature_M, start : start + self._hidden]
        parts = parallel_state.get_tensor_model_parallel_world_size() if self._cuts_sequence else 1
        whole_T1D = hidden_T1D.new_zeros(len(hidden_T1D) * parts, 1, self._hidden)
        whole_T1D = whole_T1D.index_put((visual.position_M,), rows_MD.unsqueeze(1))
        if self._cuts_sequence:
            whole_T1D = scatter_to_sequence_parallel_region(whole_T1D)
        return (hidden_T1D + whole_T1D, *others)

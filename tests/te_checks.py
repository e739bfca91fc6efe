"""What `make te-check` holds Transformer Engine's model against: what each recipe should build, the
local layers, Hugging Face's names and shapes. Each check raises AssertionError with what it found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import fp8_utils
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from te_machine import META, reported_gpu
from transformer_engine.common import recipe as te_recipes
from transformer_engine.pytorch.quantization import get_align_size_for_quantization

from megatron_mmr1 import device
from megatron_mmr1.backend.model import PolicyStage, transformer_config
from megatron_mmr1.backend.weights import _EXPERT, _global_names
from megatron_mmr1.config.layout import fp8_tokens
from megatron_mmr1.config.schema import ParallelConfig, PrecisionConfig
from megatron_mmr1.convert import AttentionShape, family_of, required_hf_names
from megatron_mmr1.convert.rules import EXPERT_KINDS, gather, split

RECIPES = {
    "delayed": te_recipes.DelayedScaling,
    "tensorwise": te_recipes.Float8CurrentScaling,
    "blockwise": te_recipes.Float8BlockScaling,
}
# What each part of a layer must be. Other modules (dropout, softmax) hold no parameter.
CLASSES = {
    "linear_qkv": "TELayerNormColumnParallelLinear",
    "linear_proj": "TERowParallelLinear",
    "core_attention": "PackedTEAttention",
    "q_layernorm": "RMSNorm",
    "k_layernorm": "RMSNorm",
    "mlp.linear_fc1": "TELayerNormColumnParallelLinear",
    "mlp.linear_fc2": "TERowParallelLinear",
    "pre_mlp_layernorm": "RMSNorm",
    "experts": "TEGroupedMLP",
    "experts.linear_fc1": "TEColumnParallelGroupedLinear",
    "experts.linear_fc2": "TERowParallelGroupedLinear",
}


_BF16 = PrecisionConfig("bfloat16")


@dataclass(frozen=True)
class Piece:
    """One parameter of a rank: what it is made of, and what of it the rank holds.

    Attributes:
        hf_shapes: of the whole Hugging Face tensors, by name.
        shape: of the rank's part.
        parameter: itself.
    """

    hf_shapes: dict[str, tuple[int, ...]]
    shape: tuple[int, ...]
    parameter: Any


def build(
    hf_config: Any,
    layout: ParallelConfig,
    precision: PrecisionConfig,
    *,
    is_local: bool = False,
    on: torch.device = META,
) -> list[PolicyStage]:
    """Build this rank's stages, of Transformer Engine's layers or of local ones (without FP8)."""
    precision = _BF16 if is_local else precision
    with reported_gpu(on), patch.object(device, "has_gpu", lambda: not is_local):
        config = transformer_config(hf_config, layout, precision)
        config.init_model_with_meta_device = on == META
        stages = range(layout.vpp_size) if layout.vpp_size > 1 else [None]
        return [PolicyStage(hf_config, config, stage) for stage in stages]


def check_config(stages: Sequence[PolicyStage], precision: PrecisionConfig) -> None:
    """Hold what Megatron will enter around each layer against `precision.*`."""
    config, num_layers = stages[0].config, stages[0].config.num_layers
    recipe = fp8_utils.get_fp8_recipe(config)
    expected_class = RECIPES[precision.recipe]
    assert isinstance(recipe, expected_class), f"became {type(recipe).__name__}"
    assert recipe.fp8_format.name == precision.fp8.upper(), recipe.fp8_format
    if precision.recipe == "delayed":
        window = (recipe.amax_history_len, recipe.amax_compute_algo)
        assert window == (1024, "max"), window
    for needed in (
        get_align_size_for_quantization(recipe),
        fp8_utils.get_fp8_align_size(config.fp8_recipe),
    ):
        assert fp8_tokens(precision) % needed == 0, f"tokens need multiples of {needed}"
    found = {
        layer.layer_number - 1: not isinstance(
            fp8_utils.get_fp8_context(config, layer.layer_number - 1), nullcontext
        )
        for stage in stages
        for layer in stage.language.decoder.layers
    }
    outer = {0, num_layers - 1} if precision.first_last_bf16 else set()
    expected = {index: index not in outer for index in found}
    assert found == expected, f"layers in FP8: {[i for i, is_fp8 in found.items() if is_fp8]}"


def check_classes(stages: Sequence[PolicyStage]) -> None:
    """Every part of a layer is Transformer Engine's, and nothing else of the model is."""
    for stage in stages:
        layers = [id(m) for layer in stage.language.decoder.layers for m in layer.modules()]
        for layer in stage.language.decoder.layers:
            for name, module in layer.named_modules():
                wanted = next(
                    (CLASSES[end] for end in CLASSES if f".{name}".endswith(f".{end}")), None
                )
                found = type(module).__name__
                is_fused = found in ("IdentityOp", "Linear")
                assert wanted in (None, found) or is_fused, f"{name} is a {found}"
                if list(module.parameters(recurse=False)) and name not in ("mlp.router",):
                    assert _is_te(module), f"{name} holds weights and is a {found}"
        for name, module in stage.named_modules():
            if id(module) not in layers and _is_te(module):
                assert name == "language.decoder.final_layernorm", f"{name} is Transformer Engine's"


def _is_te(module: Any) -> bool:
    return any(base.__module__.startswith("transformer_engine.") for base in type(module).__mro__)


def pieces_of(
    stages: Sequence[PolicyStage], hf_config: Any, layout: ParallelConfig, ep_rank: int
) -> Iterator[Piece]:
    """What this rank's parameters are made of, by the conversion table."""
    family, text = family_of(hf_config), hf_config.get_text_config()
    shape = AttentionShape.of(text)
    first_expert = ep_rank * (getattr(text, "num_experts", None) or 0) // layout.ep_size
    for stage in stages:
        for name, parameter in _global_names(stage):
            if getattr(parameter, "shared", False):
                continue  # the last stage's copy of a tied embedding
            name = _EXPERT.sub(lambda match: str(int(match.group()) + first_expert), name)
            rule, names = required_hf_names(family.rules, name)
            part = torch.empty(parameter.shape, device=META)
            parts = [part] if rule.kind in EXPERT_KINDS else [part] * layout.tp_size
            whole = gather(rule.kind, parts, text.vocab_size)
            shapes = [tuple(p.shape) for p in split(rule.kind, whole, shape)]
            yield Piece(dict(zip(names, shapes, strict=True)), tuple(parameter.shape), parameter)


def check_against_local(te: Sequence[Piece], local: Sequence[Piece]) -> None:
    """Both have the same parameters, in the same parts."""
    both = [{tuple(p.hf_shapes.items()): p.shape for p in pieces} for pieces in (te, local)]
    assert both[0] == both[1], _difference(both[0].items(), both[1].items())
    assert len(both[0]) == len(te), "a Hugging Face tensor goes into two parameters"


def check_against_hf(found: dict[str, tuple[int, ...]], expected: dict[str, Any]) -> None:
    """All ranks' parameters together are the Hugging Face model's, name by name."""
    shapes = {name: tuple(shape) for name, shape in expected.items()}
    assert found == shapes, _difference(found.items(), shapes.items())


def checkpoint_keys(stages: Sequence[PolicyStage]) -> dict[Any, Any]:
    """Where this rank's weights lie in a checkpoint: (key, offset) to (whole shape, part's)."""
    found: dict[Any, Any] = {}

    def add(entry: Any) -> None:
        if isinstance(entry, ShardedTensorFactory):
            entry = entry.build()
        if isinstance(entry, ShardedTensor):
            found[entry.key, entry.global_offset] = entry.global_shape, entry.local_shape
        elif isinstance(entry, dict | list):
            for part in entry.values() if isinstance(entry, dict) else entry:
                add(part)
        else:
            # Scales of the delayed recipe: backend/checkpoint.py leaves them out.
            assert isinstance(entry, ShardedObject) and "._extra_state" in entry.key, entry

    with reported_gpu():
        for index, stage in enumerate(stages):
            add(list(stage.sharded_state_dict(prefix=f"{index}.").values()))
    return found


def check_keys(te: dict[Any, Any], local: dict[Any, Any]) -> None:
    """A checkpoint of local layers can be loaded, and the other way round."""
    assert te == local, _difference(te.items(), local.items())


def _difference(found: Any, expected: Any) -> str:
    more = [item for item in found if item not in expected][:2]
    less = [item for item in expected if item not in found][:2]
    return f"only here: {more}; only there: {less}"

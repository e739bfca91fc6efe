"""Mistakes that `make te-check` must notice: each makes one and runs the check that should fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import te_checks as checks
import te_values
import torch
import transformer_engine.pytorch as te
from published import PUBLISHED, config_of, tensors_of_hugging_face
from te_machine import played_rank, reported_gpu

from megatron_mmr1.config.schema import ParallelConfig, PrecisionConfig
from megatron_mmr1.convert import family_of
from megatron_mmr1.convert.rules import Rule

_FP8 = PrecisionConfig("bfloat16", "hybrid", "tensorwise", first_last_bf16=True)
_TP2 = ParallelConfig(tp_size=2, sequence_parallel=True)
_CONFIG = config_of(PUBLISHED["Qwen2.5-VL-7B"])


def _stages(precision: PrecisionConfig = _FP8, *, is_local: bool = False) -> list[Any]:
    return checks.build(_CONFIG, _TP2, precision, is_local=is_local)


def _with_rules(change: Callable[[Rule], Rule | None]) -> Any:
    """Have the checks read another table."""
    family = family_of(_CONFIG)
    rules = tuple(rule for rule in map(change, family.rules) if rule is not None)
    return patch.object(checks, "family_of", lambda config: replace(family, rules=rules))


def _a_fused_norm_without_a_rule() -> None:
    with _with_rules(lambda r: None if r.megatron.endswith("linear_fc1.layer_norm_weight") else r):
        list(checks.pieces_of(_stages(), _CONFIG, _TP2, 0))


def _a_rule_of_another_kind() -> None:
    def change(rule: Rule) -> Rule:
        is_it = rule.megatron.endswith("layers.*.mlp.linear_fc2.weight")
        return replace(rule, kind="replicated") if is_it else rule

    with _with_rules(change):
        pieces = list(checks.pieces_of(_stages(), _CONFIG, _TP2, 0))
    shapes = {name: shape for piece in pieces for name, shape in piece.hf_shapes.items()}
    checks.check_against_hf(shapes, tensors_of_hugging_face(_CONFIG))


def _a_parameter_of_another_shape() -> None:
    stages = _stages()
    layer = stages[0].language.decoder.layers[3].mlp.linear_fc2
    layer.weight = torch.nn.Parameter(layer.weight[:, :-16])
    local = checks.pieces_of(_stages(is_local=True), _CONFIG, _TP2, 0)
    checks.check_against_local(list(checks.pieces_of(stages, _CONFIG, _TP2, 0)), list(local))


def _a_key_of_the_checkpoint_renamed() -> None:
    local = _stages(is_local=True)
    for layer in local[0].language.decoder.layers:
        layer.submodules_config.sharded_state_dict_keys_map = {}
    checks.check_keys(checks.checkpoint_keys(_stages()), checks.checkpoint_keys(local))


def _first_and_last_layer_not_in_bf16() -> None:
    checks.check_config(_stages(replace(_FP8, first_last_bf16=False)), _FP8)


def _another_recipe() -> None:
    checks.check_config(_stages(replace(_FP8, recipe="blockwise")), _FP8)


def _another_format() -> None:
    checks.check_config(_stages(replace(_FP8, fp8="e4m3")), _FP8)


def _local_layers_that_would_ignore_fp8() -> None:
    checks.check_classes(_stages(is_local=True))


def _fp8_in_the_vision_tower() -> None:
    stages = _stages()
    with reported_gpu():
        stages[0].vision.merger.mlp[0] = te.Linear(64, 64, device="meta")
    checks.check_classes(stages)


def _values_in_another_order() -> None:
    split = te_values.split
    with patch.object(te_values, "split", lambda *given: split(*given)[::-1]):
        te_values.check_values("qwen2_5_vl", ParallelConfig())


def run(control: Callable[[], None]) -> None:
    """Make the mistake, as a rank of two; the values' check plays its own ranks."""
    if control is _values_in_another_order:
        control()
        return
    with played_rank(_TP2, 0):
        control()


# Each with words of the message that it must get.
CONTROLS: dict[str, tuple[Callable[[], None], str]] = {
    "a fused norm without a rule": (_a_fused_norm_without_a_rule, "no conversion rule for"),
    "a rule of another kind": (_a_rule_of_another_kind, "down_proj.weight"),
    "a parameter of another shape": (_a_parameter_of_another_shape, "layers.3.mlp.down_proj"),
    "a checkpoint's key renamed": (_a_key_of_the_checkpoint_renamed, "input_layernorm.weight"),
    "first and last layer not in bf16": (_first_and_last_layer_not_in_bf16, "layers in FP8: [0, "),
    "another recipe": (_another_recipe, "became Float8BlockScaling"),
    "another format": (_another_format, "E4M3"),
    "local layers, which ignore FP8": (_local_layers_that_would_ignore_fp8, "is a RmsNorm"),
    "Transformer Engine in the vision tower": (_fp8_in_the_vision_tower, "vision.merger.mlp.0"),
    "values in another order": (_values_in_another_order, "q_proj.weight came back changed"),
}

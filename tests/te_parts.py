"""Single parts that need Transformer Engine installed and no GPU: its fused Adam, fused gradient
accumulation, weights that are kept in FP8, and what is accepted where it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import te_checks as checks
import torch
from megatron.core.tensor_parallel import layers
from published import PUBLISHED, config_of
from te_machine import CPU, played_rank, reported_gpu
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.tensor.float8_tensor import (
    Float8CurrentScalingQuantizer,
    Float8Tensor,
)

from megatron_mmr1.backend import adam, precision
from megatron_mmr1.backend.model import PolicyStage, transformer_config
from megatron_mmr1.config.precision import check_precision
from megatron_mmr1.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig

_FP8 = PrecisionConfig("bfloat16", "hybrid")
_LR = 1e-3


def fp8_is_accepted_on_an_h100() -> str:
    """Nothing stands in its way where everything is there; an older card does."""
    check_precision(_FP8)
    with reported_gpu():
        precision.check_machine(_FP8)
    with reported_gpu(capability=(8, 9)):
        precision.check_machine(_FP8)
        assert "has 8.9" in _refusal(
            lambda: precision.check_machine(PrecisionConfig("bfloat16", "hybrid", "blockwise"))
        )
    assert "needs a GPU" in _refusal(lambda: precision.check_machine(_FP8))
    return ""


def megatron_takes_the_fused_adam() -> str:
    """The line that a run prints, and the request that it can't follow."""
    with reported_gpu():
        found = adam.find(OptimizerConfig(lr=_LR))
        assert (found.implementation, found.fuses_accumulation) == ("transformer_engine", True)
        off = adam.find(OptimizerConfig(lr=_LR, fused_accumulation="off"))
        assert not off.fuses_accumulation
        assert adam.find(OptimizerConfig(lr=_LR, implementation="transformer_engine")) == found
        for name in ("torch", "apex"):
            assert "where it is installed" in _refusal(
                lambda name=name: adam.find(OptimizerConfig(lr=_LR, implementation=name))
            )
    return str(found)


def accumulation_is_fused_without_apex() -> str:
    """Every linear layer adds up its weight's gradient; only the output layer asks for Apex."""
    hf_config = config_of(PUBLISHED["Qwen2.5-VL-7B"])

    def build() -> PolicyStage:
        with played_rank(ParallelConfig(), 0), reported_gpu():
            config = transformer_config(hf_config, ParallelConfig(), _FP8, True)
            config.init_model_with_meta_device = True
            return PolicyStage(hf_config, config)

    with patch.object(layers, "_grad_accum_fusion_available", False):
        try:
            build()
            raise AssertionError("the output layer was built without Apex")
        except RuntimeError as error:
            assert "ColumnParallelLinear" in str(error)
        adam.let_output_layer_be_built()
        stage = build()
    linear = [m for m in stage.language.decoder.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    assert linear and all(m.fuse_wgrad_accumulation for m in linear)
    return f"{len(linear)} layers"


def weights_in_fp8_are_read_and_written_exactly() -> str:
    """Exported is what a weight's bytes stand for; put aside and back, it has the same bytes."""
    scale = torch.tensor([0.5])
    first, second = (_fp8_weight(bytes_, scale) for bytes_ in (0x38, 0x44))  # 1.0 and 3.0
    plain = precision.plain(first)
    assert type(plain) is torch.Tensor and plain.dtype == torch.bfloat16
    assert plain.unique().tolist() == [0.5], plain.unique()
    kept = first.detach().clone()
    with torch.no_grad():
        first.copy_(second.detach())
        assert precision.plain(first).unique().tolist() == [1.5]
        first.copy_(kept)
    assert first._data.unique().tolist() == [0x38], "came back with other bytes"
    return ""


def _fp8_weight(byte: int, scale_inverse: torch.Tensor) -> torch.nn.Parameter:
    quantizer = Float8CurrentScalingQuantizer(fp8_dtype=DType.kFloat8E4M3, device=CPU)
    weight = Float8Tensor(
        shape=(16, 32),
        dtype=torch.bfloat16,
        data=torch.full((16, 32), byte, dtype=torch.uint8),
        fp8_scale_inv=scale_inverse.clone(),
        fp8_dtype=DType.kFloat8E4M3,
        quantizer=quantizer,
        device=CPU,
    )
    return torch.nn.Parameter(weight)


def fp8_weights_are_where_they_should_be() -> str:
    """Of the layers that compute in FP8, and of no other."""
    hf_config, layout = config_of(PUBLISHED["Qwen2.5-VL-7B"]), ParallelConfig(pp_size=2)
    counts = []
    for rank in range(2):
        with played_rank(layout, rank):
            config = PrecisionConfig("bfloat16", "hybrid", "tensorwise", True, True)
            (stage,) = checks.build(hf_config, layout, config)
            found = {
                layer.layer_number - 1: {
                    m.primary_weights_in_fp8
                    for m in layer.modules()
                    if hasattr(m, "primary_weights_in_fp8")
                }
                for layer in stage.language.decoder.layers
            }
            bf16 = [index for index, kinds in found.items() if kinds == {False}]
            assert all(len(kinds) == 1 for kinds in found.values()), found
            counts += bf16
    assert counts == [0, 27], counts
    return "all but 0 and 27"


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("not refused")


PARTS: dict[str, Callable[[], str]] = {
    "FP8 is accepted on an H100": fp8_is_accepted_on_an_h100,
    "Megatron takes the fused Adam": megatron_takes_the_fused_adam,
    "gradient accumulation is fused without Apex": accumulation_is_fused_without_apex,
    "weights in FP8 are read and written exactly": weights_in_fp8_are_read_and_written_exactly,
    "weights in FP8 are where they should be": fp8_weights_are_where_they_should_be,
}

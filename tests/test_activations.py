"""The formulas for activations, beside what autograd keeps of real layers on a CPU.

Widths are the real ones but for the layers' number and the vocabulary, which cancel out or don't
matter. T tokens.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published import PUBLISHED

from megatron_mmr1 import device
from megatron_mmr1.config.schema import ParallelConfig, PrecisionConfig
from megatron_mmr1.planning.activations import (
    LayerSizes,
    decoder_bytes,
    layer_bytes_a_token,
    tower_bytes_a_patch,
)

BFLOAT16 = 2


def sizes_of_3b(**text: int) -> Any:
    from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig

    config = copy.deepcopy(PUBLISHED["Qwen2.5-VL-3B"].config)
    config.pop("model_type")
    config["text_config"] |= {"vocab_size": 512, "bos_token_id": None, "eos_token_id": None, **text}
    return Qwen2_5_VLConfig(**config)


def kept(module: torch.nn.Module, forward: Callable[[], Any]) -> dict[int, tuple[int, int, Any]]:
    """What autograd keeps besides parameters: bytes, last size and type, by storage."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    found: dict[int, tuple[int, int, Any]] = {}
    alive = []  # an address is a tensor's for as long as it lives

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor.shape[-1], tensor.dtype)
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(forward())
    return found


def decoder_keeps(num_layers: int, num_tokens: int, recompute: str = "none") -> dict:
    from megatron_mmr1.backend.attention import LocalSequences
    from megatron_mmr1.backend.layout import LocalView
    from megatron_mmr1.backend.model import PolicyStage, transformer_config

    hf_config = sizes_of_3b(num_hidden_layers=num_layers)
    del hf_config.vision_config
    hf_config.vision_config = None
    layout = ParallelConfig(recompute=recompute)
    half = num_tokens // 2
    nothing = torch.empty(0, dtype=torch.long)
    view = LocalView(
        token_ids_T=torch.zeros(num_tokens, dtype=torch.long),
        position_ids_3T=torch.arange(half).repeat(2).expand(3, num_tokens),
        sequences=LocalSequences.of(
            [0, half, num_tokens], [torch.arange(num_tokens)], 0, torch.device("cpu")
        ),
        visual_position_M=nothing,
        visual_feature_M=nothing,
        predicts_R=torch.arange(num_tokens),
        row_index_R=torch.arange(num_tokens),
        rows=None,  # type: ignore[arg-type]
        whole_rows=None,  # type: ignore[arg-type]
    )
    with device.seam():
        config = transformer_config(hf_config, layout, PrecisionConfig("bfloat16"))
        stage = PolicyStage(hf_config, config)
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        return kept(stage, lambda: stage(view, None))


def total(found: dict[int, tuple[int, int, Any]]) -> int:
    return sum(size for size, _, _ in found.values())


def test_a_decoder_layer_keeps_what_the_formula_says(process_group: None):
    """The MLP's share to the byte. In all, the CPU's layers keep 18% more than the estimate for
    fused norms: float32 copies in both norms, and attention's gathered output.
    """
    num_tokens = 64
    one, two = (decoder_keeps(n, num_tokens) for n in (1, 2))
    sizes = LayerSizes.of(sizes_of_3b().get_text_config())
    mlp = [
        sum(size for size, width, _ in found.values() if width == sizes.intermediate)
        for found in (one, two)
    ]
    assert mlp[1] - mlp[0] == BFLOAT16 * 5 * sizes.intermediate * num_tokens
    a_token = (total(two) - total(one)) / num_tokens
    estimate = layer_bytes_a_token(sizes, ParallelConfig(), BFLOAT16)
    assert 1.0 < a_token / estimate < 1.25


def test_full_recomputation_keeps_a_layers_input_alone(process_group: None):
    num_tokens = 64
    one, three = (decoder_keeps(n, num_tokens, "full") for n in (1, 3))
    sizes = LayerSizes.of(sizes_of_3b().get_text_config())
    layout = ParallelConfig(recompute="full")
    estimates = [decoder_bytes(sizes, layout, n, num_tokens, 0, BFLOAT16) for n in (1, 3)]
    assert total(three) - total(one) == estimates[1] - estimates[0]


def test_parallelism_cuts_and_pipelines_multiply():
    sizes = LayerSizes(64, 256, 64, 16)
    whole = layer_bytes_a_token(sizes, ParallelConfig(), BFLOAT16)
    norms = BFLOAT16 * 4 * 64
    tp2 = ParallelConfig(tp_size=2)
    assert layer_bytes_a_token(sizes, tp2, BFLOAT16) == norms + (whole - norms) / 2
    sp2 = ParallelConfig(tp_size=2, sequence_parallel=True)
    assert layer_bytes_a_token(sizes, sp2, BFLOAT16) == whole / 2

    def stage(index: int, **layout: int) -> float:
        return decoder_bytes(sizes, ParallelConfig(**layout), 8, 1000, index, BFLOAT16)  # type: ignore[arg-type]

    alone = stage(0)
    assert alone == 8 * 1000 * whole
    assert stage(0, cp_size=2) == alone / 2
    assert [stage(index, pp_size=4) / alone for index in range(4)] == [4, 3, 2, 1]
    assert stage(3, pp_size=4, vpp_size=2) == pytest.approx(alone * (1 + 3 / 8))


def test_the_vision_tower_keeps_what_the_formula_says():
    """On a CPU in bfloat16, windows and full attention alike: within 0.2%."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )

    def keeps(depth: int, full: list[int]) -> int:
        vision: Any = sizes_of_3b().vision_config
        vision.depth, vision.fullatt_block_indexes = depth, full
        vision._attn_implementation = "sdpa"
        tower = Qwen2_5_VisionTransformerPretrainedModel(vision).bfloat16()
        pixels = torch.zeros(16 * 16, 3 * 2 * 14 * 14, dtype=torch.bfloat16)
        return total(kept(tower, lambda: tower(pixels, grid_thw=torch.tensor([[1, 16, 16]]))))

    vision: Any = sizes_of_3b().vision_config
    vision.depth = 1
    estimate = tower_bytes_a_patch(vision, BFLOAT16)
    base = keeps(1, [])
    for full in ([], [1]):
        assert (keeps(2, full) - base) / (16 * 16) == pytest.approx(estimate, rel=2e-3)

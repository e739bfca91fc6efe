"""The tiny models of all families: Hugging Face loads and runs them, a seed gives their bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_mmr1.parity.models import TINY_MODELS, build_tiny

TinyFolder = Callable[[str], Path]


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    is_multimodal = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    auto_class: Any = AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM
    return auto_class.from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_hugging_face_loads_every_tensor_and_runs(tiny_folder: TinyFolder, name: str) -> None:
    model, info = load(tiny_folder(name))
    assert not any(info.values()), info
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = model(input_ids=torch.arange(20, 40)[None]).logits
    # Neither flat, which would hide a wrong layer, nor so peaked that softmax hides it.
    assert 0.2 < logits.std() < 2


@pytest.mark.parametrize("name", TINY_MODELS)
def test_no_parameter_is_what_its_kind_is_initialised_to(
    tiny_folder: TinyFolder, name: str
) -> None:
    for key, tensor in load_file(tiny_folder(name) / "model.safetensors").items():
        assert tensor.std() > 0.02, key  # not all ones, not all zeros
        if tensor.ndim == 1 and not key.endswith("bias"):
            assert (tensor.mean() - 1).abs() < 0.2, key


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_same_seed_gives_the_same_files(
    tiny_folder: TinyFolder, tmp_path: Path, name: str
) -> None:
    again = build_tiny(name, tmp_path / "again")
    files = sorted(path.name for path in again.iterdir())
    assert files == sorted(path.name for path in tiny_folder(name).iterdir())
    for file in files:
        assert (again / file).read_bytes() == (tiny_folder(name) / file).read_bytes(), file


def test_another_seed_gives_other_weights(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    other = build_tiny("qwen3", tmp_path / "other", seed=1)
    name = "model.safetensors"
    assert (other / name).read_bytes() != (tiny_folder("qwen3") / name).read_bytes()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_tied_model_has_no_output_layer(tmp_path: Path, name: str) -> None:
    folder = build_tiny(name, tmp_path / "tied", tied=True)
    assert not any("lm_head" in key for key in load_file(folder / "model.safetensors"))
    model, info = load(folder)
    assert not any(info.values()), info
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'qwen9'; use one of qwen2_5_vl"):
        build_tiny("qwen9", tmp_path / "model")

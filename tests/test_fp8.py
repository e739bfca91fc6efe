"""FP8 as far as it needs no GPU: what a machine is refused, whose Adam is taken, weights that
follow the optimizer's, and the emulation for the study, against values worked out by hand.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import make_policy, make_step, relative_difference, weights
from torch.overrides import TorchFunctionMode

from megatron_mmr1 import device
from megatron_mmr1.backend import adam, fp8_emulation, losses, precision
from megatron_mmr1.backend.fp8_emulation import (
    E4M3,
    E5M2,
    Fp8Emulation,
    block_scales,
    decoder_in_fp8,
    round_to_fp8,
    tensor_scale,
)
from megatron_mmr1.config.schema import OptimizerConfig, PrecisionConfig
from megatron_mmr1.kernels.contract import SoftmaxRule

FP8 = PrecisionConfig("bfloat16", "hybrid")
WHOLE_SOFTMAX = SoftmaxRule(1.0, ())
without_te = pytest.mark.skipif(
    find_spec("transformer_engine") is not None, reason="Transformer Engine is installed here"
)


def report_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")


# What a machine is refused


def test_fp8_without_a_gpu_is_refused_and_bfloat16_is_not():
    precision.check_machine(PrecisionConfig("bfloat16"))
    with pytest.raises(ValueError, match=r"fp8='hybrid' with .* needs a GPU, .* use precision"):
        precision.check_machine(FP8)


def test_a_policy_in_fp8_is_refused_before_its_model_is_built(tiny_model_dir: Path):
    """Megatron itself would train it in full precision without a word."""
    with pytest.raises(ValueError, match="needs a GPU, and there is none"):
        make_policy(tiny_model_dir, precision=FP8)


@pytest.mark.parametrize(
    ("capability", "recipe", "words"),
    [
        ((8, 0), "tensorwise", "capability 8.9, and a card has 8.0; use precision.fp8=off"),
        ((8, 0), "blockwise", "capability 9.0, and a card has 8.0; use precision.fp8=off"),
        ((8, 9), "blockwise", "a card has 8.9; use precision.fp8=off, or recipe=tensorwise"),
    ],
)
def test_an_older_card_is_refused_by_its_capability(monkeypatch, capability, recipe, words):
    report_gpu(monkeypatch, capability)
    with pytest.raises(ValueError) as caught:
        precision.check_machine(replace(FP8, recipe=recipe))
    assert words in str(caught.value)


@without_te
def test_a_transformer_engine_that_cannot_be_imported_is_refused_with_its_reason(monkeypatch):
    report_gpu(monkeypatch, (9, 0))
    with pytest.raises(ValueError, match=r"ModuleNotFoundError.*requirements-cuda\.txt"):
        precision.check_machine(FP8)


# Whose Adam, and who adds up gradients


@without_te
def test_on_a_cpu_the_optimizer_is_torchs_and_says_so():
    found = adam.find(OptimizerConfig(lr=1.0))
    assert (found.implementation, found.fuses_accumulation) == ("torch", False)
    assert str(found) == "optimizer: torch's AdamW; gradient accumulation: not fused"
    assert adam.find(OptimizerConfig(lr=1.0, implementation="torch")) == found


@without_te
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"implementation": "apex"}, "PyPI's apex is another project"),
        ({"implementation": "transformer_engine"}, "install requirements-cuda.txt"),
        ({"fused_accumulation": "on"}, "needs a GPU, where Transformer Engine's layers have it"),
        ({"cpu_offload": 0.5}, "there is no GPU; use 0"),
    ],
)
def test_a_request_for_a_part_that_is_not_there_is_refused(config, words):
    with pytest.raises(ValueError) as caught:
        adam.find(OptimizerConfig(lr=1.0, **config))
    key, value = next(iter(config.items()))
    assert str(caught.value).startswith(f"optimizer.{key}={value!r}")
    assert words in str(caught.value)


def test_a_fused_adam_that_megatron_took_is_named_and_torchs_is_refused(monkeypatch):
    """The class stands in for one that no machine without a GPU has."""
    fused = type(
        "FusedAdam", (), {"__module__": "transformer_engine.pytorch.optimizers.fused_adam"}
    )
    monkeypatch.setattr(adam.megatron_optimizer, "Adam", fused)
    monkeypatch.setattr(adam.megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    found = adam.find(OptimizerConfig(lr=1.0))
    assert str(found).startswith("optimizer: Transformer Engine's FusedAdam")
    for name in ("torch", "apex"):
        with pytest.raises(ValueError, match="where it is installed; use auto"):
            adam.find(OptimizerConfig(lr=1.0, implementation=name))


def test_an_apex_without_its_extensions_is_refused(monkeypatch):
    apex = type("FusedAdam", (), {"__module__": "apex.optimizers.fused_adam"})
    monkeypatch.setattr(adam.megatron_optimizer, "Adam", apex)
    monkeypatch.setattr(adam.megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    with pytest.raises(ValueError, match="without its CUDA extensions"):
        adam.find(OptimizerConfig(lr=1.0))


# Optimizer states on the CPU


class _PlayedGpu(TorchFunctionMode):
    """Says that tensors are on a GPU, unless they were copied to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        is_copy = bool(args) and hasattr(args[0], "is_copy")
        if func == torch.Tensor.is_cuda.__get__:
            return not is_copy
        result = func(*args, **kwargs)
        if func is torch.Tensor.cpu or (is_copy and isinstance(result, torch.Tensor)):
            result.is_copy = True
        return result


class _NoStream:
    """A CUDA stream, or an event, with nothing to wait for."""

    def __getattr__(self, name: str):
        return lambda *args: self


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 1.0), ("bfloat16", 0.5)])
def test_steps_on_the_cpu_are_those_of_the_plain_optimizer(
    tiny_model_dir, tiny_processor, samples, monkeypatch, dtype, share
):
    """Megatron's optimizer for it, on tensors that only say where they are: copies to the CPU and
    back, and steps, but no stream, which is what a GPU has to show.
    """
    plain = make_policy(tiny_model_dir, dtype=dtype)
    step, start = make_step(plain, tiny_processor, samples), weights(plain)
    monkeypatch.setattr(adam, "find", lambda config: adam.Found("torch", False))
    monkeypatch.setattr(torch.cuda, "Stream", _NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setitem(device._CUDA_FUNCTIONS, "current_stream", _NoStream)
    with _PlayedGpu():
        split = make_policy(tiny_model_dir, dtype=dtype, cpu_offload=share)
    (hybrid,) = {id(o): o for o in split.optimizer.chained_optimizers}.values()
    on_cpu = [p.numel() for group in hybrid.optimizer.cpu_param_groups for p in group["params"]]
    everything = sum(p.numel() for p in plain.chunks[0].parameters())
    assert share <= sum(on_cpu) / everything <= share + 0.2
    take_step = split.optimizer.step

    def step_on_the_gpu():
        with _PlayedGpu():
            return take_step()

    monkeypatch.setattr(split.optimizer, "step", step_on_the_gpu)
    for _ in range(3):
        expected = plain.train_step(step, losses.supervised(), WHOLE_SOFTMAX)
        assert split.train_step(step, losses.supervised(), WHOLE_SOFTMAX) == expected
    # Torch steps on a CPU with another kernel, which rounds differently: a bfloat16 weight here and
    # there is its neighbour. What a step moves is a hundred times that.
    moved, apart = (
        sum(float((tensor - other[name]).float().norm()) for name, tensor in split.named_tensors())
        for other in (start, weights(plain))
    )
    assert apart < moved / 100, (apart, moved)


# Weights that are kept in FP8


@pytest.mark.usefixtures("process_group")
def test_weights_are_made_of_the_optimizers_again_as_after_a_step(
    tiny_model_dir, tiny_processor, samples
):
    """What a resume does with weights in FP8; here they are in bfloat16, and spoiled on purpose."""
    policy = make_policy(tiny_model_dir, dtype="bfloat16", lr=1e-2)
    policy.train_step(
        make_step(policy, tiny_processor, samples), losses.supervised(), WHOLE_SOFTMAX
    )
    after = weights(policy)
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.zero_()
    policy._keeps_fp8 = True
    policy.follow_optimizer()
    assert all(torch.equal(tensor, after[name]) for name, tensor in policy.named_tensors())


def test_what_an_fp8_weight_was_made_of_is_written_with_it():
    """Else the optimizer would start from memory that nothing has initialised."""
    weight = torch.nn.Parameter(torch.zeros(3))
    original = torch.full((3,), 7.0)
    weight.get_high_precision_init_val = lambda: original  # type: ignore[attr-defined]
    precision.write_weight(weight, torch.tensor([1.0, 2.0, 3.0]))
    assert weight.tolist() == original.tolist() == [1.0, 2.0, 3.0]


# The emulation


def test_e4m3_rounds_to_eighths_between_two_powers_and_saturates_at_448():
    values = torch.tensor([1.0, 1.06, 1.0625, 1.1875, 17.0, 447.0, 460.0, -1e6, 2.0**-9, 2.0**-11])
    #  three bits: steps of 1/8 above 1, ties to even; steps of 2 above 16, of 32 above 256
    expected = [1.0, 1.0, 1.0, 1.25, 16.0, 448.0, 448.0, -448.0, 2.0**-9, 0.0]
    assert round_to_fp8(values, E4M3, 1.0).tolist() == expected


def test_e5m2_rounds_to_quarters_and_saturates_at_57344():
    values = torch.tensor([1.0, 1.125, 1.375, 3.4, 60000.0, -1e9, 2.0**-16, 2.0**-18])
    expected = [1.0, 1.0, 1.5, 3.5, 57344.0, -57344.0, 2.0**-16, 0.0]
    assert round_to_fp8(values, E5M2, 1.0).tolist() == expected


def test_a_tensors_largest_value_is_kept_exactly_and_small_ones_by_its_scale():
    values = torch.tensor([0.002, 0.5, -0.875])  # times 512, which maps 0.875 to 448
    scale = tensor_scale(0.875, E4M3)
    assert scale == 512.0
    # 0.002 * 512 = 1.024: to 1.0; 0.5 * 512 = 256, exact
    assert round_to_fp8(values, E4M3, scale).tolist() == [1 / 512, 0.5, -0.875]
    assert tensor_scale(0.0, E5M2) == 1.0


def test_blocks_have_a_power_of_two_each_with_which_nothing_saturates():
    values = torch.ones(3, 300)
    values[0, 130], values[2, 299] = 450.0, -0.001
    scales = block_scales(values, E4M3, (1, 128))
    assert scales.shape == values.shape
    # 448 / 450 rounds down to 1/2; 448 / 1 to 256. The last block is 44 wide.
    assert scales[0, [0, 127, 128, 255, 256]].tolist() == [256, 256, 0.5, 0.5, 256]
    whole = block_scales(values, E4M3, (128, 128))
    assert whole[:, 0].tolist() == [256, 256, 256] and whole[:, 200].tolist() == [0.5, 0.5, 0.5]


def test_delayed_scales_follow_the_largest_of_earlier_products():
    weight, emulation = torch.nn.Parameter(torch.ones(1, 2)), Fp8Emulation(recipe="delayed")
    round_it = lambda value: float(  # noqa: E731
        fp8_emulation._rounded(torch.tensor([[value]]), E4M3, emulation, weight, "input")[0]
    )
    assert round_it(896.0) == 448.0  # the first has no history: scale 1, it saturates
    assert round_it(896.0) == 896.0  # scaled by a half from then on
    assert round_it(2.0**-9) == 0.0  # a half of the smallest, 2^-9, goes to the even 0


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("recipe", fp8_emulation.RECIPES)
def test_only_the_decoders_linear_layers_feel_the_rounding_and_only_inside(
    tiny_model_dir, tiny_processor, samples, recipe
):
    policy = make_policy(tiny_model_dir, lr=0.0)
    step = make_step(policy, tiny_processor, samples)
    plain = torch.cat(policy.logprobs(step, WHOLE_SOFTMAX))
    with decoder_in_fp8(Fp8Emulation(recipe=recipe)):
        first = torch.cat(policy.logprobs(step, WHOLE_SOFTMAX))
        rounded = torch.cat(policy.logprobs(step, WHOLE_SOFTMAX))
    error = float((rounded - plain).abs().mean())
    # A relative step of 1/16 in each product: far above float32's noise, far below the log-probs.
    assert 1e-4 < error < 0.3, error
    assert torch.equal(first, rounded) == (recipe != "delayed")
    assert torch.equal(torch.cat(policy.logprobs(step, WHOLE_SOFTMAX)), plain)


@pytest.mark.usefixtures("process_group")
def test_gradients_in_emulated_fp8_are_close_and_not_the_same(
    tiny_model_dir, tiny_processor, samples
):
    policy = make_policy(tiny_model_dir, lr=0.0)
    step = make_step(policy, tiny_processor, samples)
    found = []
    for emulation in (None, Fp8Emulation("hybrid"), Fp8Emulation("e4m3")):
        if emulation is None:
            policy.train_step(step, losses.supervised(), WHOLE_SOFTMAX)
        else:
            with decoder_in_fp8(emulation):
                policy.train_step(step, losses.supervised(), WHOLE_SOFTMAX)
        name = "model.layers.1.mlp.down_proj.weight"
        found.append(next(t.clone() for n, t in policy.named_gradients() if n == name))
    plain, hybrid, e4m3 = found
    # E5M2 has two bits of fraction, E4M3 three: steps of 1/8 and 1/16 of a value at most.
    assert 1e-3 < relative_difference(e4m3, plain) < relative_difference(hybrid, plain) < 0.2

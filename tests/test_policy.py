"""The Megatron policy against Hugging Face: log-probs, gradients, weights.

Tolerances: the two implementations add the same float32 numbers in another order. Log-probs then
differ by 2e-6, gradients by 2e-6 of their norm; the bounds leave a factor of five. Where nothing
but copying happens, the bound is 0.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    TINY_SHAPE,
    gradients,
    make_policy,
    make_step,
    mixed_prompts,
    relative_difference,
    sample_logprobs,
    scored_groups,
    weights,
    with_constants,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.algorithms.grpo_loss import supervised_loss
from megatron_mmr1.backend import batching, losses
from megatron_mmr1.backend.layer_spec import layer_spec
from megatron_mmr1.backend.vision import CHUNK_PATCHES, StepFeatures
from megatron_mmr1.config.schema import AlgorithmConfig, ParallelConfig
from megatron_mmr1.convert import FAMILIES, AttentionShape, megatron_to_hf, required_hf_names
from megatron_mmr1.convert.rules import gather, merge, shard, split
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.parity.controls import scaled
from megatron_mmr1.parity.reference import advantages, hf_gradients, hf_logprobs, load_hf
from megatron_mmr1.types import ScoredGroup, StepBatch, Verdict

pytestmark = pytest.mark.usefixtures("process_group")

WHOLE_SOFTMAX = SoftmaxRule(1.0, ())
LOGPROB_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5
SUM_TOLERANCE = 1e-6  # the same terms of a scalar, added up in another order

Samples = list[batching.Sample]


@pytest.fixture(scope="module")
def rule(tiny_processor: PromptProcessor) -> SoftmaxRule:
    return SoftmaxRule(0.7, tiny_processor.banned_token_ids)


# Log-probs (at other layouts than one process: tests/test_parity.py)


def worst_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def all_hf_logprobs(model: Any, samples: Samples, rule: SoftmaxRule) -> list[Tensor]:
    return [hf_logprobs(model, s, rule.temperature, rule.banned_token_ids) for s in samples]


@pytest.mark.parametrize("folder_name", ["tiny_model_dir", "tied_model_dir"])
def test_logprobs_equal_hugging_face(
    request: pytest.FixtureRequest,
    folder_name: str,
    tiny_processor: PromptProcessor,
    samples: Samples,
    rule: SoftmaxRule,
):
    folder = request.getfixturevalue(folder_name)
    policy = make_policy(folder)
    ours = sample_logprobs(policy, make_step(policy, tiny_processor, samples), rule)
    theirs = all_hf_logprobs(load_hf(folder), samples, rule)
    assert worst_difference(ours, theirs) <= LOGPROB_TOLERANCE


def test_a_step_without_images_equals_hugging_face(
    tiny_model_dir: Path, tiny_processor: PromptProcessor, samples: Samples
):
    text_only = [s for s in samples if s.prompt.pixel_values is None]
    policy = make_policy(tiny_model_dir)
    step = make_step(policy, tiny_processor, text_only)
    assert step.images == ()
    ours = sample_logprobs(policy, step, WHOLE_SOFTMAX)
    theirs = all_hf_logprobs(load_hf(tiny_model_dir), text_only, WHOLE_SOFTMAX)
    assert worst_difference(ours, theirs) <= LOGPROB_TOLERANCE
    assert policy.train_step(step, losses.supervised(), WHOLE_SOFTMAX)["grad_norm"] > 0
    assert all(not g.any() for name, g in gradients(policy).items() if name.startswith("visual."))


def test_positions_of_plain_text_would_be_noticed(
    tiny_model_dir: Path, tiny_processor: PromptProcessor, samples: Samples
):
    """Negative control of the comparison with Hugging Face, which makes its positions itself."""
    flat = [
        replace(s, prompt=replace(s.prompt, position_ids=torch.arange(n).expand(3, n)))
        for s in samples
        for n in [len(s.prompt.token_ids)]
    ]
    policy = make_policy(tiny_model_dir)
    ours = sample_logprobs(policy, make_step(policy, tiny_processor, flat), WHOLE_SOFTMAX)
    theirs = all_hf_logprobs(load_hf(tiny_model_dir), samples, WHOLE_SOFTMAX)
    for sample, a, b in zip(samples, ours, theirs, strict=True):
        has_image = sample.prompt.pixel_values is not None
        assert (worst_difference([a], [b]) > 0.01) == has_image


def test_qkv_rows_in_another_order_would_be_noticed(
    tiny_model_dir: Path, tiny_processor: PromptProcessor, samples: Samples
):
    """Negative control: all queries, then keys, then values, as a naive converter stacks them."""
    policy = make_policy(tiny_model_dir)
    with torch.no_grad():
        for name, parameter in policy.chunks[0].named_parameters():
            if "linear_qkv" in name:
                named = [(name, parameter.clone())]
                parts = megatron_to_hf(FAMILIES["qwen2_5_vl"].rules, named, TINY_SHAPE)
                parameter.copy_(torch.cat([tensor for _, tensor in parts]))
    ours = sample_logprobs(policy, make_step(policy, tiny_processor, samples), WHOLE_SOFTMAX)
    theirs = all_hf_logprobs(load_hf(tiny_model_dir), samples, WHOLE_SOFTMAX)
    assert all(worst_difference([a], [b]) > 0.1 for a, b in zip(ours, theirs, strict=True))


def test_bfloat16_is_as_close_to_float32_as_hugging_face_in_bfloat16(
    tiny_model_dir: Path, tiny_processor: PromptProcessor, samples: Samples
):
    """Both round at every layer, in different places: neither error bounds the other, hence 1.5."""
    policy = make_policy(tiny_model_dir, dtype="bfloat16")
    step = make_step(policy, tiny_processor, samples)
    ours = torch.cat(sample_logprobs(policy, step, WHOLE_SOFTMAX))
    exact, theirs = (
        torch.cat(all_hf_logprobs(load_hf(tiny_model_dir, dtype), samples, WHOLE_SOFTMAX))
        for dtype in (torch.float32, torch.bfloat16)
    )
    our_error, their_error = (ours - exact).abs().mean(), (theirs - exact).abs().mean()
    assert 0 < our_error <= 1.5 * their_error


# Loss and gradients


def constants_for(model: Any, samples: Samples, rule: SoftmaxRule) -> list[list[Tensor]]:
    """Old and reference log-probs, so far from the present ones that some ratios are clipped."""
    torch.manual_seed(0)
    now = all_hf_logprobs(model, samples, rule)
    return [[x + 0.3 * torch.randn_like(x) for x in now] for _ in range(2)]


def hf_grpo_loss(
    model: Any,
    samples: Samples,
    rule: SoftmaxRule,
    constants: list[list[Tensor]],
    config: AlgorithmConfig,
) -> Tensor:
    """The equations, a sequence at a time, unpadded, with autograd through Hugging Face."""
    per_sequence = []
    for sample, advantage, old, ref in zip(samples, advantages(samples), *constants, strict=True):
        logprobs = hf_logprobs(model, sample, rule.temperature, rule.banned_token_ids)
        ratio = (logprobs - old).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        kl = (ref - logprobs).exp() - (ref - logprobs) - 1
        per_sequence.append(-gain + config.kl_coefficient * kl)
    if config.aggregation == "token_mean":
        return torch.cat(per_sequence).mean()
    return torch.stack([tokens.mean() for tokens in per_sequence]).mean()


def assert_gradients_equal(ours: dict[str, Tensor], model: Any) -> None:
    theirs = hf_gradients(model)
    assert ours.keys() == theirs.keys()
    differences = {name: relative_difference(ours[name], theirs[name]) for name in ours}
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] <= GRADIENT_TOLERANCE, worst


@pytest.mark.parametrize("folder_name", ["tiny_model_dir", "tied_model_dir"])
def test_every_supervised_gradient_equals_hugging_face_autograd(
    request: pytest.FixtureRequest,
    folder_name: str,
    tiny_processor: PromptProcessor,
    samples: Samples,
):
    folder = request.getfixturevalue(folder_name)
    model, policy = load_hf(folder), make_policy(folder)
    logprobs = torch.cat([hf_logprobs(model, sample, 1.0, ()) for sample in samples])
    loss = supervised_loss(logprobs, torch.full_like(logprobs, 1 / len(logprobs)))
    loss.backward()
    step = make_step(policy, tiny_processor, samples)
    metrics = policy.train_step(step, losses.supervised(), WHOLE_SOFTMAX)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=SUM_TOLERANCE)
    assert_gradients_equal(gradients(policy), model)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_every_grpo_gradient_equals_hugging_face_autograd(
    tiny_model_dir: Path,
    tiny_processor: PromptProcessor,
    samples: Samples,
    rule: SoftmaxRule,
    aggregation: str,
):
    config = AlgorithmConfig(kl_coefficient=0.1, aggregation=aggregation)
    model, policy = load_hf(tiny_model_dir), make_policy(tiny_model_dir)
    constants = constants_for(model, samples, rule)
    loss = hf_grpo_loss(model, samples, rule, constants, config)
    loss.backward()
    step = make_step(policy, tiny_processor, samples, aggregation=aggregation)
    metrics = policy.train_step(with_constants(step, *constants), losses.grpo(config), rule)
    assert 0 < metrics["clip_fraction"] < 1, "the case must have clipped and unclipped tokens"
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)  # terms of both signs cancel
    assert_gradients_equal(gradients(policy), model)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_loss_and_gradients_do_not_change_with_the_packing(
    tiny_model_dir: Path,
    tiny_processor: PromptProcessor,
    samples: Samples,
    rule: SoftmaxRule,
    aggregation: str,
):
    """The order of additions changes, which float32 rounds."""
    config = AlgorithmConfig(aggregation=aggregation, kl_coefficient=0.1)
    constants = constants_for(load_hf(tiny_model_dir), samples, rule)

    def train(
        max_tokens: int, change: Callable[[StepBatch], StepBatch] = lambda step: step
    ) -> tuple[dict[str, float], dict[str, Tensor], int]:
        policy = make_policy(tiny_model_dir)
        step = change(make_step(policy, tiny_processor, samples, max_tokens, aggregation))
        step = with_constants(step, *constants)
        metrics = policy.train_step(step, losses.grpo(config), rule)
        return metrics, gradients(policy), len(step.micro_batches)

    whole, whole_gradients, num_batches = train(1024)
    assert num_batches == 1
    for max_tokens in (40, 64, 128):
        metrics, parts_gradients, num_batches = train(max_tokens)
        assert num_batches > 1
        assert metrics == pytest.approx(whole, rel=GRADIENT_TOLERANCE, abs=SUM_TOLERANCE)
        for name, gradient in whole_gradients.items():
            assert relative_difference(parts_gradients[name], gradient) <= GRADIENT_TOLERANCE

    # Negative control: each micro-batch with its own denominator, then the mean of them.
    def own_denominators(step: StepBatch) -> StepBatch:
        batches = []
        for batch in step.micro_batches:
            own = float(batch.rows.token_weights_R.sum()) * len(step.micro_batches)
            batches.append(replace(batch, rows=scaled(batch.rows, 1 / own)))
        return replace(step, micro_batches=tuple(batches))

    assert train(64, own_denominators)[0]["loss"] != pytest.approx(whole["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("recompute", "recompute_vision", "is_repeated"),
    [
        ("none", False, False),
        ("selective", False, False),
        ("none", True, True),
        ("full", False, True),
    ],
)
def test_images_of_a_group_are_encoded_once_a_step(
    tiny_model_dir: Path,
    tiny_processor: PromptProcessor,
    recompute: str,
    recompute_vision: bool,
    is_repeated: bool,
):
    """Though its responses lie in several micro-batches. Recomputation of the tower, which full
    recomputation implies, encodes them again in the backward pass; a frozen tower serves all passes
    of a step.
    """
    prompts = mixed_prompts(tiny_processor)
    samples = batching.samples_of_groups(scored_groups(prompts, tiny_processor, group_size=4))
    num_patches = sum(len(p.pixel_values) for p in prompts if p.pixel_values is not None)
    loss = losses.grpo(AlgorithmConfig())
    for freeze_vision in (False, True):
        policy = make_policy(
            tiny_model_dir,
            freeze_vision=freeze_vision,
            layout=ParallelConfig(recompute=recompute, recompute_vision=recompute_vision),
        )
        passes: list[int] = []
        tower = policy.chunks[0].vision
        tower.register_forward_hook(lambda m, args, out, to=passes: to.append(len(args[0])))
        step = make_step(policy, tiny_processor, samples, max_tokens=64)
        split = [b.rows.sample_R.div(4, rounding_mode="floor") for b in step.micro_batches]
        assert sum(bool((groups == 0).any()) for groups in split) > 1, "a group in one micro-batch"
        policy.train_step(step, loss, WHOLE_SOFTMAX)
        repeats = 2 if is_repeated and not freeze_vision else 1
        assert sum(passes) == repeats * num_patches
        old = policy.logprobs(step, WHOLE_SOFTMAX)
        policy.train_step(batching.with_logprobs(step, old), loss, WHOLE_SOFTMAX)
        assert sum(passes) == (num_patches if freeze_vision else num_patches * (2 * repeats + 1))


def test_images_in_several_chunks_have_the_same_features_and_gradients(
    tiny_model_dir: Path,
    tiny_processor: PromptProcessor,
    samples: Samples,
    monkeypatch: pytest.MonkeyPatch,
):
    policy = make_policy(tiny_model_dir)
    tower, images = policy.chunks[0].vision, make_step(policy, tiny_processor, samples).images

    def run(max_patches: int, recomputes: bool) -> tuple[Tensor, list[Tensor]]:
        monkeypatch.setattr("megatron_mmr1.backend.vision.CHUNK_PATCHES", max_patches)
        step = StepFeatures(tower, images, trains=True, recomputes=recomputes)
        assert step.features_MD is not None
        found = []
        hooks = [
            p.register_hook(lambda g, to=found: to.append(g.clone())) for p in tower.parameters()
        ]
        step.features_MD.square().sum().backward()
        step.backward()
        for hook in hooks:
            hook.remove()
        return step.features_MD.detach(), found

    features, expected = run(CHUNK_PATCHES, False)
    again, repeated = run(CHUNK_PATCHES, True)
    assert torch.equal(again, features) and all(map(torch.equal, repeated, expected))
    chunked, _ = run(1, True)
    torch.testing.assert_close(chunked, features, rtol=1e-5, atol=1e-6)


def without_verdict(group: ScoredGroup, index: int) -> ScoredGroup:
    """The group as it is when the verifier could not judge response `index`."""
    scores = list(group.scores)
    verdict = Verdict("could_not_judge", "deadline")
    scores[index] = replace(scores[index], verdict=verdict, reward=float("nan"))
    return replace(group, scores=tuple(scores))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_a_response_that_could_not_be_judged_counts_as_absent(
    tiny_model_dir: Path, tiny_processor: PromptProcessor, aggregation: str
):
    prompts = mixed_prompts(tiny_processor)
    groups = scored_groups(prompts, tiny_processor, group_size=4, seed=1)
    groups = [without_verdict(groups[0], 1), *groups[1:3], without_verdict(groups[3], 3)]
    samples = batching.samples_of_groups(groups)
    judged = [s for s in samples if not math.isnan(s.reward)]
    assert len(judged) == len(samples) - 2
    loss = losses.grpo(AlgorithmConfig(aggregation=aggregation))
    results = []
    for present in (samples, judged):
        policy = make_policy(tiny_model_dir)
        step = make_step(policy, tiny_processor, present, 1024, aggregation)
        metrics = policy.train_step(step, loss, WHOLE_SOFTMAX)
        results.append((metrics["loss"], metrics["grad_norm"], gradients(policy)))
    (loss_all, norm_all, with_them), (loss_judged, norm_judged, without) = results
    # Centred advantages make the loss nearly zero: the bound is in units of its terms, of order 1.
    assert loss_all == pytest.approx(loss_judged, rel=SUM_TOLERANCE, abs=SUM_TOLERANCE)
    assert norm_all == pytest.approx(norm_judged, rel=GRADIENT_TOLERANCE)
    for name in without:
        assert relative_difference(with_them[name], without[name]) <= GRADIENT_TOLERANCE


def test_image_tokens_that_do_not_match_their_grid_are_refused(
    tiny_model_dir: Path, tiny_processor: PromptProcessor, samples: Samples
):
    prompt = samples[0].prompt
    assert prompt.image_grid_thw is not None
    wrong = replace(prompt, image_grid_thw=prompt.image_grid_thw * torch.tensor([1, 1, 2]))
    policy = make_policy(tiny_model_dir)
    with pytest.raises(ValueError, match=r"'square' has 4 image tokens.*image_grid_thw.* make 8"):
        make_step(policy, tiny_processor, [replace(samples[0], prompt=wrong)])


# Weights


@pytest.mark.parametrize("folder_name", ["tiny_model_dir", "tied_model_dir"])
def test_named_tensors_are_the_model_file_bit_for_bit(
    request: pytest.FixtureRequest, folder_name: str
):
    folder = request.getfixturevalue(folder_name)
    in_file = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in in_file) == (folder_name == "tiny_model_dir")
    named = list(make_policy(folder).named_tensors())
    assert sorted(name for name, _ in named) == sorted(in_file)  # each once
    for name, tensor in named:
        assert tensor.dtype == in_file[name].dtype
        assert torch.equal(tensor, in_file[name]), name


def test_reference_logprobs_stay_those_of_the_start(
    tiny_model_dir: Path, tiny_processor: PromptProcessor, samples: Samples
):
    policy = make_policy(tiny_model_dir, lr=1e-2, keep_reference=True)
    step = make_step(policy, tiny_processor, samples)
    start = torch.cat(policy.logprobs(step, WHOLE_SOFTMAX))
    policy.train_step(step, losses.supervised(), WHOLE_SOFTMAX)
    trained = weights(policy)
    reference = torch.cat(policy.reference_logprobs(step, WHOLE_SOFTMAX))
    now = torch.cat(policy.logprobs(step, WHOLE_SOFTMAX))
    assert torch.equal(reference, start)
    assert (now - start).abs().max() > 0.01
    assert all(torch.equal(tensor, trained[name]) for name, tensor in policy.named_tensors())


def test_a_frozen_vision_tower_does_not_move(
    tiny_model_dir: Path, tiny_processor: PromptProcessor, samples: Samples
):
    policy = make_policy(tiny_model_dir, lr=1e-2, freeze_vision=True)
    before = weights(policy)
    policy.train_step(
        make_step(policy, tiny_processor, samples), losses.supervised(), WHOLE_SOFTMAX
    )
    for name, tensor in policy.named_tensors():
        assert torch.equal(tensor, before[name]) == name.startswith("visual."), name


def copy_with_tensors(source: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(source, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_model_folder_that_lacks_a_tensor_is_refused_by_name(
    tiny_model_dir: Path, tmp_path: Path
):
    name = "model.layers.2.mlp.up_proj.weight"
    tensors = load_file(tiny_model_dir / "model.safetensors")
    del tensors[name]
    folder = copy_with_tensors(tiny_model_dir, tmp_path / "model", tensors)
    with pytest.raises(ValueError, match=name):
        make_policy(folder)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "visual.merger.mlp.0.bias", "model.layers.1.mlp.down_proj.weight"]
)
def test_a_tensor_of_another_shape_is_refused_by_name(
    tiny_model_dir: Path, tmp_path: Path, name: str
):
    tensors = load_file(tiny_model_dir / "model.safetensors")
    tensors[name] = tensors[name][:1].clone()  # of a shape that would broadcast
    folder = copy_with_tensors(tiny_model_dir, tmp_path / "model", tensors)
    with pytest.raises(ValueError, match=name):
        make_policy(folder)


def test_a_query_projection_of_another_shape_is_refused_by_name(
    tiny_model_dir: Path, tmp_path: Path
):
    """One of three tensors that are merged into one: the merge itself may not be possible."""
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(tiny_model_dir / "model.safetensors")
    tensors[name] = tensors[name][:, :-1].contiguous()
    folder = copy_with_tensors(tiny_model_dir, tmp_path / "model", tensors)
    with pytest.raises(ValueError, match=name):
        make_policy(folder)


def test_an_unknown_model_type_is_refused_by_name(tiny_model_dir: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"model_type='gpt2' has no conversion table"):
        make_policy(folder)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_tensor_parallel_parts_come_together_again(tp_size: int):
    """Every layout; a vocabulary that doesn't divide; more parts than key/value heads."""
    torch.manual_seed(0)
    shape = AttentionShape(num_heads=8, num_kv_heads=2, head_dim=4)
    whole = {
        "replicated": torch.randn(5, 3),
        "row": torch.randn(5, 8),
        "vocab": torch.randn(10, 3),
        "qkv": torch.randn((8 + 2 * 2) * 4, 3),
        "gated": torch.randn(16, 3),
    }
    for kind, tensor in whole.items():
        parts = [shard(kind, tensor, rank, tp_size) for rank in range(tp_size)]
        assert len({part.shape for part in parts}) == 1, kind
        assert torch.equal(gather(kind, parts, vocab_size=10), tensor), kind
        assert torch.equal(merge(kind, split(kind, tensor, shape), shape), tensor), kind
        if tp_size > 1 and kind != "replicated":
            swapped = gather(kind, parts[::-1], vocab_size=10)
            assert not torch.equal(swapped, tensor), "the control: the order of ranks matters"


def test_names_of_both_kinds_of_layers_are_converted():
    """Transformer Engine's layers fuse a norm with the linear layer that follows."""
    rules, layer = FAMILIES["qwen2_5_vl"].rules, "language.decoder.layers.3."
    for ours, name in [
        ("input_layernorm.weight", "input_layernorm"),
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm"),
        ("pre_mlp_layernorm.weight", "post_attention_layernorm"),
        ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm"),
    ]:
        rule, hf_names = required_hf_names(rules, layer + ours)
        assert (rule.kind, hf_names) == ("replicated", (f"model.layers.3.{name}.weight",))
    with pytest.raises(ValueError, match="no conversion rule for the Megatron parameter"):
        required_hf_names(rules, layer + "mlp.router.weight")


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is installed here")
def test_a_gpu_without_transformer_engine_is_refused(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make_policy(tiny_model_dir).chunks[0].config
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    with pytest.raises(ValueError, match=r"transformer_engine .* requirements-cuda\.txt"):
        layer_spec(config)


# The device seam


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the seam does nothing")
def test_the_seam_points_at_the_cpu_and_leaves_nothing_behind():
    originals = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize")}
    state = torch.get_rng_state()
    with device.seam():
        with device.seam():
            assert torch.cuda.current_device() == torch.device("cpu")
        assert torch.cuda.current_device() == torch.device("cpu"), "the inner one undid the outer"
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.device("cuda", 0)).device.type == "cpu"
        assert torch.zeros(2).cuda().device.type == "cpu"
        assert torch.zeros(2).to("cuda").device.type == "cpu"
        assert torch.equal(torch.cuda.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="stop"), device.seam():
        raise RuntimeError("stop")
    assert {name: getattr(torch.cuda, name) for name in originals} == originals
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


def test_in_bfloat16_all_weights_are_and_rotary_frequencies_are_not(tiny_model_dir: Path):
    """Frequencies rounded to 8 bits turn an image's hundredth row by up to half a radian.

    A weight left in float32 (a norm's) makes Megatron save optimizer states under other names.
    """
    module = make_policy(tiny_model_dir, dtype="bfloat16").chunks[0]
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert {p.main_grad.dtype for p in module.parameters()} == {torch.float32}
    frequencies = [b for name, b in module.named_buffers() if "inv_freq" in name]
    assert frequencies and all(b.dtype == torch.float32 for b in frequencies)

"""The in-process vLLM engine against the trainer: one model, one softmax, one set of pixels.

Tolerances: both compute in float32 with other kernels. On the tiny model log-probs differ by 2e-6
at most; the bounds (1e-4 on average, 1e-3 at worst) leave room for other CPUs and stay far below
any of the negative controls (0.01).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import make_policy, make_step, mixed_prompts, png, sample_logprobs, samples_of
from torch import Tensor

from megatron_mmr1.backend import losses
from megatron_mmr1.backend.layout import LocalView
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import RolloutConfig
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.kernels.head import OutputHead
from megatron_mmr1.rollout.engine import RolloutEngine, Sampling
from megatron_mmr1.rollout.vllm_engine import VllmEngine
from megatron_mmr1.types import Prompt, RolloutGroup
from megatron_mmr1.weight_sync import WeightSync

pytestmark = pytest.mark.vllm

SAMPLING = Sampling(group_size=4, temperature=1.0, max_response_tokens=16, seed=0, step=1)
KEPT: list[Any] = []  # an engine that is dropped takes the process group of all along
MEAN_TOLERANCE, WORST_TOLERANCE = 1e-4, 1e-3


@pytest.fixture
def policy(tiny_model_dir: Any, process_group: None) -> MegatronPolicy:
    return make_policy(tiny_model_dir, lr=1e-2)


@pytest.fixture
def engine(vllm_engine: Any, policy: MegatronPolicy) -> RolloutEngine:
    """The session's engine with the weights of this test's policy, as version 0."""
    WeightSync(policy, vllm_engine).push(version=0)
    return vllm_engine


@pytest.fixture(scope="module")
def prompts(tiny_processor: PromptProcessor) -> list[Prompt]:
    """Images of several sizes, two images in one prompt, and text only."""
    return mixed_prompts(tiny_processor)


def generate(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling = SAMPLING
) -> list[RolloutGroup]:
    """The groups in the order of the prompts, which they get back with their pixels."""
    groups = {group.prompt.prompt_id: group for group in engine.generate(prompts, sampling)}
    assert len(groups) == len(prompts)
    assert all(g.prompt.pixel_values is None and not g.prompt.images for g in groups.values())
    return [replace(groups[prompt.prompt_id], prompt=prompt) for prompt in prompts]


def differences(
    policy: MegatronPolicy,
    processor: PromptProcessor,
    groups: Sequence[RolloutGroup],
    temperature: float = 1.0,
    banned_token_ids: tuple[int, ...] | None = None,
) -> Tensor:
    """|trainer - engine| of every response token."""
    samples = samples_of(groups)
    if banned_token_ids is None:
        banned_token_ids = processor.banned_token_ids
    step = make_step(policy, processor, samples)
    rows = sample_logprobs(policy, step, SoftmaxRule(temperature, banned_token_ids))
    return torch.cat([(a - s.rollout_logprobs).abs() for a, s in zip(rows, samples, strict=True)])


def assert_equal(difference: Tensor) -> None:
    assert difference.mean() <= MEAN_TOLERANCE
    assert difference.max() <= WORST_TOLERANCE


def tokens(groups: Sequence[RolloutGroup]) -> list[list[tuple[int, ...]]]:
    return [[rollout.token_ids for rollout in group.rollouts] for group in groups]


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_engine_and_trainer_give_the_same_logprobs(
    engine: RolloutEngine,
    policy: MegatronPolicy,
    tiny_processor: PromptProcessor,
    prompts: list[Prompt],
    temperature: float,
):
    groups = generate(engine, prompts, replace(SAMPLING, temperature=temperature))
    assert_equal(differences(policy, tiny_processor, groups, temperature))
    # Negative controls: a trainer with another temperature, and one that forgets the bans.
    assert differences(policy, tiny_processor, groups, 1.6 - temperature).mean() > 0.01
    assert differences(policy, tiny_processor, groups, temperature, ()).mean() > 0.01


def test_a_cache_in_fp8_moves_logprobs_a_little_and_says_by_how_much(
    policy: MegatronPolicy,
    tiny_model_dir: Any,
    tiny_processor: PromptProcessor,
    prompts: list[Prompt],
):
    """Keys and values are rounded to E4M3, a sixteenth at most; see precision.kv_cache."""
    config = RolloutConfig(max_response_tokens=24, max_images_per_prompt=2, kv_cache_bytes=64 << 20)
    banned = tiny_processor.banned_token_ids
    engine = VllmEngine(str(tiny_model_dir), "float32", config, banned, 64, kv_cache="fp8")
    KEPT.append(engine)
    WeightSync(policy, engine).push(version=0)
    found = differences(policy, tiny_processor, generate(engine, prompts))
    assert MEAN_TOLERANCE < found.mean() < 0.1


def test_the_engine_takes_the_model_runner_that_takes_our_logits_processor(
    engine: Any, monkeypatch: pytest.MonkeyPatch
):
    """Also where vLLM finds Triton, as on a GPU. Negative control: left alone it takes the other.

    On a CPU the config has features that keep it from that; they are passed over here.
    """
    config = engine._llm.llm_engine.vllm_config
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setattr(type(config), "_get_v2_model_runner_unsupported_features", lambda _: [])
    assert not config.use_v2_model_runner
    monkeypatch.setattr("vllm.envs.VLLM_USE_V2_MODEL_RUNNER", None)
    assert config.use_v2_model_runner


def test_prompts_wait_until_there_is_room_for_their_pixels(
    engine: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    """Never more pixels in the engine than the budget and one prompt, and every prompt is served.
    Negative control: without a budget, all of them at once.
    """
    largest = max(prompt.pixel_bytes for prompt in prompts)

    def most_at_once(budget: int) -> int:
        monkeypatch.setattr(engine, "_pixel_bytes", budget)
        inside: dict[str, int] = {}
        most = 0

        def upcoming():
            nonlocal most
            for number, prompt in enumerate(prompts * 2):
                inside[str(number)] = prompt.pixel_bytes
                most = max(most, sum(inside.values()))
                yield replace(prompt, prompt_id=str(number))

        done = [inside.pop(g.prompt.prompt_id) for g in engine.generate(upcoming(), SAMPLING)]
        assert len(done) == 2 * len(prompts) and not inside
        return most

    assert most_at_once(largest) <= 2 * largest
    assert most_at_once(1 << 40) == 2 * sum(prompt.pixel_bytes for prompt in prompts)


def test_banned_tokens_are_never_sampled(
    engine: RolloutEngine,
    policy: MegatronPolicy,
    tiny_processor: PromptProcessor,
    prompts: list[Prompt],
):
    groups = generate(engine, prompts, replace(SAMPLING, group_size=32))
    sampled = [token for group in tokens(groups) for response in group for token in response]
    assert not set(sampled) & set(tiny_processor.banned_token_ids)
    # The ban matters: leaving it out gives all other tokens less, by the banned ones' mass in nats.
    mass = differences(policy, tiny_processor, groups, banned_token_ids=())
    assert mass.mean() > 0.05 and len(sampled) > 500


def test_samples_depend_on_seed_step_and_prompt_alone(engine: RolloutEngine, prompts: list[Prompt]):
    """Not on the order, the company, what ran before, or the requests' numbers."""
    together = tokens(generate(engine, prompts))
    assert tokens(generate(engine, prompts)) == together
    assert tokens(generate(engine, prompts[::-1]))[::-1] == together
    assert [tokens(generate(engine, [prompt]))[0] for prompt in prompts] == together
    other_step = tokens(generate(engine, prompts, replace(SAMPLING, step=2)))
    other_seed = tokens(generate(engine, prompts, replace(SAMPLING, seed=1)))
    for here, there, elsewhere in zip(together, other_step, other_seed, strict=True):
        assert here != there and here != elsewhere and there != elsewhere
        assert len(set(here)) > 1, "samples of a group have seeds of their own"


def test_more_prompts_than_a_scheduling_step_holds_are_all_sampled(
    engine: RolloutEngine, prompts: list[Prompt]
):
    """Seeded requests: cutting one's prompt in two crashes vLLM on a CPU, so none may be cut.

    A step takes 8,192 prompt tokens and 256 sequences. Of 63 tokens the first 32 are shared by a
    group (the prefix cache's block), so 256 sequences of 32 groups have 8,960 to compute.
    """
    text = next(prompt for prompt in prompts if prompt.pixel_values is None)
    length = 63
    token_ids = text.token_ids.repeat(length)[:length]
    positions = torch.arange(length).expand(3, length)
    many = [
        replace(
            text,
            prompt_id=f"long-{copy}",
            token_ids=torch.cat([torch.tensor([8 + copy]), token_ids[1:]]),
            position_ids=positions,
        )
        for copy in range(40)
    ]
    sampling = replace(SAMPLING, group_size=8, max_response_tokens=2)
    assert all(len(group.rollouts) == 8 for group in generate(engine, many, sampling))


def test_a_greedy_response_is_the_most_likely_token_each_time(
    engine: RolloutEngine,
    policy: MegatronPolicy,
    tiny_processor: PromptProcessor,
    prompts: list[Prompt],
):
    greedy = replace(SAMPLING, group_size=1, temperature=0.0)
    groups = generate(engine, prompts, greedy)
    assert tokens(groups) == tokens(generate(engine, prompts, replace(greedy, seed=5, step=9)))
    likeliest: list[Tensor] = []

    def look(hidden_RD: Tensor, head: OutputHead, view: LocalView) -> losses.LossResult:
        allowed_RV = hidden_RD.detach() @ head.local_weight.detach().t()
        allowed_RV[:, list(tiny_processor.banned_token_ids)] = -torch.inf
        likeliest.append(allowed_RV.argmax(-1) == view.rows.target_ids_R)
        return losses.LossResult(0 * hidden_RD.sum())

    step = make_step(policy, tiny_processor, samples_of(groups))
    policy.train_step(step, look, SoftmaxRule(1.0, ()))
    assert len(torch.cat(likeliest)) == sum(len(r.token_ids) for g in groups for r in g.rollouts)
    assert torch.cat(likeliest).all()


def test_a_pushed_update_reaches_the_engine(
    engine: RolloutEngine,
    policy: MegatronPolicy,
    tiny_model_dir: Any,
    tiny_processor: PromptProcessor,
    prompts: list[Prompt],
):
    sync = WeightSync(policy, engine)
    before = generate(engine, prompts)
    step = make_step(policy, tiny_processor, samples_of(before))
    rule = SoftmaxRule(1.0, tiny_processor.banned_token_ids)
    policy.train_step(step, losses.supervised(), rule)
    sync.push(version=1)
    after = generate(engine, prompts)
    assert {group.weight_version for group in before} == {0}
    assert {group.weight_version for group in after} == {1}
    assert_equal(differences(policy, tiny_processor, after))
    assert differences(make_policy(tiny_model_dir), tiny_processor, after).mean() > 0.01
    assert differences(policy, tiny_processor, before).mean() > 0.01


def test_a_lost_update_is_refused(
    engine: RolloutEngine, policy: MegatronPolicy, prompts: list[Prompt]
):
    sync = WeightSync(policy, engine)
    (stale,) = generate(engine, prompts[:1])
    sync.push(version=1)
    with pytest.raises(RuntimeError, match=r"weight version 0, the policy has 1: .* was lost"):
        sync.check(stale.weight_version)
    engine.update_weights(policy.named_tensors(), 2)  # by somebody else
    (group,) = generate(engine, prompts[:1])
    with pytest.raises(RuntimeError, match="weight version 2, the policy has 1"):
        sync.check(group.weight_version)


def test_finish_reasons_are_told_apart(
    engine: RolloutEngine, tiny_processor: PromptProcessor, prompts: list[Prompt]
):
    limit = 24
    long = replace(SAMPLING, group_size=16, max_response_tokens=limit)
    rollouts = [r for group in generate(engine, prompts, long) for r in group.rollouts]
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    end = tiny_processor.end_of_turn_id
    for rollout in rollouts:
        assert end not in rollout.token_ids[:-1]
        if rollout.finish_reason == "stop":
            assert rollout.token_ids[-1] == end
        else:
            assert len(rollout.token_ids) == limit and rollout.token_ids[-1] != end
    short = generate(engine, prompts, replace(SAMPLING, max_response_tokens=1))
    for rollout in (r for group in short for r in group.rollouts):
        assert len(rollout.token_ids) == 1
        assert (rollout.finish_reason == "stop") == (rollout.token_ids[-1] == end)


def test_the_engine_sees_the_records_own_pixels(
    engine: RolloutEngine,
    policy: MegatronPolicy,
    tiny_processor: PromptProcessor,
    prompts: list[Prompt],
):
    """Not a file decoded again, nor pixels normalised twice, nor a cached image of that name."""
    original = prompts[0]
    assert original.pixel_values is not None
    generate(engine, [original])  # so that a cache by name would have something to return
    changed = replace(original, pixel_values=-0.5 * original.pixel_values)
    groups = generate(engine, [changed])
    assert_equal(differences(policy, tiny_processor, groups))
    as_if_original = [replace(group, prompt=original) for group in groups]
    assert differences(policy, tiny_processor, as_if_original).mean() > 0.01


def test_equal_pixels_in_another_shape_are_another_image(
    engine: RolloutEngine, policy: MegatronPolicy, tiny_processor: PromptProcessor
):
    """The same tiles laid out 2 x 4 and 4 x 2 hold the same numbers, but not at the same places."""
    question = "<image>Read the digits."
    lying, standing = (
        tiny_processor.prompt(name, question, [png(*size)])
        for name, size in (("lying", (112, 56)), ("standing", (56, 112)))
    )
    standing = replace(standing, pixel_values=lying.pixel_values)
    for prompt in (lying, standing):
        assert_equal(differences(policy, tiny_processor, generate(engine, [prompt])))

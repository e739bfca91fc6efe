"""Policy and engine take turns: what goes away comes back, and nobody uses what is away.

A CPU goes through the same states as a GPU; only vLLM's sleep gives nothing back there.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_policy, make_step, mixed_prompts, samples_of
from torch import Tensor

from megatron_mmr1.backend import losses
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import RolloutConfig
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.observability.timers import PhaseTimers
from megatron_mmr1.rollout.engine import Sampling
from megatron_mmr1.trainers.turns import Turns
from megatron_mmr1.weight_sync import WeightSync

pytestmark = pytest.mark.usefixtures("process_group")

WHOLE_SOFTMAX = SoftmaxRule(temperature=1.0, banned_token_ids=())


def learn(policy: MegatronPolicy, processor: Any, samples: Any) -> dict[str, float]:
    step = make_step(policy, processor, samples)
    return policy.train_step(step, losses.supervised(), WHOLE_SOFTMAX)


def weights_of(policy: MegatronPolicy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_tensors()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_the_same_bit_for_bit_when_states_go_away_in_between(
    tiny_model_dir: Path, tiny_processor: Any, samples: Any, dtype: str
):
    staying, leaving = (make_policy(tiny_model_dir, dtype=dtype) for _ in range(2))
    parameters = list(leaving.chunks[0].parameters())
    num_bytes = sum(p.numel() for p in parameters) * {"float32": 12, "bfloat16": 16}[dtype]
    for _ in range(3):
        expected = learn(staying, tiny_processor, samples)
        # Gradients and two moments in float32; in bfloat16 float32 weights too.
        assert num_bytes <= leaving.step_aside() <= 1.01 * num_bytes
        leaving.come_back()
        assert learn(leaving, tiny_processor, samples) == expected
    ours, theirs = weights_of(leaving), weights_of(staying)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Negative control: moments that don't come back would be seen.
    leaving.step_aside()
    leaving.come_back()
    for state in leaving.optimizer.optimizer.state.values():  # type: ignore[attr-defined]
        state["exp_avg"].zero_()
    learn(leaving, tiny_processor, samples)
    learn(staying, tiny_processor, samples)
    ours, theirs = weights_of(leaving), weights_of(staying)
    assert not all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_weights_can_be_pushed_while_everything_else_is_away(
    tiny_model_dir: Path, tiny_processor: Any, samples: Any
):
    policy = make_policy(tiny_model_dir)
    learn(policy, tiny_processor, samples)
    here = weights_of(policy)
    policy.step_aside()
    away = weights_of(policy)
    assert all(torch.equal(away[name], here[name]) for name in here)
    with pytest.raises(AssertionError, match="stepped aside"):
        learn(policy, tiny_processor, samples)


@pytest.mark.vllm
def test_the_engine_sleeps_through_training_and_wakes_with_the_new_weights(
    vllm_engine: Any, tiny_model_dir: Path, tiny_processor: Any
):
    """Held against a policy and an engine that stay where they are."""
    prompts = mixed_prompts(tiny_processor)
    sampling = Sampling(group_size=4, temperature=1.0, max_response_tokens=16, seed=0, step=1)

    def generate() -> dict[str, Any]:
        groups = {g.prompt.prompt_id: g for g in vllm_engine.generate(prompts, sampling)}
        return {prompt_id: g.rollouts for prompt_id, g in groups.items()}

    def two_steps(takes_turns: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
        policy, timers = make_policy(tiny_model_dir, lr=1e-2), PhaseTimers()
        if takes_turns:
            policy.step_aside()
        turns = Turns(policy, vllm_engine, takes_turns, timers)
        sync = WeightSync(policy, vllm_engine)
        sync.push(version=0)
        generated = []
        for step in (1, 2):
            generated.append(generate())
            groups = [
                replace(g, prompt=p) for p in prompts for g in vllm_engine.generate([p], sampling)
            ]
            with turns.training():
                assert vllm_engine.is_asleep == takes_turns
                learn(policy, tiny_processor, samples_of(groups))
            if takes_turns:
                with pytest.raises(AssertionError, match="asleep"):
                    generate()
                with pytest.raises(AssertionError, match="stepped aside"):
                    learn(policy, tiny_processor, samples_of(groups))
            sync.push(version=step)
            assert not vllm_engine.is_asleep
        with turns.training():  # a checkpoint: the same weights come again
            pass
        sync.wake()
        generated.append(generate())
        sync.wake()  # awake: nothing to do
        assert sync.weight_version == vllm_engine.weight_version == 2
        return generated, timers.pop()

    staying, no_time = two_steps(takes_turns=False)
    turning, time = two_steps(takes_turns=True)
    assert turning == staying and staying[0] != staying[1]
    assert no_time == {} and time["time/turns_s"] > 0


def test_the_engine_gets_nine_tenths_of_what_is_free_but_for_a_gib():
    from megatron_mmr1.rollout.vllm_engine import memory_share

    gib = 1 << 30
    assert memory_share(60 * gib, 80 * gib) == pytest.approx(53 / 80)
    with pytest.raises(ValueError, match=r"leaves 0\.5 GB of a GPU's 85\.9 free: no room"):
        memory_share(gib // 2, 80 * gib)


@pytest.mark.vllm
@pytest.mark.parametrize("sleeps", [True, False])
def test_a_cache_of_what_is_free_is_refused_without_a_gpu(
    tiny_model_dir: Path, tiny_processor: Any, sleeps: bool
):
    from megatron_mmr1.rollout.vllm_engine import VllmEngine

    config = RolloutConfig(max_response_tokens=24, kv_cache_bytes=0)
    with pytest.raises(ValueError, match=r"rollout\.kv_cache_bytes=0 .* here is none"):
        banned = tiny_processor.banned_token_ids
        VllmEngine(str(tiny_model_dir), "float32", config, banned, 64, sleeps=sleeps)

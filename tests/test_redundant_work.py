"""What a GRPO step computes, counted: forward passes a token, images a group. Nothing twice."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import make_policy, mixed_prompts, scored_groups

from megatron_mmr1.backend import batching
from megatron_mmr1.backend.plan import Packing
from megatron_mmr1.config.schema import (
    AlgorithmConfig,
    GrpoConfig,
    ParallelConfig,
    RolloutConfig,
)
from megatron_mmr1.convert import read_config
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.observability.timers import PARTS_OF_TRAIN
from megatron_mmr1.throughput.flops import num_logprob_passes, step_flops
from megatron_mmr1.trainers import grpo
from megatron_mmr1.types import Prompt, ScoredGroup

pytestmark = pytest.mark.usefixtures("process_group")


class Prompts:
    """The data set that the trainer reads pixels from."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]

    def index_of(self, prompt_id: str) -> int:
        return [prompt.prompt_id for prompt in self._prompts].index(prompt_id)


class Counted:
    """One batch of rollouts, learned from, with everything that went through the model counted."""

    def __init__(
        self,
        folder: Path,
        processor: PromptProcessor,
        algorithm: AlgorithmConfig,
        *,
        freeze_vision: bool = False,
        recompute: str = "none",
    ) -> None:
        self.forward = self.backward = self.patches = 0
        self.policy = make_policy(
            folder,
            freeze_vision=freeze_vision,
            keep_reference=algorithm.kl_coefficient > 0,
            steps_per_batch=algorithm.optimizer_steps_per_batch,
            layout=ParallelConfig(recompute=recompute),
        )
        chunk = self.policy.chunks[0]
        chunk.language.decoder.layers[-1].register_forward_hook(self._on_layer)
        chunk.vision.register_forward_hook(self._on_tower)
        prompts = mixed_prompts(processor)
        self.groups: list[ScoredGroup] = scored_groups(prompts, processor, group_size=4)
        images = batching.ImageTokens.of(processor)
        parts: Any = SimpleNamespace(
            policy=self.policy,
            builder=batching.StepBuilder(Packing(128), self.policy.cost, images),
            rule=SoftmaxRule(1.0, processor.banned_token_ids),
            train_set=Prompts(prompts),
        )
        rollout = RolloutConfig(max_logprob_diff=1e9)  # the engine's log-probs are made up
        config = GrpoConfig(algorithm=algorithm, rollout=rollout)
        self.metrics = grpo._learn(self.groups, config, parts)
        self.num_patches = sum(len(p.pixel_values) for p in prompts if p.pixel_values is not None)
        samples = batching.samples_of_groups(self.groups)
        self.num_tokens = sum(batching.size_of(sample).num_tokens for sample in samples)

    def _on_layer(self, layer: Any, args: Any, output: Any) -> None:
        hidden = output[0]
        self.forward += len(hidden)
        if hidden.requires_grad:
            hidden.register_hook(self._on_gradient)

    def _on_gradient(self, gradient: Any) -> None:
        self.backward += len(gradient)

    def _on_tower(self, tower: Any, args: Any, output: Any) -> None:
        self.patches += len(args[0])


KL, STEPS = {"kl_coefficient": 0.1}, {"optimizer_steps_per_batch": 2}


@pytest.mark.parametrize(
    ("options", "num_forward"), [({}, 1), (KL, 2), (STEPS, 2), (KL | STEPS, 3)]
)
@pytest.mark.parametrize("freeze_vision", [False, True])
def test_a_token_goes_through_the_decoder_once_and_once_more_for_each_frozen_log_prob(
    tiny_model_dir: Path,
    tiny_processor: PromptProcessor,
    options: dict[str, Any],
    num_forward: int,
    freeze_vision: bool,
):
    """Every position: micro-batches of one process have no padding here. And an image goes through
    the tower once a group and pass, or, when the tower is frozen, once a step.
    """
    algorithm = AlgorithmConfig(**options)
    counted = Counted(tiny_model_dir, tiny_processor, algorithm, freeze_vision=freeze_vision)
    assert counted.forward == num_forward * counted.num_tokens
    assert counted.backward == counted.num_tokens
    assert counted.patches == (1 if freeze_vision else num_forward) * counted.num_patches
    assert num_logprob_passes(algorithm) == num_forward - 1


def test_full_recomputation_is_counted_as_a_second_forward_pass(
    tiny_model_dir: Path, tiny_processor: PromptProcessor
):
    """Negative control: the count sees a pass that is there. Utilisation leaves it out."""
    counted = Counted(tiny_model_dir, tiny_processor, AlgorithmConfig(), recompute="full")
    assert counted.forward == 2 * counted.num_tokens


@pytest.mark.parametrize("freeze_vision", [False, True])
def test_flops_of_a_step_are_those_of_its_passes(
    tiny_model_dir: Path, tiny_processor: PromptProcessor, freeze_vision: bool
):
    algorithm = AlgorithmConfig(**KL, **STEPS)
    counted = Counted(tiny_model_dir, tiny_processor, algorithm, freeze_vision=freeze_vision)
    sizes = [batching.size_of(s) for s in batching.samples_of_groups(counted.groups)]
    found = step_flops(sizes, read_config(tiny_model_dir), algorithm, not freeze_vision)
    train, logprobs = found["train"], found["logprobs"]
    for part in ("language", "attention", "head"):
        # Two forward passes, where training is as much as three.
        assert getattr(logprobs, part) == pytest.approx(getattr(train, part) * 2 / 3)
    assert logprobs.vision == pytest.approx(0 if freeze_vision else train.vision * 2 / 3)


def test_every_part_of_the_training_phase_is_timed_and_they_fit_into_it(
    tiny_model_dir: Path, tiny_processor: PromptProcessor
):
    counted = Counted(tiny_model_dir, tiny_processor, AlgorithmConfig(**KL))
    times = {k: v for k, v in counted.metrics.items() if k.startswith("time/")}
    assert set(times) == {f"time/{name}_s" for name in PARTS_OF_TRAIN}
    assert all(seconds > 0 for seconds in times.values())
    assert counted.policy.clock.pop() == {}, "popped with the step's metrics"
    without = Counted(tiny_model_dir, tiny_processor, AlgorithmConfig()).metrics
    assert "time/logprobs_s" not in without

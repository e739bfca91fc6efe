"""`python engine_cases.py NAME FOLDER`: a tiny model, its engine and its policy in one process."""

import sys
from dataclasses import replace
from pathlib import Path

from megatron_mmr1 import device

device.prepare_process()

import torch
from helpers import samples_of

from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.plan import Packing
from megatron_mmr1.config.schema import ModelConfig, ParallelConfig, RolloutConfig
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.parity import ours
from megatron_mmr1.parity.cases import make_samples
from megatron_mmr1.parity.models import build_tiny
from megatron_mmr1.rollout.engine import Sampling
from megatron_mmr1.rollout.vllm_engine import VllmEngine

MEAN_BOUND, LARGEST_BOUND = 1e-5, 1e-4


def main(name: str, folder: Path) -> None:
    """The engine starts on other weights and is given the policy's."""
    build_tiny(name, folder / "model")
    build_tiny(name, folder / "other", seed=1)
    parallel.initialize(ParallelConfig(), seed=0)
    policy = ours.build_policy(ModelConfig(str(folder / "model")), ParallelConfig())
    processor = PromptProcessor(folder / "model")
    kind = "mixed" if processor.image_token_id >= 0 else "text"
    prompts = list({s.prompt.prompt_id: s.prompt for s in make_samples(kind, processor)}.values())
    config = RolloutConfig(max_response_tokens=16, max_images_per_prompt=3, kv_cache_bytes=64 << 20)
    other = str(folder / "other")
    engine = VllmEngine(other, "float32", config, processor.banned_token_ids, 512)
    sampling = Sampling(group_size=4, temperature=1.0, max_response_tokens=16, seed=0, step=0)

    def largest_and_mean() -> tuple[float, float]:
        with_pixels = {prompt.key: prompt for prompt in prompts}
        groups = engine.generate(prompts, sampling)
        samples = samples_of([replace(g, prompt=with_pixels[g.prompt.key]) for g in groups])
        step = ours.build_step(policy, samples, Packing.at(ParallelConfig(), 1024), processor)
        rule = SoftmaxRule(1.0, processor.banned_token_ids)
        found = ours.of_samples(step, policy.logprobs(step, rule))
        expected = [sample.rollout_logprobs for sample in samples]
        differences = torch.cat([found[i] - x for i, x in enumerate(expected)]).abs()
        return float(differences.max()), float(differences.mean())

    stale = largest_and_mean()
    assert stale[1] > 0.01, f"negative control: other weights, and only {stale} apart"
    if name == "qwen3_moe":
        try:
            engine.update_weights(policy.named_tensors(), 1)
        except ValueError as error:
            assert "experts" in str(error)
            return
        raise AssertionError("the engine took experts' weights: compare them, as the others'")
    engine.update_weights(policy.named_tensors(), 1)
    largest, mean = largest_and_mean()
    print(f"{name}: largest {largest:.1e}, mean {mean:.1e}")
    assert largest <= LARGEST_BOUND and mean <= MEAN_BOUND, (largest, mean)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

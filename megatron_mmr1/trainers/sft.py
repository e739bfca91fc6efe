"""The supervised cold start: imitate demonstrations, then write a Hugging Face folder."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_mmr1.backend import batching, losses, parallel
from megatron_mmr1.backend.plan import Packing, SampleSize
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import SftConfig
from megatron_mmr1.data.dataset import DemonstrationDataset
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.observability.metrics import MetricsWriter
from megatron_mmr1.observability.progress import SFT_FIELDS, Progress
from megatron_mmr1.sampling.passes import UniformPasses
from megatron_mmr1.trainers.reporting import export_model, report_bad_rows
from megatron_mmr1.trainers.trust import stop_if_not_finite
from megatron_mmr1.types import StepBatch

_WHOLE_SOFTMAX = SoftmaxRule(temperature=1.0, banned_token_ids=())


def train(config: SftConfig, run_dir: Path) -> Path:
    """Run the cold start on this rank's share of every batch;
    returns the Hugging Face folder that it wrote.
    """
    processor = PromptProcessor(config.model.path)
    dataset = DemonstrationDataset(config.data, processor, config.max_tokens_per_microbatch)
    report_bad_rows(run_dir, [dataset])
    policy = MegatronPolicy(config.model, config.parallel, config.optimizer, config.num_steps)
    passes = UniformPasses(len(dataset), config.seed)
    builder = batching.StepBuilder(
        Packing.at(config.parallel, config.max_tokens_per_microbatch, config.model.fp8),
        policy.cost,
        batching.ImageTokens.of(processor),
    )
    loss = losses.supervised()
    writer = MetricsWriter(run_dir) if parallel.is_main() else None
    with Progress(
        config.num_steps, title="cold start", fields=SFT_FIELDS, is_quiet=not parallel.is_main()
    ) as progress:
        for step in range(1, config.num_steps + 1):
            start = time.perf_counter()
            batch, measured = _build(passes.take(config.global_batch_size), dataset, builder)
            metrics = policy.train_step(batch, loss, _WHOLE_SOFTMAX) | measured
            stop_if_not_finite(metrics)
            seconds = time.perf_counter() - start
            num_tokens = metrics.pop("tokens")
            metrics |= {"tokens_per_s": num_tokens / seconds, "time/step_s": seconds}
            progress.update(step, metrics)
            if writer:
                writer.write(step, metrics)
    if writer:
        writer.close()
    return export_model(run_dir, policy, config.model.path)


def _build(
    draw: list[int], dataset: DemonstrationDataset, builder: batching.StepBuilder
) -> tuple[StepBatch, dict[str, float]]:
    """Build a draw's step; the plan needs the rows' sizes, and a rank loads its own rows only."""
    sizes = [
        SampleSize(
            (dataset.prompt_ids[index], 0),
            dataset.sizes[index].num_prompt_tokens,
            dataset.sizes[index].num_response_tokens,
            dataset.sizes[index].patches,
        )
        for index in draw
    ]
    batch, plan = builder.build(sizes, lambda i: batching.sample_of_demonstration(dataset[draw[i]]))
    return batch, plan.metrics() | {"tokens": float(sum(size.num_tokens for size in sizes))}

"""The supervised cold start: imitate demonstrations, then write a Hugging Face folder."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_mmr1.backend import batching, losses, parallel
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import SamplerConfig, SftConfig
from megatron_mmr1.convert.hf_files import write_hf_folder
from megatron_mmr1.data.dataset import DemonstrationDataset
from megatron_mmr1.data.loader import build_loader
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.observability.metrics import MetricsWriter
from megatron_mmr1.observability.progress import SFT_FIELDS, Progress
from megatron_mmr1.sampling import build_sampler
from megatron_mmr1.sampling.base import DataParallelSlice
from megatron_mmr1.trainers.reporting import report_bad_rows

_WHOLE_SOFTMAX = losses.SoftmaxRule(temperature=1.0, banned_token_ids=())


def train(config: SftConfig, run_dir: Path) -> Path:
    """Run the cold start on this rank's share of every batch;
    returns the Hugging Face folder that it wrote.
    """
    processor = PromptProcessor(config.model.path)
    dataset = DemonstrationDataset(config.data, processor)
    report_bad_rows(run_dir, [dataset])
    policy = MegatronPolicy(config.model, config.parallel, config.optimizer, config.num_steps)
    sampler = build_sampler(
        dataset.prompt_ids,
        dataset.categories,
        config.global_batch_size,
        SamplerConfig(kind="uniform"),
        config.seed,
    )
    share = DataParallelSlice(sampler, parallel.dp_rank(), parallel.dp_size())
    loader = iter(build_loader(dataset, share))
    images = batching.ImageTokens(processor.image_token_id, processor.spatial_merge_size)
    loss = losses.supervised(_WHOLE_SOFTMAX)
    writer = MetricsWriter(run_dir) if parallel.is_main() else None
    with Progress(
        config.num_steps, title="cold start", fields=SFT_FIELDS, is_quiet=not parallel.is_main()
    ) as progress:
        for step in range(1, config.num_steps + 1):
            start = time.perf_counter()
            samples = batching.samples_of_demonstrations(next(loader))
            batches = batching.micro_batches(samples, config.micro_batch_size, "token_mean", images)
            metrics = policy.train_step(batches, loss)
            seconds = time.perf_counter() - start
            num_tokens = parallel.sum_over_dp({"tokens": batching.num_tokens(samples)})["tokens"]
            metrics |= {"tokens_per_s": num_tokens / seconds, "time/step_s": seconds}
            progress.update(step, metrics)
            if writer:
                writer.write(step, metrics)
    if writer:
        writer.close()
        write_hf_folder(run_dir / "hf", policy.named_tensors(), config.model.path)
    parallel.barrier()
    return run_dir / "hf"

"""The supervised cold start: imitate demonstrations, then write a Hugging Face folder.

Records are checked when they are drawn, each by one rank; a bad one is recorded and another drawn
in its place, on all ranks alike.
"""

from __future__ import annotations

import math
import time
from itertools import batched
from pathlib import Path

from megatron_mmr1.backend import batching, losses, parallel
from megatron_mmr1.backend.checkpoint import Checkpoints
from megatron_mmr1.backend.plan import Packing
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import SftConfig
from megatron_mmr1.data.dataset import summary
from megatron_mmr1.data.demonstrations import Demonstrations
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.observability.metrics import MetricsWriter, truncate_after
from megatron_mmr1.observability.progress import SFT_FIELDS, Progress
from megatron_mmr1.trainers.demonstration_batches import (
    BadRecords,
    Draws,
    build,
    read_records,
)
from megatron_mmr1.trainers.reporting import export_model, progress_of
from megatron_mmr1.trainers.trust import stop_if_not_finite

_WHOLE_SOFTMAX = SoftmaxRule(temperature=1.0, banned_token_ids=())


def train(config: SftConfig, run_dir: Path) -> Path:
    """Run the cold start; returns the Hugging Face folder that it wrote.

    With `validation`, the weights of the lowest validation loss are written; else the last ones.
    """
    processor = PromptProcessor(config.model.path, config.min_pixels, config.max_pixels)
    limit = config.max_tokens_per_microbatch
    data = Demonstrations(config.data, processor, limit, progress_of(f"indexing {config.data}"))
    num_steps = config.num_steps or math.ceil(
        config.num_epochs * len(data) / config.global_batch_size
    )
    policy = MegatronPolicy(
        config.model, config.parallel, config.optimizer, num_steps, precision=config.precision
    )
    if parallel.is_main():
        print(policy.adam)
    builder = batching.StepBuilder(
        Packing.at(config.parallel, limit, config.precision),
        policy.cost,
        batching.ImageTokens.of(processor),
    )
    bad_records = BadRecords(run_dir)
    draws = Draws(data, config.seed, config.max_bad_share, bad_records)
    validation = None
    if config.validation:
        held_out = Demonstrations(config.validation, processor, limit)
        validation = Validation(held_out, builder, config, bad_records)
    checkpoints = Checkpoints(run_dir, config.checkpoint.keep_last)
    step, best = _resume(config, checkpoints, policy, draws, bad_records)
    if parallel.is_main():
        truncate_after(run_dir, step)
    writer = MetricsWriter(run_dir) if parallel.is_main() else None
    loss = losses.supervised()
    with Progress(
        num_steps, step, "cold start", SFT_FIELDS, is_quiet=not parallel.is_main()
    ) as progress:
        while step < num_steps:
            step, start, is_best = step + 1, time.perf_counter(), False
            batch, measured = draws.next_step(config.global_batch_size, builder)
            data_seconds = time.perf_counter() - start
            metrics = policy.train_step(batch, loss, _WHOLE_SOFTMAX) | measured
            stop_if_not_finite(metrics)
            seconds = time.perf_counter() - start
            num_tokens = metrics.pop("tokens")
            metrics |= {"tokens_per_s": num_tokens / seconds}
            metrics |= {"time/step_s": seconds, "time/data_s": data_seconds} | policy.clock.pop()
            if validation and _is_due(step, config.validation_every, num_steps):
                metrics["validation/loss"] = validation.loss(policy)
                is_best = metrics["validation/loss"] < best
                best = min(best, metrics["validation/loss"])
            progress.update(step, metrics)
            if writer:
                writer.write(step, metrics)
            if is_best or _is_due(step, config.checkpoint.every, num_steps):
                state = {
                    "best": best,
                    "draws": draws.state_dict(),
                    "bad_records": bad_records.state_dict(),
                }
                checkpoints.save(step, policy, state, is_best)
    if writer:
        writer.close()
    if validation and (best_step := checkpoints.best()) not in (None, num_steps):
        checkpoints.load(best_step, policy)
    return export_model(run_dir, policy, config.model.path)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _resume(
    config: SftConfig,
    checkpoints: Checkpoints,
    policy: MegatronPolicy,
    draws: Draws,
    bad_records: BadRecords,
) -> tuple[int, float]:
    """Return the step to go on from, and the lowest validation loss so far."""
    step = checkpoints.newest() if config.resume == "auto" else None
    if step is None:
        return 0, math.inf
    state = checkpoints.load(step, policy)
    draws.load_state_dict(state["draws"])
    bad_records.load_state_dict(state["bad_records"])
    return step, state["best"]


class Validation:
    """The mean loss a response token of a file's good records, the same ones each time."""

    def __init__(
        self,
        data: Demonstrations,
        builder: batching.StepBuilder,
        config: SftConfig,
        bad_records: BadRecords,
    ) -> None:
        self._data, self._builder, self._bad_records = data, builder, bad_records
        self._batch_size, self._max_bad_share = config.global_batch_size, config.max_bad_share

    def loss(self, policy: MegatronPolicy) -> float:
        """Measure. Bad records are recorded and left out."""
        total = num_tokens = 0.0
        for numbers in batched(range(len(self._data)), self._batch_size):
            read = read_records(self._data, numbers)
            self._bad_records.add(self._data.path, [r.as_bad_row() for r in read if r.reason])
            if good := [r for r in read if not r.reason]:
                step, _ = build(good, self._data, self._builder)
                for logprobs_R in policy.logprobs(step, _WHOLE_SOFTMAX):
                    total -= float(logprobs_R.sum())
                    num_tokens += len(logprobs_R)
        policy.clock.settle()
        policy.clock.pop()  # no part of the next step
        # Ranks of one data-parallel replica have the same.
        shares = dict(parallel.gather_over_world([(parallel.dp_rank(), (total, num_tokens))]))
        total, num_tokens = (sum(values) for values in zip(*shares.values(), strict=True))
        bad, share = self._bad_records.of(self._data.path), self._max_bad_share
        if not num_tokens or len(bad) > share * len(self._data):
            raise ValueError(
                f"max_bad_share={share}: {len(bad)} of {len(self._data)} records of validation="
                f"{self._data.path!r} are bad ({summary(bad)}); mend them or raise the share"
            )
        return total / num_tokens

"""The supervised cold start: imitate demonstrations, then write a Hugging Face folder.

Records are read when they are drawn, each by one rank; a bad one is recorded and another drawn in
its place, on all ranks alike.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mmr1.backend import batching, losses, parallel
from megatron_mmr1.backend.checkpoint import Checkpoints
from megatron_mmr1.backend.plan import Packing, SampleSize
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import SftConfig
from megatron_mmr1.data.dataset import BadRow, RowSize, summary
from megatron_mmr1.data.demonstrations import Demonstrations
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.observability.metrics import MetricsWriter, truncate_after
from megatron_mmr1.observability.progress import SFT_FIELDS, Progress
from megatron_mmr1.sampling.passes import UniformPasses
from megatron_mmr1.trainers.reporting import BAD_ROWS_FILE, export_model, progress_of
from megatron_mmr1.trainers.trust import stop_if_not_finite
from megatron_mmr1.types import Demonstration, StepBatch

_WHOLE_SOFTMAX = SoftmaxRule(temperature=1.0, banned_token_ids=())
_MIN_SEEN = 100  # records, before a share of bad ones means anything


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
    policy = MegatronPolicy(config.model, config.parallel, config.optimizer, num_steps)
    builder = batching.StepBuilder(
        Packing.at(config.parallel, limit, config.model.fp8),
        policy.cost,
        batching.ImageTokens.of(processor),
    )
    draws = Draws(data, config.seed, config.max_bad_share, run_dir)
    validation = (
        Validation(Demonstrations(config.validation, processor, limit), builder, config)
        if config.validation
        else None
    )
    checkpoints = Checkpoints(run_dir, config.checkpoint.keep_last)
    step, best = _resume(config, checkpoints, policy, draws)
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
            metrics = policy.train_step(batch, loss, _WHOLE_SOFTMAX) | measured
            stop_if_not_finite(metrics)
            seconds = time.perf_counter() - start
            num_tokens = metrics.pop("tokens")
            metrics |= {"tokens_per_s": num_tokens / seconds, "time/step_s": seconds}
            if validation and _is_due(step, config.validation_every, num_steps):
                metrics["validation/loss"] = validation.loss(policy)
                is_best = metrics["validation/loss"] < best
                best = min(best, metrics["validation/loss"])
            progress.update(step, metrics)
            if writer:
                writer.write(step, metrics)
            if is_best or _is_due(step, config.checkpoint.every, num_steps):
                state = {"best": best, "draws": draws.state_dict()}
                checkpoints.save(step, policy, state, is_best)
    if writer:
        writer.close()
    if validation and (best_step := checkpoints.best()) not in (None, num_steps):
        checkpoints.load(best_step, policy)
    return export_model(run_dir, policy, config.model.path)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _resume(
    config: SftConfig, checkpoints: Checkpoints, policy: MegatronPolicy, draws: Draws
) -> tuple[int, float]:
    """Return the step to go on from, and the lowest validation loss so far."""
    step = checkpoints.newest() if config.resume == "auto" else None
    if step is None:
        return 0, math.inf
    state = checkpoints.load(step, policy)
    draws.load_state_dict(state["draws"])
    return step, state["best"]


@dataclass(frozen=True, slots=True)
class _Read:
    """What a rank read of one record; plain values, so that ranks can tell each other."""

    number: int
    row_id: str
    sizes: tuple[RowSize, ...]
    reason: str


@dataclass(slots=True)
class _Batch:
    """Demonstrations of one step: sizes of all, contents of those that this rank has read."""

    read: list[_Read] = field(default_factory=list)
    mine: dict[int, list[Demonstration]] = field(default_factory=dict)


class Draws:
    """Batches of good records in shuffled passes, the same on all ranks.

    Args:
        max_bad_share: of the records seen, above which the run stops.
        run_dir: bad records are appended to its bad_rows.jsonl, by rank 0.
    """

    def __init__(
        self, data: Demonstrations, seed: int, max_bad_share: float, run_dir: Path
    ) -> None:
        self._data, self._max_bad_share = data, max_bad_share
        self._passes = UniformPasses(len(data), seed)
        self._bad: list[BadRow] = []
        self._num_seen = 0
        self._path = run_dir / BAD_ROWS_FILE
        self._write(anew=True)

    def next_step(
        self, num_records: int, builder: batching.StepBuilder
    ) -> tuple[StepBatch, dict[str, float]]:
        """Build the next step of so many good records.

        Raises:
            ValueError: too many are bad.
        """
        batch = _Batch()
        while len(batch.read) < num_records:
            numbers = self._passes.take(num_records - len(batch.read))
            read = read_records(self._data, numbers, batch.mine)
            self._num_seen += len(read)
            bad = [BadRow(r.number, r.row_id, r.reason) for r in read if r.reason]
            batch.read += [r for r in read if not r.reason]
            if bad:
                self._bad += bad
                self._write(anew=False, rows=bad)
                self._stop_if_too_many()
        return build(batch, self._data, builder)

    def _stop_if_too_many(self) -> None:
        is_enough = self._num_seen >= min(_MIN_SEEN, len(self._data))
        if is_enough and len(self._bad) > self._max_bad_share * self._num_seen:
            raise ValueError(
                f"max_bad_share={self._max_bad_share}: {len(self._bad)} of {self._num_seen} records"
                f" of {self._data.path} are bad ({summary(self._bad)}); see {self._path}, and mend "
                "them or raise the share"
            )

    def _write(self, anew: bool, rows: Sequence[BadRow] = ()) -> None:
        if not parallel.is_main():
            return
        if anew:
            self._path.unlink(missing_ok=True)
        if rows:
            with self._path.open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(
                    json.dumps({"source": self._data.path} | asdict(row)) + "\n" for row in rows
                )

    def state_dict(self) -> dict[str, Any]:
        """Return what later draws depend on, and the bad records so far."""
        return {
            "passes": self._passes.state_dict(),
            "num_seen": self._num_seen,
            "bad": [asdict(row) for row in self._bad],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, of the same data."""
        self._passes.load_state_dict(state["passes"])
        self._num_seen = state["num_seen"]
        self._bad = [BadRow(**row) for row in state["bad"]]
        self._write(anew=True, rows=self._bad)


class Validation:
    """The mean loss a response token of a file's good records, the same ones each time."""

    def __init__(
        self, data: Demonstrations, builder: batching.StepBuilder, config: SftConfig
    ) -> None:
        self._data, self._builder = data, builder
        self._batch_size = config.global_batch_size

    def loss(self, policy: MegatronPolicy) -> float:
        """Measure; bad records are left out."""
        total = num_tokens = 0.0
        for numbers in batched(range(len(self._data)), self._batch_size):
            batch = _Batch()
            read = read_records(self._data, numbers, batch.mine)
            batch.read = [r for r in read if not r.reason]
            if batch.read:
                step, _ = build(batch, self._data, self._builder)
                for logprobs_R in policy.logprobs(step, _WHOLE_SOFTMAX):
                    total -= float(logprobs_R.sum())
                    num_tokens += len(logprobs_R)
        # Ranks of one data-parallel replica have the same.
        shares = dict(parallel.gather_over_world([(parallel.dp_rank(), (total, num_tokens))]))
        total, num_tokens = (sum(values) for values in zip(*shares.values(), strict=True))
        if not num_tokens:
            raise ValueError(f"validation={self._data.path!r} has no good record")
        return total / num_tokens


def read_records(
    data: Demonstrations, numbers: Sequence[int], mine: dict[int, list[Demonstration]]
) -> list[_Read]:
    """Read records, each on one rank; return what all ranks found, in the order of `numbers`.

    Args:
        mine: gets the demonstrations that this rank has read.
    """
    found = []
    for number in list(numbers)[dist.get_rank() :: dist.get_world_size()]:
        try:
            loaded = data.load(number)
            mine[number] = [demonstration for demonstration, _ in loaded]
            found.append(_Read(number, data.row_id(number), tuple(s for _, s in loaded), ""))
        except ValueError as error:
            reason = str(error) or type(error).__name__
            found.append(_Read(number, data.row_id(number), (), reason))
    by_number = {read.number: read for read in parallel.gather_over_world(found)}
    return [by_number[number] for number in numbers]


def build(
    batch: _Batch, data: Demonstrations, builder: batching.StepBuilder
) -> tuple[StepBatch, dict[str, float]]:
    """Build this rank's share of a batch; what another rank has read is read once more."""
    places = [(read, turn) for read in batch.read for turn in range(len(read.sizes))]
    sizes = [
        SampleSize(
            (f"{read.number}/{turn}", 0),
            read.sizes[turn].num_prompt_tokens,
            read.sizes[turn].num_response_tokens,
            read.sizes[turn].patches,
        )
        for read, turn in places
    ]

    def sample(index: int) -> batching.Sample:
        read, turn = places[index]
        if read.number not in batch.mine:
            batch.mine[read.number] = [d for d, _ in data.load(read.number)]
        return batching.sample_of_demonstration(batch.mine[read.number][turn])

    step, plan = builder.build(sizes, sample)
    return step, plan.metrics() | {"tokens": float(sum(size.num_tokens for size in sizes))}

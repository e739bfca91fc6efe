"""Demonstrations for the steps of the cold start: drawn in passes, read by one rank each, packed.

Owns which records a step has and what becomes of bad ones. Readers are in data/demonstrations.py,
the tensors of a step in backend/batching.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mmr1.backend import batching, parallel
from megatron_mmr1.backend.plan import SampleSize
from megatron_mmr1.data.dataset import BadRow, RowSize, summary
from megatron_mmr1.data.demonstrations import Demonstrations
from megatron_mmr1.sampling.passes import UniformPasses
from megatron_mmr1.trainers.reporting import BAD_ROWS_FILE
from megatron_mmr1.types import StepBatch

_NUM_THREADS = 4  # decoding lets other threads run
_MIN_SEEN = 100  # records, before a share of bad ones means anything


@dataclass(frozen=True, slots=True)
class Read:
    """What a rank read of one record; plain values, so that ranks can tell each other."""

    number: int
    row_id: str
    sizes: tuple[RowSize, ...]
    reason: str

    def as_bad_row(self) -> BadRow:
        """Return what is recorded of a bad one."""
        return BadRow(self.number, self.row_id, self.reason)


class BadRecords:
    """The bad records of a run's sources: each is written to bad_rows.jsonl once, by rank 0."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / BAD_ROWS_FILE
        self._found: dict[tuple[str, int], BadRow] = {}
        if parallel.is_main():
            self.path.unlink(missing_ok=True)

    def of(self, source: str) -> list[BadRow]:
        """Return those of a source."""
        return [row for (path, _), row in self._found.items() if path == source]

    def add(self, source: str, rows: Sequence[BadRow]) -> None:
        """Record those that are new."""
        new = {(source, row.row): row for row in rows if (source, row.row) not in self._found}
        self._found |= new
        if new and parallel.is_main():
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(
                    json.dumps({"source": source} | asdict(row)) + "\n" for row in new.values()
                )

    def state_dict(self) -> list[tuple[str, dict[str, Any]]]:
        """Return all, in plain values."""
        return [(source, asdict(row)) for (source, _), row in self._found.items()]

    def load_state_dict(self, state: list[tuple[str, dict[str, Any]]]) -> None:
        """Take over those of an interrupted run, and write them."""
        for source, row in state:
            self.add(source, [BadRow(**row)])


class Draws:
    """Batches of good records in shuffled passes, the same on all ranks.

    A record that was found bad is passed over from then on.

    Args:
        max_bad_share: of the records, above which the run stops: as soon as those seen leave no
            doubt (three standard deviations), and exactly once all were seen.
    """

    def __init__(
        self, data: Demonstrations, seed: int, max_bad_share: float, bad_records: BadRecords
    ) -> None:
        self._data, self._max_bad_share, self._bad_records = data, max_bad_share, bad_records
        self._passes = UniformPasses(len(data), seed)
        self._num_seen = 0

    def next_step(
        self, num_records: int, builder: batching.StepBuilder
    ) -> tuple[StepBatch, dict[str, float]]:
        """Build the next step of so many good records, all different.

        Raises:
            ValueError: too many are bad, or there are not so many.
        """
        bad = {row.row for row in self._bad_records.of(self._data.path)}
        good: list[Read] = []
        while len(good) < num_records:
            if num_records + len(bad) > len(self._data):
                raise ValueError(
                    f"global_batch_size={num_records} exceeds the {len(self._data) - len(bad)} good"
                    f" records of {self._data.path}; lower it, or add records"
                )
            drawn = self._passes.take(num_records - len(good), [read.number for read in good])
            self._num_seen = min(self._num_seen + len(drawn), len(self._data))
            read = read_records(self._data, [n for n in drawn if n not in bad])
            good += [r for r in read if not r.reason]
            if found := [r.as_bad_row() for r in read if r.reason]:
                self._bad_records.add(self._data.path, found)
                bad |= {row.row for row in found}
            self._stop_if_too_many()
        step, measured = build(good, self._data, builder)
        return step, measured | {"data/bad_records": float(len(bad))}

    def _stop_if_too_many(self) -> None:
        bad = self._bad_records.of(self._data.path)
        share, num_seen = self._max_bad_share, self._num_seen
        doubt = 3 * math.sqrt(num_seen * share * (1 - share)) if num_seen < len(self._data) else 0
        is_enough = num_seen >= min(_MIN_SEEN, len(self._data))
        if is_enough and len(bad) > share * num_seen + doubt:
            raise ValueError(
                f"max_bad_share={self._max_bad_share}: {len(bad)} of {self._num_seen} records of"
                f" {self._data.path} are bad ({summary(bad)}); see {self._bad_records.path}, and "
                "mend them or raise the share"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what later draws depend on."""
        return {"passes": self._passes.state_dict(), "num_seen": self._num_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, of the same data."""
        self._passes.load_state_dict(state["passes"])
        self._num_seen = state["num_seen"]


def read_records(data: Demonstrations, numbers: Sequence[int]) -> list[Read]:
    """Check records, each on one rank; return what all ranks found, in the order of `numbers`."""
    mine = list(numbers)[dist.get_rank() :: dist.get_world_size()]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        found = list(threads.map(partial(_read, data), mine))
    by_number = {read.number: read for read in parallel.gather_over_world(found)}
    return [by_number[number] for number in numbers]


def _read(data: Demonstrations, number: int) -> Read:
    sizes, reason = (), ""
    try:
        sizes = tuple(data.sizes(number))
    except ValueError as error:
        reason = str(error) or type(error).__name__
    return Read(number, data.row_id(number), sizes, reason)


def build(
    records: Sequence[Read], data: Demonstrations, builder: batching.StepBuilder
) -> tuple[StepBatch, dict[str, float]]:
    """Build this rank's share of a batch of good records: it loads what it trains on."""
    places = [(read, turn) for read in records for turn in range(len(read.sizes))]
    sizes = [
        SampleSize(
            (f"{read.number}/{turn}", 0),
            read.sizes[turn].num_prompt_tokens,
            read.sizes[turn].num_response_tokens,
            read.sizes[turn].patches,
        )
        for read, turn in places
    ]
    loaded = cache(data.load)

    def sample(index: int) -> batching.Sample:
        read, turn = places[index]
        return batching.sample_of_demonstration(loaded(read.number)[turn])

    step, plan = builder.build(sizes, sample)
    return step, plan.metrics() | {"tokens": float(sum(size.num_tokens for size in sizes))}

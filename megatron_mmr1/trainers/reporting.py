"""What a run writes for people and for a resume: metrics, rollouts, prompt statistics, bad rows.

Rank 0 only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from megatron_mmr1.backend import parallel
from megatron_mmr1.data.dataset import DemonstrationDataset, PromptDataset
from megatron_mmr1.observability.metrics import MetricsWriter, truncate_after
from megatron_mmr1.observability.prompt_stats import append_prompt_stats
from megatron_mmr1.observability.rollouts import write_rollouts
from megatron_mmr1.types import ScoredGroup


class Recorder:
    """The run folder's records, opened at the step that the run goes on from."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self._run_dir = run_dir
        self._writer: MetricsWriter | None = None
        if parallel.is_main():
            # From the start: also a step 0 that an earlier try wrote before its first checkpoint.
            truncate_after(run_dir, start_step if start_step > 0 else -1)
            self._writer = MetricsWriter(run_dir)

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line of metrics."""
        if self._writer:
            self._writer.write(step, metrics)

    def write_groups(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Write all ranks' rollouts of a step; every rank calls. Pixels stay where they are."""
        without_pixels = [
            replace(g, group=replace(g.group, prompt=replace(g.group.prompt, pixel_values=None)))
            for g in groups
        ]
        everyone = parallel.gather_to_main(without_pixels)
        if everyone is not None:
            write_rollouts(self._run_dir, step, everyone)

    def write_prompt_stats(self, table: dict[str, np.ndarray] | None) -> None:
        """Append the sampler's table, if its scores were renewed."""
        if table is not None and parallel.is_main():
            append_prompt_stats(self._run_dir, table)

    def close(self) -> None:
        """Close the metrics files."""
        if self._writer:
            self._writer.close()


def report_bad_rows(
    run_dir: Path, datasets: Sequence[PromptDataset | DemonstrationDataset]
) -> None:
    """Write the rows that were set aside to `bad_rows.jsonl`, anew, and say how many; rank 0."""
    bad = [(str(d.path), row) for d in datasets for row in d.bad_rows]
    if not bad or not parallel.is_main():
        return
    path = run_dir / "bad_rows.jsonl"
    lines = [json.dumps({"source": source} | asdict(row)) + "\n" for source, row in bad]
    path.write_text("".join(lines), encoding="utf-8")
    for dataset in datasets:
        if dataset.bad_rows:
            print(f"{dataset.path}: {len(dataset.bad_rows)} bad rows set aside, see {path}")

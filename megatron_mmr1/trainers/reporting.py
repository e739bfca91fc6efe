"""What a run writes for people and for a resume: metrics, rollouts, prompt statistics, bad rows,
the model. Rank 0 writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.convert.hf_files import write_hf_folder
from megatron_mmr1.data.dataset import DemonstrationDataset, PromptDataset
from megatron_mmr1.observability.calibration import write_calibration
from megatron_mmr1.observability.metrics import MetricsWriter, truncate_after
from megatron_mmr1.observability.prompt_stats import append_prompt_stats
from megatron_mmr1.observability.rollouts import write_rollouts
from megatron_mmr1.sampling.base import Sampler
from megatron_mmr1.types import Prompt, ScoredGroup

if TYPE_CHECKING:
    from megatron_mmr1.trainers.collect import Collected


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

    def write_groups(self, step: int, collected: Collected, dataset: PromptDataset) -> None:
        """Write all engines' rollouts of a step, with the image files of their prompts."""
        if not parallel.is_main():
            return

        def with_images(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
            return [
                replace(g, group=replace(g.group, prompt=_with_images(g.group.prompt, dataset)))
                for g in groups
            ]

        write_rollouts(
            self._run_dir, step, with_images(collected.groups), with_images(collected.discarded)
        )

    def write_sampler(self, sampler: Sampler) -> None:
        """Append the sampler's table, if its scores were renewed; rewrite its calibration."""
        if not parallel.is_main():
            return
        table, calibration = sampler.update_table(), sampler.calibration()
        if table is not None:
            append_prompt_stats(self._run_dir, table)
        if calibration is not None:
            write_calibration(self._run_dir, calibration)

    def close(self) -> None:
        """Close the metrics files."""
        if self._writer:
            self._writer.close()


def export_model(run_dir: Path, policy: MegatronPolicy, template: str) -> Path:
    """Write the policy's weights as a Hugging Face folder, `hf/`; every rank calls.

    Args:
        template: the folder whose config, tokenizer and processor files go with them.
    """
    folder, named_tensors = run_dir / "hf", policy.named_tensors()
    if parallel.is_main():
        write_hf_folder(folder, named_tensors, template)
    else:
        for _ in named_tensors:  # collective
            pass
    parallel.barrier()
    return folder


def _with_images(prompt: Prompt, dataset: PromptDataset) -> Prompt:
    return replace(prompt, images=dataset.image_files(dataset.index_of(prompt.prompt_id)))


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

"""What a run writes for people and for a resume: metrics, rollouts, prompt statistics, bad rows,
the model. Rank 0 writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.convert.hf_files import write_hf_folder
from megatron_mmr1.data.dataset import PromptDataset, summary
from megatron_mmr1.observability.calibration import write_calibration
from megatron_mmr1.observability.metrics import MetricsWriter, truncate_after
from megatron_mmr1.observability.progress import Progress
from megatron_mmr1.observability.prompt_stats import append_prompt_stats
from megatron_mmr1.observability.rollouts import write_rollouts
from megatron_mmr1.sampling.base import Sampler
from megatron_mmr1.types import Prompt, ScoredGroup

if TYPE_CHECKING:
    from megatron_mmr1.trainers.collect import Collected

BAD_ROWS_FILE = "bad_rows.jsonl"
_QUIET_S = 3.0


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


def report_bad_rows(run_dir: Path, datasets: Sequence[PromptDataset], max_bad_share: float) -> None:
    """Write the rows that were set aside to `bad_rows.jsonl`, anew, and say how many; rank 0.

    Raises:
        ValueError: on all ranks: a source has a larger share of them.
    """
    bad = [(d.path, row) for d in datasets for row in d.bad_rows]
    path = run_dir / BAD_ROWS_FILE
    if bad and parallel.is_main():
        lines = [json.dumps({"source": source} | asdict(row)) + "\n" for source, row in bad]
        path.write_text("".join(lines), encoding="utf-8")
        for dataset in datasets:
            if dataset.bad_rows:
                print(f"{dataset.path}: {len(dataset.bad_rows)} bad rows set aside, see {path}")
    for dataset in datasets:
        num_bad = len(dataset.bad_rows)
        if num_bad > max_bad_share * (num_bad + len(dataset)):
            raise ValueError(
                f"data.max_bad_share={max_bad_share}: {num_bad} of {num_bad + len(dataset)} rows of"
                f" {dataset.path} are bad ({summary(dataset.bad_rows)}); see {path}, and mend them "
                "or raise the share"
            )


def progress_of(title: str) -> Callable[[int, int], None]:
    """Return what shows the progress of reading a source: done and total; rank 0, long work only.

    It begins to speak after some seconds: looking up an earlier result is quick.
    """
    start = time.monotonic()
    bars: list[Progress] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(Progress(total, title=title, is_brief=True))
        if parallel.is_main() and time.monotonic() - start > _QUIET_S:
            bars[0].update(done, {})

    return show

"""What the two converters' commands share: start-up, the progress bar, and what they print."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def start() -> None:
    """Join the process group, on the CPU: a conversion needs no GPU. Before torch is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_mmr1 import device

    device.prepare_process()
    from megatron_mmr1.backend import parallel
    from megatron_mmr1.config.schema import ParallelConfig

    parallel.initialize(ParallelConfig(), seed=0)


def with_progress(what: str, work: Callable[[Callable[[int, int], None]], Any]) -> Any:
    """Do some work while rank 0 shows how much of its bytes is done."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from megatron_mmr1.backend import parallel

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), disable=not parallel.is_main()) as bar:
        task = bar.add_task(what)
        return work(lambda done, total: bar.update(task, completed=done, total=total))


def finish(report: Any, out: Path, hf: Path, megatron: Path, should_verify: bool) -> int:
    """Say what was done, compare both sides if asked, and return the exit status."""
    from megatron_mmr1.backend import conversion, parallel

    lines = [f"{out}: {report.num_tensors} tensors, {report.num_bytes:,} bytes"]
    if report.skipped:
        lines.append(f"needed no conversion: {', '.join(report.skipped)}")
    status = 0
    if should_verify:
        checked = with_progress("comparing", lambda on: conversion.verify(hf, megatron, on))
        if checked.differing:
            status = 1
            shown = ", ".join(checked.differing[:10])
            lines.append(f"{len(checked.differing)} tensors differ: {shown}")
        else:
            lines.append(f"the same bit for bit: {checked.num_tensors} tensors")
    if parallel.is_main():
        print("\n".join(lines))
    parallel.barrier()
    parallel.finalize()
    return status

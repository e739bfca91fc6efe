"""`metrics.jsonl`, one JSON object a step: the source of truth. TensorBoard gets the same numbers.

Owns writing, reading, and cutting a run's records back to a checkpoint; their meaning belongs to
whoever computes them. A number that isn't finite is stored as null: JSON has no word for it.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import (  # made at run time, so pyright can't see them
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.compat.proto.summary_pb2 import (
    Summary,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_mmr1.observability.files import iter_lines, replacing
from megatron_mmr1.observability.prompt_stats import truncate_prompt_stats
from megatron_mmr1.observability.rollouts import truncate_rollouts

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends a run's metrics. On resume call `truncate_after` first, then open a new writer."""

    def __init__(self, run_dir: Path | str) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8", newline="\n")
        self._events = EventFileWriter(str(run_dir / "tensorboard"))
        if earlier := read_metrics(run_dir):
            # A session start makes TensorBoard forget what an interrupted run wrote past this step.
            start = SessionLog(status=SessionLog.START)
            next_step = earlier[-1]["step"] + 1
            self._events.add_event(Event(wall_time=time.time(), step=next_step, session_log=start))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line for `step`, on disk (flushed) when this returns, and TensorBoard scalars.

        Args:
            step: steps already trained; 0 is the evaluation before training.
            metrics: key -> plain number; NaN and infinities become null.
        """
        numbers = {key: float(value) for key, value in metrics.items()}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        line = {"step": step} | {key: finite.get(key) for key in numbers}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        values = [Summary.Value(tag=key, simple_value=value) for key, value in finite.items()]
        summary = Summary(value=values)
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Return every line of `metrics.jsonl`; a last line that is still being written is left out.

    Raises:
        ValueError: a line other than the last is not JSON.
    """
    path = Path(run_dir) / METRICS_FILE
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(iter_lines(path), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if line.endswith("\n"):
                raise ValueError(
                    f"{path} line {number} is not JSON ({error}); repair it"
                ) from error
    return rows


def truncate_after(run_dir: Path | str, step: int) -> None:
    """Forget everything recorded after `step`, as if the run had stopped there; call it on resume.

    Covers `metrics.jsonl` (a half-written last line goes too), `rollouts/`, `prompt_stats.parquet`.
    Files that don't exist are none to cut.
    """
    run_dir = Path(run_dir)
    path = run_dir / METRICS_FILE
    if path.exists():
        kept = [row for row in read_metrics(run_dir) if row["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    truncate_rollouts(run_dir, step)
    truncate_prompt_stats(run_dir, step)

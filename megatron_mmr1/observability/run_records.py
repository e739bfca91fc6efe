"""A run directory as the report reads it: metrics by key, resolved config, prompt statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_mmr1.observability.calibration import read_calibration
from megatron_mmr1.observability.metrics import read_metrics
from megatron_mmr1.observability.plots import Series
from megatron_mmr1.observability.prompt_stats import read_prompt_stats


@dataclass(frozen=True, slots=True)
class RunRecords:
    """Everything the report shows except rollouts, which are read one group at a time."""

    run_dir: Path
    rows: list[dict[str, Any]]
    prompt_stats: dict[str, np.ndarray]
    calibration: np.ndarray | None
    config_text: str
    config: dict[str, Any]

    def config_value(self, dotted: str) -> Any:
        """Return a config value, or None when the run was written without it."""
        value: Any = self.config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def series(self, key: str, name: str = "", color: int = 0) -> Series:
        """Return a metric over the steps that recorded it (null is NaN); empty when none did."""
        points = [(row["step"], row[key]) for row in self.rows if key in row]
        xs = np.array([step for step, _ in points], dtype=float)
        ys = np.array([np.nan if v is None else v for _, v in points], dtype=float)
        return Series(name or key, xs, ys, color)

    def keys(self, prefix: str = "") -> list[str]:
        """Return the metrics' names that start with `prefix`, in order of first appearance."""
        names = dict.fromkeys(key for row in self.rows for key in row if key != "step")
        return [name for name in names if name.startswith(prefix)]

    def num_steps(self) -> int:
        """Return the number of the last training step."""
        return max((row["step"] for row in self.rows), default=0)

    def why_empty(self) -> str:
        """Say why a training metric has no plot."""
        return "Not recorded." if self.num_steps() else "No training step was recorded."


def read_run(run_dir: Path) -> RunRecords:
    """Read a run directory; only `metrics.jsonl` has to exist."""
    path = run_dir / "config.yaml"
    config_text = path.read_text(encoding="utf-8") if path.exists() else ""
    return RunRecords(
        run_dir=run_dir,
        rows=read_metrics(run_dir),
        prompt_stats=read_prompt_stats(run_dir),
        calibration=read_calibration(run_dir),
        config_text=config_text,
        config=yaml.safe_load(config_text) or {},
    )

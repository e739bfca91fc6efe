"""`calibration.json`: how often groups were mixed beside how often that was predicted; its plot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_mmr1.observability.files import replacing
from megatron_mmr1.observability.plots import svg, text

CALIBRATION_FILE = "calibration.json"
SIZE, LEFT, TOP = 200, 40, 8


def write_calibration(run_dir: Path, sums_3B: np.ndarray) -> None:
    """Keep the run's sums by bin of the prediction: groups, predictions, mixed groups."""
    names = ("groups", "predicted", "mixed")
    record = {name: sums.tolist() for name, sums in zip(names, sums_3B, strict=True)}
    with replacing(run_dir / CALIBRATION_FILE) as temporary:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")


def read_calibration(run_dir: Path) -> np.ndarray | None:
    """Return float64 [3, bins], or None where there is no file."""
    path = run_dir / CALIBRATION_FILE
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return np.array([record["groups"], record["predicted"], record["mixed"]])


def reliability_plot(sums_3B: np.ndarray) -> str:
    """Draw seen against predicted shares, with 95% bars; on the diagonal a prediction is right."""
    parts = [f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{SIZE}" height="{SIZE}"/>']
    parts.append(f'<path class="rule" d="M{LEFT} {TOP + SIZE}L{LEFT + SIZE} {TOP}"/>')
    for groups, predicted, mixed in sums_3B.T[sums_3B[0] > 0]:
        x, share = LEFT + SIZE * predicted / groups, mixed / groups
        low, high = _wilson(mixed, groups)
        y = TOP + SIZE * (1 - share)
        parts.append(
            f'<path class="line c0" d="M{x:.1f} {TOP + SIZE * (1 - low):.1f}'
            f'V{TOP + SIZE * (1 - high):.1f}"/><circle class="point c0" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="3.2"><title>{groups:.0f} groups: predicted {predicted / groups:.0%}, '
            f"seen {share:.0%}</title></circle>"
        )
    for share in (0.0, 0.5, 1.0):
        parts.append(text(LEFT + SIZE * share, TOP + SIZE + 16, f"{share:.0%}"))
        parts.append(text(LEFT - 6, TOP + SIZE * (1 - share) + 3.5, f"{share:.0%}", "end"))
    return svg(parts, LEFT + SIZE + 20, TOP + SIZE + 24)


def _wilson(successes: float, trials: float) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share."""
    z2 = 1.96**2
    centre = (successes + z2 / 2) / (trials + z2)
    share = successes / trials
    half = 1.96 * np.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(centre - half, 0.0), min(centre + half, 1.0)

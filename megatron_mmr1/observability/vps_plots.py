"""How prompt scores move: VPS histograms and bin-to-bin transitions (arXiv:2509.21268, figure 3).

A handful of updates is shown, evenly spaced from the first to the last. All histograms and matrices
share the same 10 bins, from 0 to the largest VPS of the run, so that they can be compared.
"""

from __future__ import annotations

import numpy as np

from megatron_mmr1.observability.plots import nice_ticks, svg, text

NUM_BINS = 10
MAX_UPDATES = 5
CELL, LEFT, TOP = 20, 38, 6


def shown_updates(steps: np.ndarray) -> list[int]:
    """Return the steps of at most MAX_UPDATES updates, evenly spaced, first and last included."""
    updates = np.unique(steps)
    picks = np.linspace(0, len(updates) - 1, min(MAX_UPDATES, len(updates))).round().astype(int)
    return [int(updates[i]) for i in picks]


def bin_edges(vps: np.ndarray) -> np.ndarray:
    """Return the 11 edges of the 10 bins."""
    finite = vps[np.isfinite(vps)]
    high = float(finite.max()) if len(finite) else 0.0
    return np.linspace(0.0, float(nice_ticks(0.0, high or 1.0, 5)[-1]), NUM_BINS + 1)


def bin_of(vps: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return each value's bin, 0..9; the top edge belongs to the last bin."""
    return np.clip(np.searchsorted(edges, vps, side="right") - 1, 0, NUM_BINS - 1)


def transition_counts(
    before: dict[str, float], after: dict[str, float], edges: np.ndarray
) -> np.ndarray:
    """Return counts [from bin, to bin] over the prompts that both updates scored."""
    both = sorted(before.keys() & after.keys())
    counts = np.zeros((NUM_BINS, NUM_BINS), dtype=np.int64)
    rows = bin_of(np.array([before[p] for p in both]), edges)
    columns = bin_of(np.array([after[p] for p in both]), edges)
    np.add.at(counts, (rows, columns), 1)
    return counts


def share_within_one_bin(counts: np.ndarray) -> float:
    """Return the share of prompts that stayed in their bin or moved to a neighbouring one."""
    rows, columns = np.indices(counts.shape)
    return float(counts[abs(rows - columns) <= 1].sum() / max(counts.sum(), 1))


def histogram(vps: np.ndarray, edges: np.ndarray, highest: float) -> str:
    """Draw the share of prompts in each bin.

    Args:
        highest: the share at the top of the axis, common to all histograms.
    """
    width, height = NUM_BINS * CELL, 110
    parts = []
    for share in nice_ticks(0.0, highest, 3):
        y = TOP + height * (1 - share / highest)
        if y >= TOP - 1:
            parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}h{width}"/>')
            parts.append(text(LEFT - 6, y + 3.5, f"{share:.0%}", "end"))
    counts = np.bincount(bin_of(vps, edges), minlength=NUM_BINS)
    for i, count in enumerate(counts):
        bar = count / len(vps) / highest * height
        parts.append(
            f'<rect class="bar c0" x="{LEFT + i * CELL + 1.5}" y="{TOP + height - bar:.1f}" '
            f'width="{CELL - 3}" height="{bar:.1f}"><title>VPS {edges[i]:.2f} to '
            f"{edges[i + 1]:.2f}: {count} prompts</title></rect>"
        )
    parts += _bin_labels(edges, TOP + height + 15)
    return svg(parts, LEFT + width + 12, TOP + height + 22)


def heat_map(counts: np.ndarray, edges: np.ndarray) -> str:
    """Draw row-normalised transition probabilities; low VPS at the bottom left."""
    totals = counts.sum(axis=1)
    size = NUM_BINS * CELL
    parts = [f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{size}" height="{size}"/>']
    for i, j in np.ndindex(counts.shape):
        if counts[i, j] == 0:
            continue
        share = counts[i, j] / totals[i]
        x, y = LEFT + j * CELL, TOP + (NUM_BINS - 1 - i) * CELL
        title = (
            f"from VPS {edges[i]:.2f}-{edges[i + 1]:.2f} to {edges[j]:.2f}-{edges[j + 1]:.2f}: "
            f"{share:.0%} ({counts[i, j]} of {totals[i]} prompts)"
        )
        parts.append(
            f'<rect class="cell c0" x="{x + 0.5}" y="{y + 0.5}" width="{CELL - 1}" '
            f'height="{CELL - 1}" fill-opacity="{0.06 + 0.94 * share:.3f}">'
            f"<title>{title}</title></rect>"
        )
        if share >= 0.095:
            kind = "cell-text strong" if share > 0.5 else "cell-text"
            parts.append(text(x + CELL / 2, y + CELL / 2 + 2.8, f"{share * 100:.0f}", kind=kind))
    parts += _bin_labels(edges, TOP + size + 15)
    for i in (0, NUM_BINS // 2, NUM_BINS):
        parts.append(text(LEFT - 6, TOP + size - i * CELL + 3.5, f"{edges[i]:.2g}", "end"))
    return svg(parts, LEFT + size + 12, TOP + size + 22)


def _bin_labels(edges: np.ndarray, y: float) -> list[str]:
    marks = (0, NUM_BINS // 2, NUM_BINS)
    return [text(LEFT + i * CELL, y, f"{edges[i]:.2g}") for i in marks]

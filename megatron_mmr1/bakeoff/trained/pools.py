"""Pools of the embedded task whose difficulty is known: prompts sorted by what the cold start makes
of them.

Many candidates are sampled 16 times each by the cold start. A prompt is "trivial" when at most one
of the 16 is wrong, "impossible" when at most one is right, and "frontier" else. A pool is drawn
from the three in a given mix. There is one held-out set, of unseen scans, with enough of
each class that none of them makes most of the noise; accuracy on a pool's own mix is the mean over
classes, weighted by the mix. The training files' `category` is the level of the task
(`sum2`, ...), the held-out file's the class, so that accuracies are reported by class.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mmr1.data.dataset import PromptDataset
from megatron_mmr1.data.digits import POOL_MIX, build_digits
from megatron_mmr1.data.loader import PromptView
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.evaluation.accuracy import generate_and_judge
from megatron_mmr1.rewards import VerifierPool
from megatron_mmr1.rollout.engine import RolloutEngine, Sampling

MIXES = {
    "balanced": {"trivial": 0.30, "impossible": 0.30, "frontier": 0.40},
    "skewed": {"trivial": 0.45, "impossible": 0.40, "frontier": 0.15},
}
NUM_TRAIN = 2000
HELDOUT = {"trivial": 120, "impossible": 200, "frontier": 240}
NUM_SAMPLES = 16
_NUM_CANDIDATES = {"train": 9000, "heldout": 2400}
_SEED = 12345  # of the candidates and of their rollouts: no run has it


def build_pools(
    folder: Path, engine: RolloutEngine, verifier: VerifierPool, processor: PromptProcessor
) -> None:
    """Write `folder`/POOL.parquet for every pool, and heldout.parquet; finished ones stay.

    Args:
        engine: holds the cold start.
    """
    wanted = [folder / f"{name}.parquet" for name in (*MIXES, "heldout")]
    if all(path.exists() for path in wanted):
        return
    build_digits(
        folder / "candidates",
        seed=_SEED,
        num_train=_NUM_CANDIDATES["train"],
        num_heldout=_NUM_CANDIDATES["heldout"],
        num_demonstrations=10,
        train_mix={**POOL_MIX, "read1": 2.5},  # or there would be too few trivial ones
    )
    rng = np.random.default_rng(_SEED)
    for part in _NUM_CANDIDATES:
        path = folder / "candidates" / f"{part}.parquet"
        classes = _classes(path, engine, verifier, processor)
        if part == "heldout":
            _write(folder / "heldout.parquet", path, classes, HELDOUT, rng)
            continue
        for pool, mix in MIXES.items():
            counts = {name: round(share * NUM_TRAIN) for name, share in mix.items()}
            _write(folder / f"{pool}.parquet", path, classes, counts, rng)


def _classes(
    path: Path, engine: RolloutEngine, verifier: VerifierPool, processor: PromptProcessor
) -> np.ndarray:
    """Return each candidate's class, str [rows]; pass rates are kept beside the file."""
    measured = path.with_suffix(".npy")
    if not measured.exists():
        dataset = PromptDataset(path, processor)
        assert not dataset.bad_rows, "our own rows"
        sampling = Sampling(NUM_SAMPLES, 1.0, 32, _SEED, 0)
        rates = []
        for start in range(0, len(dataset), 256):
            prompts = PromptView.of(dataset, range(start, min(start + 256, len(dataset))))
            for group in generate_and_judge(engine, verifier, prompts, sampling):
                outcomes = [score.verdict.outcome for score in group.scores]
                rates.append(outcomes.count("correct") / NUM_SAMPLES)
            print(f"{path.name}: {len(rates)} of {len(dataset)} candidates measured", flush=True)
        np.save(measured, np.array(rates))
    rates = np.load(measured)
    num_right = np.rint(rates * NUM_SAMPLES)
    return np.select(
        [num_right >= NUM_SAMPLES - 1, num_right <= 1], ["trivial", "impossible"], "frontier"
    )


def _write(
    path: Path,
    candidates: Path,
    classes: np.ndarray,
    counts: Mapping[str, int],
    rng: np.random.Generator,
) -> None:
    """Draw rows of each class without replacement and write them in random order."""
    rows: list[int] = []
    for name, wanted in counts.items():
        found = np.flatnonzero(classes == name)
        if len(found) < wanted:
            raise ValueError(
                f"{candidates} has {len(found)} {name} prompts and the pool takes {wanted}; raise "
                "the number of candidates"
            )
        rows += rng.permutation(found)[:wanted].tolist()
    rows = rng.permutation(rows).tolist()
    table = pq.read_table(candidates).take(rows)
    if path.stem == "heldout":
        column = table.schema.get_field_index("category")
        table = table.set_column(column, "category", pa.array(classes[rows].tolist()))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial)
    partial.rename(path)

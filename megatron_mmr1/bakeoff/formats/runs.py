"""GRPO runs in several number formats, at equal numbers of rollouts.

What is compared is written down here, before any run: arms, seeds, steps, settings. A finished run
is not made again. The policy computes in the arm's format; the engine, which has no emulation, in
the policy's dtype, as rollouts in bfloat16 do beside training in FP8.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mmr1.cli import load_config
from megatron_mmr1.config.schema import GrpoConfig
from megatron_mmr1.config.validate import validate
from megatron_mmr1.observability.metrics import read_metrics


@dataclass(frozen=True, slots=True)
class Arm:
    """One number format.

    Attributes:
        dtype: of parameters and activations; float32 master weights in all.
        recipe: of emulated FP8 (hybrid); None = none.
    """

    dtype: str
    recipe: str | None = None


ARMS = {
    "float32": Arm("float32"),
    "bfloat16": Arm("bfloat16"),
    "FP8 tensorwise": Arm("bfloat16", "tensorwise"),
    "FP8 delayed": Arm("bfloat16", "delayed"),
    "FP8 blockwise": Arm("bfloat16", "blockwise"),
}
NUM_STEPS, EVALUATED_EVERY = 30, 10
# Between trainer and engine, in bfloat16 and FP8: measured, not bounded.
NO_BOUND = 1e9


def config_of(arm: str, seed: int, cold_start: Path) -> GrpoConfig:
    """Return a run's whole configuration."""
    config = load_config(
        GrpoConfig,
        "experiment",
        [
            "experiment=digits",
            f"seed={seed}",
            f"model.path={cold_start}",
            f"precision.dtype={ARMS[arm].dtype}",
            f"num_steps={NUM_STEPS}",
            f"evaluation.every={EVALUATED_EVERY}",
            f"rollout.max_logprob_diff={NO_BOUND}",
            "checkpoint.every=0",
        ],
    )
    return replace(config, run=f"{arm.replace(' ', '_')}-seed{seed}")


def result_path(folder: Path, arm: str, seed: int) -> Path:
    """Where a finished run's record is."""
    return folder / f"{arm.replace(' ', '_')}-seed{seed}" / "result.json"


def read_rows(folder: Path, arm: str, seed: int) -> list[dict[str, Any]]:
    """Return the metrics of a finished run, a step a row."""
    return json.loads(result_path(folder, arm, seed).read_text(encoding="utf-8"))["rows"]


def make(folder: Path, dtype: str, cold_starts: Sequence[Path]) -> None:
    """Make the runs of all arms of one dtype that are not there yet, seed by seed, with one engine.

    The rollouts of the float32 runs' first step are kept: errors.py measures on them.
    """
    wanted = [
        (seed, arm)
        for seed in range(len(cold_starts))
        for arm in ARMS
        if ARMS[arm].dtype == dtype and not result_path(folder, arm, seed).exists()
    ]
    if not wanted:
        return
    from megatron_mmr1 import device

    device.prepare_process()
    from megatron_mmr1.backend import parallel
    from megatron_mmr1.backend.fp8_emulation import Fp8Emulation, decoder_in_fp8
    from megatron_mmr1.data.processor import PromptProcessor
    from megatron_mmr1.trainers import grpo
    from megatron_mmr1.trainers.setup import build_engine

    seed, arm = wanted[0]
    config = config_of(arm, seed, cold_starts[seed])
    parallel.initialize(config.parallel, config.seed)
    engine = build_engine(config, PromptProcessor(config.model.path))
    for seed, arm in wanted:
        config = config_of(arm, seed, cold_starts[seed])
        validate(config, 1)
        path = result_path(folder, arm, seed)
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True)
        (path.parent / "config.yaml").write_text("{}\n")  # the checkpoint copies it
        recipe = ARMS[arm].recipe
        emulated = decoder_in_fp8(Fp8Emulation("hybrid", recipe)) if recipe else nullcontext()
        with emulated:
            grpo.train(config, path.parent, engine)
        rows = read_metrics(path.parent)
        path.write_text(json.dumps({"arm": arm, "seed": seed, "rows": rows}), encoding="utf-8")
        for part in ("checkpoints", "hf", "tensorboard"):
            shutil.rmtree(path.parent / part, ignore_errors=True)
    parallel.finalize()

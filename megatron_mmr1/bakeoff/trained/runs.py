"""Stage 2 of the comparison of samplers: the real trainer, at equal total rollouts.

What is compared is written down here and in analysis.py, before any reported run: arms,
pools, learning rates, seeds, budget, measures.
Every arm's learning rate is chosen on seeds that are not reported. A process makes many runs, with
one engine, whose weights each run replaces; a run that was finished is not made again, so that the
whole may be interrupted at any time, and one that another process is making is passed over, so that
several may share the work. A run that crashed is recorded with its error, counted as no better than
its cold start, and not made again; the process stops, since its engine may be broken.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from megatron_mmr1.bakeoff.trained.pools import MIXES
from megatron_mmr1.cli import load_config
from megatron_mmr1.config.schema import GrpoConfig
from megatron_mmr1.config.validate import validate
from megatron_mmr1.observability.metrics import read_metrics

# 60 steps of 32 x 8 responses, if none is spent on anything but training.
NUM_STEPS, BATCH_SIZE, GROUP_SIZE = 60, 32, 8
BUDGET = NUM_STEPS * BATCH_SIZE * GROUP_SIZE
LEARNING_RATES = (5e-5, 1e-4, 2e-4)
TUNING_SEEDS = (100, 101)
REPORTED_SEEDS = (0, 1, 2, 3, 4, 5)
ARMS: Mapping[str, tuple[str, ...]] = {
    "uniform": ("sampler=uniform",),
    # Algorithm 1. One pass of the paper's 16 rollouts over 2,000 prompts would cost two budgets: 2
    # rollouts a prompt, once, are the least that says anything, and a quarter of the budget.
    "paper, 2 scoring rollouts, once": (
        "sampler=paper_table_6",
        "sampler.scoring_rollouts=2",
        "sampler.update_every=1000",
    ),
    "posterior": ("sampler=posterior",),
    "posterior, one global prior": ("sampler=posterior", "sampler.prior=global"),
    "posterior + dynamic sampling": ("sampler=posterior", "sampler.max_refills=8"),
}
# A row of its own, not one of the five: the sampler is told the task's level. It has the learning
# rate that was chosen for "posterior".
LEVEL_GIVEN = "posterior, level given"
# What the preset "posterior" was chosen from, on the tuning seeds and the skewed pool alone:
# lambda, power, score.
CANDIDATES: Mapping[str, tuple[float, float, str]] = {
    "lambda 0.5": (0.5, 3.0, "mixed"),
    "lambda 0.75": (0.75, 3.0, "mixed"),
    "lambda 1": (1.0, 3.0, "mixed"),
    "lambda 1, power 1": (1.0, 1.0, "mixed"),
    "lambda 1, calibrated": (1.0, 3.0, "calibrated"),
    "lambda 0.5, calibrated": (0.5, 3.0, "calibrated"),
}
CANDIDATES_POOL, CANDIDATES_LR = "skewed", 1e-4
_OVERRIDES: Mapping[str, tuple[str, ...]] = {
    **ARMS,
    LEVEL_GIVEN: ("sampler=posterior", "sampler.prior=category"),
    **{
        name: (
            "sampler=posterior",
            f"sampler.mixture_ratio={ratio}",
            f"sampler.power={power}",
            f"sampler.score={score}",
        )
        for name, (ratio, power, score) in CANDIDATES.items()
    },
}


@dataclass(frozen=True, slots=True)
class Run:
    """One training run."""

    pool: str
    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        arm = self.arm.replace(",", "").replace("+ ", "").replace(" ", "_")
        return f"{self.pool}-{arm}-lr{self.lr:g}-seed{self.seed}"


def candidate_runs() -> Iterator[Run]:
    """The runs that choose the preset's defaults."""
    for seed, name in product(TUNING_SEEDS, CANDIDATES):
        yield Run(CANDIDATES_POOL, name, CANDIDATES_LR, seed)


def tuning_runs() -> Iterator[Run]:
    """The runs that choose each arm's learning rate."""
    for seed, pool, lr, arm in product(TUNING_SEEDS, MIXES, LEARNING_RATES, ARMS):
        yield Run(pool, arm, lr, seed)


def reported_runs(chosen: Mapping[tuple[str, str], float]) -> Iterator[Run]:
    """The runs that are reported, seed by seed; `chosen` is the learning rate by (pool, arm)."""
    for seed, pool, arm in product(REPORTED_SEEDS, MIXES, (*ARMS, LEVEL_GIVEN)):
        yield Run(pool, arm, chosen[pool, arm], seed)


def config_of(run: Run, pools: Path, cold_start: Path) -> GrpoConfig:
    """Return a run's whole configuration."""
    config = load_config(
        GrpoConfig,
        "experiment",
        [
            *_OVERRIDES[run.arm],
            f"seed={run.seed}",
            f"model.path={cold_start}",
            f"data.train={pools / f'{run.pool}.parquet'}",
            f"data.heldout={pools / 'heldout.parquet'}",
            f"optimizer.lr={run.lr}",
            "optimizer.schedule=constant",
            "algorithm.kl_coefficient=0",
            f"num_steps={NUM_STEPS}",
            f"prompts_per_step={BATCH_SIZE}",
            f"rollout.group_size={GROUP_SIZE}",
            f"max_responses={BUDGET}",
            f"evaluation.every={20 if run in set(tuning_runs()) else 10}",
            "evaluation.samples_per_prompt=4",
            "checkpoint.every=0",
        ],
    )
    return replace(config, run=run.name)


class Bakeoff:
    """Makes runs that are not there yet, and keeps of each its metrics.

    Args:
        folder: of the pools and runs.
        cold_start: the Hugging Face folder that every run begins with.
    """

    def __init__(self, folder: Path, cold_start: Path) -> None:
        from megatron_mmr1 import device

        device.prepare_process()
        from megatron_mmr1.backend import parallel
        from megatron_mmr1.data.processor import PromptProcessor
        from megatron_mmr1.trainers.setup import build_engine

        self.folder, self._cold_start = folder, cold_start
        config = config_of(next(tuning_runs()), folder, cold_start)
        self._processor = PromptProcessor(config.model.path)
        parallel.initialize(config.parallel, config.seed)
        self._reward = config.reward
        self._engine = build_engine(config, self._processor)

    def build_pools(self) -> None:
        """Measure the candidates and write the pools, unless they are there.

        A second process waits for the first.
        """
        from megatron_mmr1.bakeoff.trained.pools import build_pools
        from megatron_mmr1.rewards import VerifierPool

        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            (self.folder / "pools.lock").open("w") as lock,
            VerifierPool(self._reward) as verifier,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)
            build_pools(self.folder, self._engine, verifier, self._processor)

    def make(self, run: Run) -> bool:
        """Make a run, unless its result is there; its weights and rollouts are not kept.

        Returns:
            False: another process is making it.

        Raises:
            RuntimeError: it crashed, and that is recorded.
            ValueError: its result is of another configuration, pool or cold start.
        """
        path = result_path(self.folder, run)
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent.parent / f"{run.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            made_of = self._made_of(run)
            if not path.exists():
                self._make(run, path, made_of)
            elif json.loads(path.read_text(encoding="utf-8"))["made_of"] != made_of:
                raise ValueError(
                    f"{path} was made with other settings, another pool or another cold start; "
                    "remove its folder, or use another --folder"
                )
        return True

    def _made_of(self, run: Run) -> dict[str, Any]:
        """Return what decides a run's result: its configuration, and hashes of what it reads."""
        config = config_of(run, self.folder, self._cold_start)
        files = (
            self.folder / f"{run.pool}.parquet",
            self.folder / "heldout.parquet",
            self._cold_start / "model.safetensors",
        )
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        settings = asdict(config)
        del settings["model"]["path"], settings["data"]["train"], settings["data"]["heldout"]
        return {"settings": settings, "files": hashes}

    def _make(self, run: Run, path: Path, made_of: dict[str, Any]) -> None:
        from megatron_mmr1.trainers import grpo

        run_dir = path.parent
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        (run_dir / "config.yaml").write_text("{}\n")  # the checkpoint copies it
        error = None
        try:
            config = config_of(run, self.folder, self._cold_start)
            validate(config, 1)
            grpo.train(config, run_dir, self._engine)
        except RuntimeError as fault:
            error = fault
        rows = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        words = f"{type(error).__name__}: {error}" if error else ""
        if error and not rows:
            raise error  # before it learned anything: no fault of the arm
        record = {"run": asdict(run), "error": words, "made_of": made_of, "rows": rows}
        partial = run_dir / "result.partial"
        partial.write_text(json.dumps(record), encoding="utf-8")
        for part in ("checkpoints", "hf", "rollouts", "tensorboard"):
            shutil.rmtree(run_dir / part, ignore_errors=True)
        partial.rename(path)
        if error:
            raise error


def result_path(folder: Path, run: Run) -> Path:
    """Where a finished run's record is."""
    return folder / "runs" / run.name / "result.json"


def read_results(folder: Path) -> list[dict]:
    """Return the records of all finished runs."""
    paths = sorted((folder / "runs").glob("*/result.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

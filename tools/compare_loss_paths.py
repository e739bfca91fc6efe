"""Replay a run's rollouts with the kernels' loss and with its definition: weights and times.

Usage: python tools/compare_loss_paths.py RUN_DIR [--steps 20] [--turns 2] [--json FILE]

Both replays start from the run's model and read its recorded rollouts; they differ only in the
loss: `backend.losses.grpo` (chunked head, closed gradients) or `parity.definition.definition_grpo`
(algorithms/ and autograd, all logits at once). Processes of their own, one after the other and in
turns; without evaluation, checkpoints before the last step, or an engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from megatron_mmr1.cli import run_main
from megatron_mmr1.observability.metrics import read_metrics

LOSSES = ("kernels", "definition")
# Relative norm of a tensor's difference after 20 steps. Gradients agree to some 1e-6, and AdamW
# divides a tiny gradient by its own size: its rounding comes back as large as the learning rate.
TOLERANCE = 1e-4


def main() -> None:
    """Replay, compare, print; exit status 1 where the weights differ by more than `TOLERANCE`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--replay", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--into", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.run_dir / "config.yaml").exists():
        raise ValueError(f"RUN_DIR={arguments.run_dir} has no config.yaml; give a run's folder")
    if arguments.replay:
        _replay(arguments.run_dir, arguments.steps, arguments.replay, arguments.into)
        return
    result = compare(arguments.run_dir, arguments.steps, arguments.turns)
    for name, value in result.items():
        print(f"{name:>40}: {value:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if not result["largest weight difference"] <= TOLERANCE:
        raise SystemExit(1)


def compare(run_dir: Path, num_steps: int, num_turns: int) -> dict[str, float]:
    """Replay both ways; weight differences are relative norms, the ratio one of medians."""
    with tempfile.TemporaryDirectory() as folder:
        seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
        for turn in range(num_turns):
            for name in LOSSES:
                command = [sys.executable, __file__, str(run_dir), "--steps", str(num_steps)]
                command += ["--replay", name, "--into", f"{folder}/{turn}_{name}"]
                with open(f"{folder}/log", "w") as log:
                    done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
                if done.returncode:
                    raise RuntimeError(Path(folder, "log").read_text()[-3000:])
                rows = read_metrics(_run_in(f"{folder}/{turn}_{name}"))
                seconds[name] += [row["time/train_s"] for row in rows[1:]]
        kernels, definition = (_run_in(f"{folder}/0_{name}") for name in LOSSES)
        losses = [
            abs(ours["loss"] - theirs["loss"])
            for ours, theirs in zip(read_metrics(kernels), read_metrics(definition), strict=True)
        ]
        differences = _weight_differences(kernels, definition)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "steps": float(num_steps),
        "largest weight difference": max(differences),
        "largest loss difference": max(losses),
        "median train_s, kernels": medians["kernels"],
        "median train_s, definition": medians["definition"],
        "kernels / definition": medians["kernels"] / medians["definition"],
    }


def _run_in(folder: str) -> Path:
    (run_dir,) = Path(folder).glob("*/*")
    return run_dir


def _weight_differences(ours: Path, theirs: Path) -> Sequence[float]:
    from safetensors.torch import load_file

    found, expected = (load_file(d / "hf" / "model.safetensors") for d in (ours, theirs))
    return [
        float((found[name].double() - tensor.double()).norm() / tensor.double().norm())
        for name, tensor in expected.items()
    ]


def _replay(run_dir: Path, num_steps: int, loss: str, output_dir: str) -> None:
    """Train on the recorded rollouts, in this process."""
    from omegaconf import OmegaConf

    from megatron_mmr1 import device, train

    device.prepare_process()
    from megatron_mmr1.backend import losses
    from megatron_mmr1.config.schema import GrpoConfig
    from megatron_mmr1.parity.definition import definition_grpo

    config = OmegaConf.merge(
        OmegaConf.structured(GrpoConfig),
        OmegaConf.load(run_dir / "config.yaml"),
        {
            "output_dir": output_dir,
            "run": loss,
            "resume": "never",
            "replay": str(run_dir),
            "num_steps": num_steps,
            "evaluation": {"every": 0},
            "checkpoint": {"every": 0},
            # Fewer steps than were recorded lower the learning rate sooner: other weights.
            "rollout": {"max_logprob_diff": 1e9},
        },
    )
    chosen = definition_grpo if loss == "definition" else losses.grpo
    with (
        patch.object(losses, "grpo", chosen),
        patch.object(train, "load_config", lambda *args: OmegaConf.to_object(config)),
    ):
        train.main()


if __name__ == "__main__":
    run_main(main)

"""What a number format does to log-probs and gradients, at equal weights on equal responses.

The weights are each seed's cold start, the responses those of the float32 run's first step. float32
is the reference; bfloat16 is what FP8 is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from megatron_mmr1 import device
from megatron_mmr1.bakeoff.formats.runs import ARMS, Arm, config_of, result_path

# Which of the roundings it is; beside the arms that are trained.
_FORWARD, _BACKWARD = "FP8 tensorwise, forward alone", "FP8 tensorwise, backward alone"
_PARTS = {_FORWARD: ("input", "weight"), _BACKWARD: ("gradient",)}
type _Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]
# Passes before the measured one: the delayed recipe scales by earlier products.
_WARM_UP_STEPS = 4


def measure(folder: Path, cold_starts: Sequence[Path]) -> dict[str, list[dict[str, float]]]:
    """Return, for each arm but float32, and for parts of one, each seed's errors.

    `logprob/...`: |log-prob - float32's| of the sampled response tokens. `gradient/relative`: norm
    of the difference over the norm, all parameters together; `gradient/cosine`. `decoder/...`
    likewise for the layers whose products are rounded.
    """
    device.prepare_process()
    from megatron_mmr1.backend import parallel

    parallel.initialize(config_of("float32", 0, cold_starts[0]).parallel, 0)
    found: dict[str, list[dict[str, float]]] = {
        arm: [] for arm in (*ARMS, *_PARTS) if arm != "float32"
    }
    for seed, cold_start in enumerate(cold_starts):
        outcomes = _outcomes(folder, seed, cold_start)
        for arm, rows in found.items():
            rows.append(_errors(outcomes[arm], outcomes["float32"]))
    parallel.finalize()
    return found


def _outcomes(folder: Path, seed: int, cold_start: Path) -> dict[str, _Outcome]:
    """Return each arm's log-probs [R] and gradients of the same step."""
    from megatron_mmr1.backend import losses
    from megatron_mmr1.backend.fp8_emulation import Fp8Emulation, decoder_in_fp8
    from megatron_mmr1.backend.policy import MegatronPolicy
    from megatron_mmr1.trainers.collect import collect
    from megatron_mmr1.trainers.grpo import _build, _training_sampling
    from megatron_mmr1.trainers.setup import build_parts

    config = config_of("float32", seed, cold_start)
    run = result_path(folder, "float32", seed).parent
    algorithm = replace(config.algorithm, kl_coefficient=0.0)
    config = replace(config, replay=str(run), num_steps=1, algorithm=algorithm)
    found: dict[str, _Outcome] = {}
    scratch = folder / "errors"
    scratch.mkdir(exist_ok=True)
    with build_parts(config, scratch) as parts:
        groups = collect(config, parts, _training_sampling(config, 1)).groups
        step, _ = _build(groups, parts)
        still = replace(config.optimizer, lr=1e-30, weight_decay=0.0, max_grad_norm=1e9)
        for name in (*ARMS, *_PARTS):
            arm = ARMS[name] if name in ARMS else Arm("bfloat16", "tensorwise")
            policy = MegatronPolicy(
                config.model,
                config.parallel,
                still,
                num_steps=_WARM_UP_STEPS + 1,
                precision=replace(config.precision, dtype=arm.dtype),
            )
            emulated = None
            if arm.recipe:
                parts_rounded = _PARTS.get(name, Fp8Emulation().parts)
                emulated = decoder_in_fp8(Fp8Emulation("hybrid", arm.recipe, parts_rounded))
            with emulated or nullcontext():
                for _ in range(_WARM_UP_STEPS + 1):
                    policy.train_step(step, losses.grpo(config.algorithm), parts.rule)
                logprobs = torch.cat(policy.logprobs(step, parts.rule))
            gradients = {n: t.float().clone() for n, t in policy.named_gradients()}
            found[name] = logprobs, gradients
    return found


def _errors(outcome: _Outcome, reference: _Outcome) -> dict[str, float]:
    difference = (outcome[0] - reference[0]).abs()
    errors = {
        "logprob/mean": float(difference.mean()),
        "logprob/p99": float(difference.quantile(0.99)),
        "logprob/max": float(difference.max()),
    }
    names = list(reference[1])
    rounded = [n for n in names if ".layers." in n and n.endswith("_proj.weight")]
    for what, chosen in (("gradient", names), ("decoder", rounded)):
        ours, theirs = (
            torch.cat([gradients[n].flatten() for n in chosen]).double()
            for gradients in (outcome[1], reference[1])
        )
        errors[f"{what}/relative"] = float((ours - theirs).norm() / theirs.norm())
        errors[f"{what}/cosine"] = float(torch.dot(ours, theirs) / ours.norm() / theirs.norm())
    return errors

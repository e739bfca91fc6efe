"""Real GRPO steps, measured in this process and, under torchrun, in all the others alike.

Every part is training's own: trainers/setup.py builds them, trainers/grpo.py takes the steps. Left
out are evaluation, checkpoints and records.

Tokens of a step: prompt and response tokens of all sequences that are trained on, each sequence
with its prompt. Generated tokens: of all responses, those of discarded groups among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mmr1.backend import batching, parallel
from megatron_mmr1.config.schema import CheckpointConfig, EvaluationConfig, GrpoConfig
from megatron_mmr1.convert import read_config
from megatron_mmr1.throughput import flops, hardware
from megatron_mmr1.throughput.memory import StepMemory
from megatron_mmr1.trainers import grpo
from megatron_mmr1.trainers.collect import Collected
from megatron_mmr1.trainers.setup import Parts, build_parts


def for_benchmark(config: GrpoConfig, num_steps: int) -> GrpoConfig:
    """Return the config of so many steps and nothing beside them."""
    return replace(
        config,
        num_steps=num_steps,
        max_responses=0,
        evaluation=EvaluationConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
    )


def measure(
    config: GrpoConfig,
    run_dir: Path,
    num_warmup: int,
    num_steps: int,
    on_step: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """Take steps; return what was measured of each, the same on every rank.

    Args:
        run_dir: for `bad_rows.jsonl`, should there be any.
        num_warmup: steps before those that are measured.
        on_step: told in words of every step.
    """
    config = for_benchmark(config, num_warmup + num_steps)
    peak = hardware.peak(config.precision.dtype, config.precision.fp8)
    steps, memory = [], StepMemory()
    with build_parts(config, run_dir) as parts:
        if torch.cuda.is_available():
            parts.timers.waits = memory.read_gpu
        parts.sync.push(version=0)
        num_responses = 0
        for number in range(1, num_warmup + num_steps + 1):
            parts.timers.pop()
            memory.pop()
            with parts.timers.phase("step"):
                collected, metrics = grpo.one_step(number, num_responses, config, parts)
            num_responses = int(metrics["rollout/responses_total"])
            metrics |= parts.timers.pop()
            found = _step(config, parts, collected, metrics, memory.pop())
            is_warm = number > num_warmup
            name = f"step {number - num_warmup}" if is_warm else f"warm-up {number}"
            of = num_steps if is_warm else num_warmup
            on_step(f"{name}/{of}: {found['seconds']['step']:.2f} s, {found['tokens']:,} tokens")
            if is_warm:
                steps.append(found)
    # Where it is measured, what else the machine does meets it too: the better of before and after.
    after = hardware.peak(config.precision.dtype, config.precision.fp8)
    peaks = parallel.gather_over_world([max(peak.flops, after.flops)])
    return {
        "peak": {"flops": sum(peaks) / len(peaks), "source": peak.source},
        "formula": flops.formula(read_config(config.model.path), not config.model.freeze_vision),
        "steps": steps,
    }


def _step(
    config: GrpoConfig,
    parts: Parts,
    collected: Collected,
    metrics: dict[str, float],
    memory_bytes: int,
) -> dict[str, Any]:
    """One step as the record has it: seconds of all ranks, tokens, FLOPs, memory."""
    seconds = {
        key.removeprefix("time/").removesuffix("_s"): value
        for key, value in metrics.items()
        if key.startswith("time/")
    }
    everyone = parallel.gather_over_world([(seconds, memory_bytes)])
    phases = sorted({name for of_rank, _ in everyone for name in of_rank})
    sizes = [batching.size_of(s) for s in batching.samples_of_groups(collected.groups)]
    found = flops.step_flops(
        sizes,
        read_config(config.model.path),
        config.algorithm,
        not config.model.freeze_vision,
    )
    return {
        # A phase that a rank does not have takes it no time.
        "seconds": {
            name: sum(of_rank.get(name, 0.0) for of_rank, _ in everyone) / len(everyone)
            for name in phases
        },
        "seconds_of_ranks": [of_rank for of_rank, _ in everyone],
        "tokens": sum(size.num_tokens for size in sizes),
        "prompt_tokens": sum(size.num_prompt_tokens for size in sizes),
        "response_tokens": sum(size.num_response_tokens for size in sizes),
        "generated_tokens": _generated(collected),
        "sequences": len(sizes),
        "longest_sequence": max(size.num_tokens for size in sizes),
        "flops": {name: asdict(parts_of) for name, parts_of in found.items()},
        "memory_bytes": [memory for _, memory in everyone],
        "packing_waste": metrics["packing/waste"],
        "micro_batches": metrics["packing/micro_batches"],
        "imbalance": metrics["packing/imbalance"],
    }


def _generated(collected: Collected) -> int:
    return sum(
        len(rollout.token_ids)
        for group in [*collected.groups, *collected.discarded]
        for rollout in group.group.rollouts
    )

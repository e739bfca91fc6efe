"""Our whole step of the embedded task: `python -m megatron_mmr1.throughput.trl.ours_whole FOLDER`.

Draw, generate by vLLM, judge, train, update the engine's weights: trainers/grpo.py's step. Settings
are those of `experiment=digits` but for what TRL's defaults lack: no KL term, uniform draws.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megatron_mmr1.cli import load_config
from megatron_mmr1.config.schema import GrpoConfig
from megatron_mmr1.throughput.trl import turn
from megatron_mmr1.throughput.trl.cases import digits


def main(folder: str) -> None:
    """Take steps as long as they are asked for."""
    from megatron_mmr1 import device

    device.prepare_process()
    from megatron_mmr1.backend import batching, parallel
    from megatron_mmr1.trainers import grpo
    from megatron_mmr1.trainers.setup import build_parts

    case, data = digits(Path(folder)), Path(folder) / "digits"
    config = load_config(
        GrpoConfig,
        "experiment",
        [
            "experiment=digits",
            f"model.path={case.model}",
            f"data.train={data / 'train.parquet'}",
            f"data.heldout={data / 'heldout.parquet'}",
            f"prompts_per_step={len(case.questions)}",
            "num_steps=10000",
            "sampler=uniform",
            "optimizer.lr=1e-6",
            "optimizer.schedule=constant",
            "algorithm.kl_coefficient=0",
            "evaluation.every=0",
            "checkpoint.every=0",
        ],
    )
    parallel.initialize(config.parallel, config.seed)
    with build_parts(config, Path(folder)) as parts:
        parts.sync.push(version=0)
        step = num_responses = 0
        while turn.wait():
            step += 1
            start, start_cpu = time.perf_counter(), time.process_time()
            collected, metrics = grpo.one_step(step, num_responses, config, parts)
            measured = {
                "step_s": time.perf_counter() - start,
                "step_cpu_s": time.process_time() - start_cpu,
            }
            num_responses = int(metrics["rollout/responses_total"])
            sizes = map(batching.size_of, batching.samples_of_groups(collected.groups))
            times = {k: v for k, v in metrics.items() if k.startswith("time/")}
            measured["tokens"] = sum(size.num_tokens for size in sizes)
            turn.report(measured | times | parts.timers.pop())
    parallel.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])

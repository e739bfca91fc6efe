"""Plans all presets of MMR1, and negative controls, for test_memory.py: prints one line of JSON."""

import json
import os
from dataclasses import replace
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from megatron_mmr1 import device

device.prepare_process()

from megatron_mmr1 import cli
from megatron_mmr1.backend.footprint import footprint, stage_ranks
from megatron_mmr1.config.schema import (
    GrpoConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    SftConfig,
)
from megatron_mmr1.planning.memory import num_gpus, plan_memory
from megatron_mmr1.planning.published import SIZES, model_config
from megatron_mmr1.planning.table import as_text


def load(name: str, *overrides: str) -> GrpoConfig | SftConfig:
    if "_sft_" in name:
        return cli.load_config(SftConfig, "sft_experiment", [f"experiment={name}", *overrides])
    arguments = [f"experiment={name}", "data.heldout=unused", *overrides]
    return cli.load_config(GrpoConfig, "experiment", arguments)


def planned(config: GrpoConfig | SftConfig) -> dict[str, Any]:
    plans = plan_memory(config, model_config(config.model))
    layout = config.parallel
    return {
        "text": as_text(config, plans),
        "cpu_offload": config.optimizer.cpu_offload,
        "takes_turns": isinstance(config, GrpoConfig) and config.rollout.takes_turns,
        "sharing_ranks": num_gpus(config) // (layout.tp_size * layout.pp_size),
        "ranks": [
            {
                "fits": plan.fits,
                "num_parameters": plan.counted.num_parameters,
                "weights": plan.counted.weights,
                "gradients": plan.counted.gradients,
                "states": plan.counted.states,
                "host_bytes": plan.host_bytes,
            }
            for plan in plans
        ],
    }


def stages(name: str) -> dict[str, Any]:
    """A pipeline of four, with two replicas: what each stage holds."""
    layout = ParallelConfig(pp_size=4)
    hf_config = model_config(ModelConfig("nowhere", preset=name))
    ranks = stage_ranks(layout, 8)
    held = [
        footprint(
            hf_config,
            layout,
            PrecisionConfig("bfloat16"),
            OptimizerConfig(lr=1e-6),
            world_size=8,
            rank=rank,
        )
        for rank in ranks
    ]
    return {
        "ranks": ranks,
        "num_parameters": [stage.num_parameters for stage in held],
        "has_tower": [stage.has_tower for stage in held],
    }


def main() -> None:
    names = [name for group in ("sft_experiment", "experiment") for name in cli.experiments(group)]
    found = {name: planned(load(name)) for name in names if name.startswith("mmr1_")}
    rl_32b = "mmr1_32b_vas_8xh100"
    found["without offload"] = planned(load(rl_32b, "optimizer.cpu_offload=0"))
    found["on too few GPUs"] = planned(load("mmr1_7b_vas_8xh100", "parallel=tp1"))
    kept = load("mmr1_7b_vas_8xh100")
    found["tower kept"] = planned(
        replace(kept, parallel=replace(kept.parallel, recompute_vision=False))
    )
    found |= {name: stages(name) for name in SIZES}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

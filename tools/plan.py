"""Does an experiment fit into its GPUs? Memory of a rank, planned on a machine without a GPU.

    python tools/plan.py experiment=mmr1_7b_vas_64xh100 parallel=tp4_sp     # train's experiments
    python tools/plan.py sft experiment=mmr1_32b_sft_8xh100                 # sft's
    python tools/plan.py all                                                # every one of MMR1's

Settings follow as for `train` and `sft`; --help lists them. Weights, gradients, optimizer states
and the reference copy are counted on the real Megatron model, built without memory at the
experiment's layout as one rank of each pipeline stage. Activations and the engine are estimates by
the formulas in megatron_mmr1/planning/; neither was measured on a GPU. Exit status 1 if something
does not fit.
"""

from __future__ import annotations

import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same plan with and without a GPU

from megatron_mmr1.cli import experiments, load_config, run_main
from megatron_mmr1.config.schema import GrpoConfig, SftConfig


def main() -> None:
    """Compose, count, print."""
    arguments = sys.argv[1:]
    if arguments == ["all"]:
        configs = [
            load_config(schema, group, [f"experiment={name}", *needed])
            for schema, group, needed in (
                (SftConfig, "sft_experiment", []),
                (GrpoConfig, "experiment", ["data.heldout=unused"]),
            )
            for name in experiments(group)
            if name.startswith("mmr1_")
        ]
    elif arguments[:1] == ["sft"]:
        configs = [load_config(SftConfig, "sft_experiment", arguments[1:])]
    else:
        # Plans read no data: what the experiment leaves open may stay open.
        configs = [load_config(GrpoConfig, "experiment", ["data.heldout=unused", *arguments])]

    from megatron_mmr1 import device

    device.prepare_process()
    from megatron_mmr1.planning.memory import plan_memory
    from megatron_mmr1.planning.published import model_config
    from megatron_mmr1.planning.table import as_text

    everything_fits = True
    for config in configs:
        plans = plan_memory(config, model_config(config.model))
        print(as_text(config, plans), flush=True)
        everything_fits &= all(plan.fits for plan in plans)
    raise SystemExit(0 if everything_fits else 1)


if __name__ == "__main__":
    run_main(main)

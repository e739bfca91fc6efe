"""GRPO with Variance-Aware Sampling:
`python -m megatron_mmr1.train [experiment=NAME] [key=value ...]`.

Alone or under torchrun, at any parallel layout (parallel.*). All that can be checked is checked
before a process group or an engine starts. Heavy imports come after the checks.
"""

from __future__ import annotations

import os
import sys

from megatron_mmr1.cli import load_config, run_main
from megatron_mmr1.config.run_dir import new_run_name, open_run_dir
from megatron_mmr1.config.schema import GrpoConfig
from megatron_mmr1.config.validate import validate


def main() -> None:
    """Check, open the run folder on rank 0, train, and write the report."""
    config = load_config(GrpoConfig, "experiment", sys.argv[1:])
    # torchrun says how many processes there are, on how many nodes.
    world_size, num_nodes = (
        int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "GROUP_WORLD_SIZE")
    )
    validate(config, world_size, num_nodes)
    is_main, run_dir = os.environ.get("RANK", "0") == "0", None
    if is_main:
        run_dir = open_run_dir(config, config.run or new_run_name())
        print(f"run folder: {run_dir}; loading Megatron-Core and vLLM takes a moment", flush=True)

    from megatron_mmr1 import device

    device.prepare_process()
    from megatron_mmr1.backend import parallel
    from megatron_mmr1.launch.nodes import check_nodes
    from megatron_mmr1.launch.rendezvous import meet
    from megatron_mmr1.observability.report import write_report
    from megatron_mmr1.observability.summary import print_summary
    from megatron_mmr1.trainers import grpo

    meeting = meet()
    run_dir = check_nodes(meeting, config, run_dir)
    parallel.initialize(config.parallel, config.seed, meeting)
    grpo.train(config, run_dir)
    if is_main:
        print_summary(run_dir, write_report(run_dir))
    parallel.finalize()


if __name__ == "__main__":
    run_main(main)

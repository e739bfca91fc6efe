"""The supervised cold start: `python -m megatron_mmr1.sft [experiment=NAME] [key=value ...]`;
torchrun likewise.
"""

from __future__ import annotations

import os
import sys

from megatron_mmr1.cli import load_config, run_main
from megatron_mmr1.config.run_dir import new_run_name, open_run_dir
from megatron_mmr1.config.schema import SftConfig
from megatron_mmr1.config.validate import validate_sft


def main() -> None:
    """Check, open the run folder on rank 0, train, and say where the model is."""
    config = load_config(SftConfig, "sft_experiment", sys.argv[1:])
    # torchrun says how many processes there are, on how many nodes.
    world_size, num_nodes = (
        int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "GROUP_WORLD_SIZE")
    )
    validate_sft(config, world_size, num_nodes)
    is_main = os.environ.get("RANK", "0") == "0"
    run_dir = open_run_dir(config, config.run or new_run_name()) if is_main else None
    if is_main:
        print(f"run folder: {run_dir}; loading Megatron-Core takes a moment", flush=True)

    from megatron_mmr1 import device

    device.prepare_process()
    from megatron_mmr1.backend import parallel
    from megatron_mmr1.launch.nodes import check_nodes
    from megatron_mmr1.launch.rendezvous import meet
    from megatron_mmr1.observability.report import write_report
    from megatron_mmr1.trainers import sft

    meeting = meet()
    run_dir = check_nodes(meeting, config, run_dir)
    parallel.initialize(config.parallel, config.seed, meeting)
    folder = sft.train(config, run_dir)
    if is_main:
        print(f"model: {folder}\nreport: {write_report(run_dir)}")
    parallel.finalize()


if __name__ == "__main__":
    run_main(main)

"""Refuse settings before any node starts: what `train` and `sft` would refuse there, at once.

    python tools/check_settings.py train|sft NODES RANKS_PER_NODE run=NAME [key=value ...]

Where restarts are automatic a slip would otherwise cost them all. Makes the run folder, as the run
would. Exit status 2 and one line if something is wrong. Loads no torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package may not be installed

from megatron_mmr1.cli import load_config, run_main
from megatron_mmr1.config.run_dir import open_run_dir
from megatron_mmr1.config.schema import GrpoConfig, SftConfig
from megatron_mmr1.config.validate import validate, validate_sft


def main() -> None:
    """Compose, validate, and compare with what the run folder holds."""
    entry, num_nodes, ranks_per_node = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    world_size, settings = num_nodes * ranks_per_node, sys.argv[4:]
    if entry == "train":
        config = load_config(GrpoConfig, "experiment", settings)
        validate(config, world_size, num_nodes)
    elif entry == "sft":
        config = load_config(SftConfig, "sft_experiment", settings)
        validate_sft(config, world_size, num_nodes)
    else:
        raise ValueError(f"ENTRY={entry} is unknown; use train or sft")
    if config.run is None:
        raise ValueError("run=null: a run that is to go on needs a name; give run=NAME")
    open_run_dir(config, config.run)


if __name__ == "__main__":
    run_main(main)

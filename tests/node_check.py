"""One process of a run, as far as the checks between nodes go: it meets the others, checks, and
says which run folder it got. Loads no Megatron. Usage: node_check.py JOIN_TIMEOUT_S [key=value ...]
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

from megatron_mmr1.cli import load_config, run_main
from megatron_mmr1.config.schema import GrpoConfig


def main() -> None:
    from megatron_mmr1.launch.nodes import check_nodes
    from megatron_mmr1.launch.rendezvous import meet

    config = load_config(GrpoConfig, "experiment", sys.argv[2:])
    meeting = meet(timedelta(seconds=float(sys.argv[1])))
    run_dir = None
    if meeting.rank == 0:
        run_dir = Path(config.output_dir) / "run"
        run_dir.mkdir(parents=True, exist_ok=True)
    print("run folder:", check_nodes(meeting, config, run_dir, folder_timeout_s=1.0))


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    run_main(main)

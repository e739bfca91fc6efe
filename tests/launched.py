"""Cases that run in one launch of several processes: what the scripts and their tests share.

A script has functions named `case_*`. Every one runs on all ranks, at layouts that it lays itself;
a folder gets one file a case: empty when it held, else the traceback of the first rank on which it
didn't. One launch serves all: importing Megatron-Core takes longer than the checks.
"""

import ast
import contextlib
import faulthandler
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LIMIT_S = 900


def case_names(script: Path) -> list[str]:
    """The cases of a script, without importing it."""
    functions = [n for n in ast.parse(script.read_text()).body if isinstance(n, ast.FunctionDef)]
    return [f.name.removeprefix("case_") for f in functions if f.name.startswith("case_")]


def launch(script: Path, folder: Path, num_ranks: int) -> None:
    """Run all cases of a script; its output goes to the folder's `log`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    with (folder / "log").open("w") as log:
        subprocess.run(
            [sys.executable, *launcher, str(script), str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(script.parents[1])},
        )


def assert_held(folder: Path, case: str) -> None:
    report = folder / f"{case}.txt"
    assert report.exists(), (folder / "log").read_text()[-3000:]
    assert report.read_text() == ""


def run_cases(namespace: Mapping[str, Any], folder: Path, only: list[str]) -> None:
    """Run the cases of a script's globals() on this rank."""
    import torch.distributed as dist

    from megatron_mmr1.backend import parallel
    from megatron_mmr1.config.schema import ParallelConfig

    # A rank that waits for ever says where, in the log, and ends the launch.
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    parallel.initialize(ParallelConfig(), seed=0)
    cases: dict[str, Callable[[], None]] = {
        n.removeprefix("case_"): f for n, f in namespace.items() if n.startswith("case_")
    }
    for name in only or cases:
        try:
            cases[name]()
        except Exception:
            fault = f"rank {dist.get_rank()}: {traceback.format_exc()}"
            print(fault, flush=True)
            # The first fault counts: others may come of it.
            with contextlib.suppress(FileExistsError), (folder / f"{name}.txt").open("x") as file:
                file.write(fault)
            os._exit(1)  # no collective: the others may be waiting in one
        parallel.barrier()
        if parallel.is_main():
            (folder / f"{name}.txt").touch()
    parallel.finalize()

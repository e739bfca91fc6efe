"""Compare samplers at equal numbers of rollouts: on synthetic prompts, and with the real trainer.

Usage: python tools/compare_samplers.py synthetic [--seeds 20] [--out examples/samplers]
       python tools/compare_samplers.py trained --cold-start DIR [--minutes N] [--out ...]

`synthetic` writes synthetic.json, about three minutes on one core. `trained` makes the runs of
stage 2 that are not there yet, in outputs/bakeoff, hours of them; interrupt it at any time, or give
it so many minutes, and start it again; or start it twice to use two cores. When the tuning runs are
there it writes what it has of the reported ones to trained.json. Each writes index.html and
README.md anew from what is in the folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_mmr1.bakeoff import page
from megatron_mmr1.bakeoff.synthetic import tables
from megatron_mmr1.bakeoff.synthetic.comparison import compare
from megatron_mmr1.bakeoff.trained import analysis, runs


def main() -> None:
    """Run one stage and write what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("synthetic")
    command.add_argument("--seeds", type=int, default=20)
    command.add_argument("--out", type=Path, default=Path("examples/samplers"))
    command = commands.add_parser("trained")
    command.add_argument("--cold-start", type=Path, required=True)
    command.add_argument("--folder", type=Path, default=Path("outputs/bakeoff"))
    command.add_argument("--minutes", type=float, default=float("inf"))
    command.add_argument("--out", type=Path, default=Path("examples/samplers"))
    arguments = parser.parse_args()
    start, start_cpu = time.perf_counter(), time.process_time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.command == "synthetic":
        _synthetic(arguments.seeds, arguments.out)
    elif not _trained(arguments.cold_start, arguments.folder, arguments.minutes, arguments.out):
        print("runs are missing: start it again")
        return
    page.write(arguments.out)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    print(f"{seconds:.0f} s, {cpu_s:.0f} s of one core; see {arguments.out}")


def _synthetic(num_seeds: int, out: Path) -> None:
    comparison = compare(num_seeds, on_done=_say)
    comparison.save(out / "synthetic.json")
    print(tables.table(comparison, next(iter(comparison.values))))


def _trained(cold_start: Path, folder: Path, minutes: float, out: Path) -> bool:
    """Make runs until time is up; write the reported ones unless tuning is unfinished."""
    end = time.monotonic() + 60 * minutes
    bakeoff = runs.Bakeoff(folder, cold_start)
    bakeoff.build_pools()
    if not _make(bakeoff, [*runs.candidate_runs(), *runs.tuning_runs()], end):
        return False
    chosen = analysis.chosen_learning_rates(_results(folder))
    _make(bakeoff, list(runs.reported_runs(chosen)), end)
    analysis.save_results(out / "trained.json", _results(folder))
    return True


def _make(bakeoff: runs.Bakeoff, wanted: Sequence[runs.Run], end: float) -> bool:
    """Make what is missing until time is up; say whether all are there."""
    pending = list(wanted)
    while pending:
        elsewhere = []
        for run in pending:
            if time.monotonic() > end:
                return False
            if bakeoff.make(run):
                num_left = sum(not runs.result_path(bakeoff.folder, r).exists() for r in wanted)
                _say(f"{run.name}; {num_left} of {len(wanted)} are left")
            else:
                elsewhere.append(run)
        pending = elsewhere
        time.sleep(5.0 * bool(pending))  # another process is at the last ones
    return True


def _results(folder: Path) -> list[analysis.Result]:
    return [analysis.Result.of_record(record) for record in runs.read_results(folder)]


def _say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    main()

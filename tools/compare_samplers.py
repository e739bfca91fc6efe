"""Compare samplers at equal numbers of rollouts: on synthetic prompts, and with the real trainer.

Usage: python tools/compare_samplers.py synthetic [--seeds 20] [--out examples/samplers]
       python tools/compare_samplers.py tune [--seeds 6] [--out examples/samplers]
       python tools/compare_samplers.py trained --cold-start DIR [--minutes N] [--out ...]

`synthetic` writes synthetic.json, index.html and README.md, about three minutes on one core.
`tune` searches the defaults of the preset "posterior" on other seeds and writes tuning.json, which
the next `synthetic` shows. `trained` makes the runs of stage 2 that are not there yet, in
outputs/bakeoff, hours of them; interrupt it at any time, or give it so many minutes, and start it
again. When the reported seeds of all arms are there it prints their table and writes trained.html.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from megatron_mmr1.bakeoff import page, tables
from megatron_mmr1.bakeoff.comparison import compare
from megatron_mmr1.bakeoff.tuning import Tuned, load_tuned, tune
from megatron_mmr1.observability import template


def main() -> None:
    """Run one stage and write what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, num_seeds in (("synthetic", 20), ("tune", 6)):
        command = commands.add_parser(name)
        command.add_argument("--seeds", type=int, default=num_seeds)
        command.add_argument("--out", type=Path, default=Path("examples/samplers"))
    command = commands.add_parser("trained")
    command.add_argument("--cold-start", type=Path, required=True)
    command.add_argument("--folder", type=Path, default=Path("outputs/bakeoff"))
    command.add_argument("--minutes", type=float, default=float("inf"))
    command.add_argument("--out", type=Path, default=Path("examples/samplers"))
    arguments = parser.parse_args()
    start, start_cpu = time.perf_counter(), time.process_time()
    if arguments.command == "synthetic":
        _synthetic(arguments.seeds, arguments.out)
    elif arguments.command == "tune":
        _tune(arguments.seeds, arguments.out)
    else:
        _trained(arguments.cold_start, arguments.folder, arguments.minutes, arguments.out)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    print(f"{seconds:.0f} s, {cpu_s:.0f} s of one core; see {arguments.out}")


def _synthetic(num_seeds: int, out: Path) -> None:
    comparison = compare(num_seeds, on_done=_say)
    comparison.save(out / "synthetic.json")
    path = out / "tuning.json"
    tuned: Tuned | None = load_tuned(path) if path.exists() else None
    (out / "index.html").write_text(page.index(comparison, tuned), encoding="utf-8")
    (out / "README.md").write_text(tables.readme(comparison, tuned), encoding="utf-8")
    print(tables.table(comparison, next(iter(comparison.values))))


def _tune(num_seeds: int, out: Path) -> None:
    tuned = tune(num_seeds, num_report_seeds=num_seeds, on_done=_say)
    out.mkdir(parents=True, exist_ok=True)
    words = json.dumps(dataclasses.asdict(tuned), indent=1)
    (out / "tuning.json").write_text(words + "\n", encoding="utf-8")
    print(tables.tuning_words(tuned), tables.tuning_table(tuned), sep="\n\n")


def _trained(cold_start: Path, folder: Path, minutes: float, out: Path) -> None:
    from megatron_mmr1.bakeoff import trained, trained_analysis, trained_page

    bakeoff = trained.Bakeoff(folder, cold_start)
    bakeoff.build_pools()
    end = time.monotonic() + 60 * minutes

    def make(runs: list[trained.Run]) -> bool:
        """Make runs until time is up; say whether all are there."""
        pending = runs
        while pending:
            elsewhere = []
            for run in pending:
                if time.monotonic() > end:
                    return False
                if bakeoff.make(run):
                    num_left = sum(not trained.result_path(folder, r).exists() for r in runs)
                    print(f"{run.name}; {num_left} of {len(runs)} are left", flush=True)
                else:
                    elsewhere.append(run)
            pending = elsewhere
            time.sleep(5.0 * bool(pending))
        return True

    if not make(list(trained.tuning_runs())):
        return
    results = [trained_analysis.Result.of_record(r) for r in trained.read_results(folder)]
    reported = list(trained.reported_runs(trained_analysis.chosen_learning_rates(results)))
    make(reported)
    results = [trained_analysis.Result.of_record(r) for r in trained.read_results(folder)]
    axis_X = np.linspace(0, trained.BUDGET, trained_analysis.NUM_POINTS)
    rows = trained_analysis.compare(results, axis_X)
    num_finished = sum(trained.result_path(folder, run).exists() for run in reported)
    words = trained_page.words(num_finished, len(reported))
    title = "Samplers compared with the real trainer"
    out.mkdir(parents=True, exist_ok=True)
    (out / "trained.html").write_text(
        template.page(title, f"<h1>{title}</h1>{trained_page.html(rows, axis_X, words)}"),
        encoding="utf-8",
    )
    print(trained_page.markdown(rows))


def _say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    main()

"""Compare samplers at equal numbers of rollouts, on synthetic prompts with known pass rates.

Usage: python tools/compare_samplers.py synthetic [--seeds 20] [--out examples/samplers]
       python tools/compare_samplers.py tune [--seeds 6] [--out examples/samplers]

`synthetic` writes synthetic.json, index.html and README.md, about three minutes on one core.
`tune` searches the defaults of the preset "posterior" on other seeds and writes tuning.json, which
the next `synthetic` shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from megatron_mmr1.bakeoff import page, tables
from megatron_mmr1.bakeoff.comparison import compare
from megatron_mmr1.bakeoff.tuning import Tuned, load_tuned, tune


def main() -> None:
    """Run one stage and write what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, num_seeds in (("synthetic", 20), ("tune", 6)):
        command = commands.add_parser(name)
        command.add_argument("--seeds", type=int, default=num_seeds)
        command.add_argument("--out", type=Path, default=Path("examples/samplers"))
    arguments = parser.parse_args()
    start, start_cpu = time.perf_counter(), time.process_time()
    if arguments.command == "synthetic":
        _synthetic(arguments.seeds, arguments.out)
    else:
        _tune(arguments.seeds, arguments.out)
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


def _say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    main()

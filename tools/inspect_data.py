"""Inspect a data file before training: sizes, bad rows, duplicates, benchmark questions in it.

    python tools/inspect_data.py data/train.parquet --model DIR
    python tools/inspect_data.py sft.json --limit 20000 --benchmark mathvista=testmini.parquet

PATH is what training reads: RL data or cold-start conversations as .parquet, .json, .jsonl, or a
hub id. A benchmark is NAME=FILE, with one of the five names. Prints a table; writes index.html,
bad_rows.jsonl, duplicates.jsonl and contamination.jsonl. docs/data.md explains them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_mmr1.cli import run_main


def main() -> None:
    """Read, count, print and write."""
    args = _arguments()
    from rich.console import Console

    from megatron_mmr1.data.dataset import Keys
    from megatron_mmr1.inspection import output
    from megatron_mmr1.inspection.contamination import BenchmarkIndex
    from megatron_mmr1.inspection.findings import inspect, numbers_of
    from megatron_mmr1.inspection.rows import Checks, Rows
    from megatron_mmr1.inspection.samples import samples_of
    from megatron_mmr1.observability.progress import Progress

    console = Console()
    keys = Keys(args.problem_key, args.answer_key, args.images_key)
    checks = Checks(keys, args.system_prompt, args.max_tokens)
    rows = Rows(args.path, args.kind, checks, _processor(args))
    index = BenchmarkIndex()
    for name, file in args.benchmark:
        _read_benchmark(index, name, file, console)
    numbers = numbers_of(len(rows), args.limit, args.seed)
    brief = not console.is_terminal
    with Progress(max(len(numbers), 1), 0, "rows", {}, console, is_brief=brief) as progress:
        found = inspect(rows, index, numbers, lambda done, total: progress.update(done, {}))
    samples = samples_of(rows, numbers, args.samples, args.seed)
    folder = args.output or Path("outputs") / "inspection" / Path(args.path).stem
    console.print(output.table(found))
    console.print(f"page and lists: {output.write(folder, found, rows, samples)}", soft_wrap=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("path", help="a .parquet, .json or .jsonl file, or OWNER/NAME:SPLIT of the hub")
    add("--kind", choices=("rl", "sft"), help="questions or conversations; default: find out")
    add("--model", help="Hugging Face folder: counts tokens, and checks what needs a tokenizer")
    add("--benchmark", type=_benchmark, action="append", default=[], metavar="NAME=FILE")
    add("--output", type=Path, help="folder to write to; default: outputs/inspection/NAME")
    add("--limit", type=int, default=0, help="rows to look at, drawn with --seed; default: all")
    add("--samples", type=int, default=8, help="rows to show on the page")
    add("--seed", type=int, default=0)
    add("--max-tokens", type=int, default=2048, help="as data.max_prompt_tokens, or as the cold"
        " start's max_tokens_per_microbatch; with --model")  # fmt: skip
    add("--min-pixels", type=int, default=0, help="as data.min_pixels; with --model")
    add("--max-pixels", type=int, default=1_048_576, help="as data.max_pixels; with --model")
    add("--system-prompt", default="", help="as data.system_prompt; with --model")
    for key in ("problem", "answer", "images"):
        add(f"--{key}-key", default=key, help=f"as data.{key}_key")
    return parser.parse_args()


def _benchmark(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    if not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, as in mathvista=FILE.parquet")
    return name, file


def _processor(args: argparse.Namespace) -> Any:
    if not args.model:
        return None
    from megatron_mmr1.data.processor import PromptProcessor

    return PromptProcessor(args.model, args.min_pixels, args.max_pixels)


def _read_benchmark(index: Any, name: str, file: str, console: Any) -> None:
    from megatron_mmr1.evaluation.records import QuestionReader

    reader: Any = QuestionReader(name, file)  # pyright: ignore[reportArgumentType]
    with console.status(f"reading {name}"):
        index.read(name, reader)
    count, num_bad = index.sizes[name]
    console.print(f"{name}: {count:,} questions, {num_bad:,} bad ones left out", markup=False)


if __name__ == "__main__":
    run_main(main)

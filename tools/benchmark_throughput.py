"""How fast is training? Real GRPO steps of an experiment: tokens/s/GPU, MFU, seconds a phase.

    python tools/benchmark_throughput.py experiment=digits [key=value ...]      # one process
    torchrun --nproc-per-node 8 tools/benchmark_throughput.py experiment=...    # this layout
    python tools/benchmark_throughput.py --processes 2 --layout "" --layout "parallel.tp_size=2"
    python tools/benchmark_throughput.py --weak 1 2 --strong 1 2                # scaling
    python tools/benchmark_throughput.py --fixed 512 1024 --image 448 448       # equal lengths

On a CPU or on CUDA. Every layout and number of processes is a launch of its own on this machine;
what is refused is reported and passed over. Several machines: torchrun on each of them, one layout
at a time. Writes throughput.json and index.html.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from megatron_mmr1.cli import load_config, run_main
from megatron_mmr1.config.schema import GrpoConfig
from megatron_mmr1.config.validate import validate
from megatron_mmr1.throughput.launch import Point, points_of, run_points


def main() -> None:
    """Measure here, or launch what measures; print the tables and write both files."""
    options = _options()
    if options.steps < 1 or options.warmup < 0:
        raise ValueError("--steps must be at least 1, and --warmup at least 0")
    is_sweep = bool(options.layout or options.weak or options.strong)
    if is_sweep and "WORLD_SIZE" in os.environ:
        raise ValueError(
            "--layout, --weak and --strong start processes themselves; leave torchrun away"
        )
    with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
        if is_sweep:
            _sweep(options, Path(scratch))
        else:
            _measure_here(options, Path(scratch))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=5, help="measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--fixed", type=int, nargs=2, metavar=("PROMPT", "RESPONSE"),
                        help="tokens of every prompt and of every response")  # fmt: skip
    parser.add_argument("--image", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"),
                        help="with --fixed: an image of noise in every prompt")  # fmt: skip
    parser.add_argument("--layout", action="append", default=[], metavar="'key=value ...'",
                        help="overrides of a launch; again for the next")  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, help="of every --layout")
    parser.add_argument("--weak", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--strong", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--out", type=Path, default=Path("outputs/throughput"))
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def _sweep(options: argparse.Namespace, scratch: Path) -> None:
    config = load_config(GrpoConfig, "experiment", options.settings)
    points = points_of(
        options.layout, options.processes, options.weak, options.strong, config.prompts_per_step
    )
    largest = max([1, *options.weak]) // min([1, *options.weak])
    num_prompts = largest * config.prompts_per_step
    settings = [*options.settings, *_fixed_lengths(options, config, num_prompts, scratch)]
    command = [__file__, "--steps", str(options.steps), "--warmup", str(options.warmup), *settings]

    def refusal(point: Point) -> str:
        """What is refused needs no launch."""
        try:
            found = load_config(GrpoConfig, "experiment", [*settings, *point.overrides])
            validate(found, point.processes)
        except ValueError as error:
            return " ".join(str(error).split())
        return ""

    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    entries = run_points(points, command, scratch, _say, environment, refusal)
    _write(options, config.experiment, entries)


def _measure_here(options: argparse.Namespace, scratch: Path) -> None:
    """Measure in this process, and in torchrun's others; rank 0 writes."""
    config = load_config(GrpoConfig, "experiment", options.settings)
    # Every rank writes the same file for itself: no folder need be shared.
    fixed = _fixed_lengths(options, config, config.prompts_per_step, scratch)
    config = load_config(GrpoConfig, "experiment", [*options.settings, *fixed])
    config = dataclasses.replace(config, run="throughput", resume="never", replay=None)
    world_size, is_main = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    validate(config, world_size, int(os.environ.get("GROUP_WORLD_SIZE", "1")))
    if is_main:
        _say("loading Megatron-Core and vLLM takes a moment")

    from megatron_mmr1 import device

    device.prepare_process()
    from megatron_mmr1.backend import parallel
    from megatron_mmr1.throughput.measure import measure

    parallel.initialize(config.parallel, config.seed)
    say = _say if is_main else lambda words: None
    found = measure(config, scratch, options.warmup, options.steps, say)
    if is_main:
        found["config"] = dataclasses.asdict(config)
        if options.record:
            options.record.write_text(json.dumps(found), encoding="utf-8")
        else:
            layout = [s for s in options.settings if s.startswith(("parallel.", "rollout.tp_size"))]
            label = " ".join(layout) or "as it stands"
            point = dataclasses.asdict(Point("layout", label, world_size))
            _write(options, config.experiment, [point | found])
    parallel.finalize()


def _fixed_lengths(
    options: argparse.Namespace, config: GrpoConfig, num_prompts: int, scratch: Path
) -> list[str]:
    """Write the prompts that --fixed asks for; return the settings that train on them."""
    if not options.fixed:
        return []
    from megatron_mmr1.data.processor import PromptProcessor
    from megatron_mmr1.throughput.lengths import write_prompts

    num_prompt_tokens, num_response_tokens = options.fixed
    if min(options.fixed) < 1:
        raise ValueError(f"--fixed {num_prompt_tokens} {num_response_tokens}: give numbers above 0")
    path = scratch / "fixed.parquet"
    image = tuple(options.image) if options.image else None
    processor = PromptProcessor(config.model.path)
    write_prompts(path, processor, num_prompts, num_prompt_tokens, image)
    data = {"train": path, "heldout": path, "max_prompt_tokens": num_prompt_tokens,
            "problem_key": "problem", "answer_key": "answer", "images_key": "images",
            "system_prompt": "''", "min_pixels": 0}  # fmt: skip
    return [f"data.{key}={value}" for key, value in data.items()] + [
        f"rollout.max_response_tokens={num_response_tokens}",
        "rollout.ignore_end=true",
    ]


def _write(options: argparse.Namespace, experiment: str, entries: list[dict[str, Any]]) -> None:
    from megatron_mmr1.throughput import hardware, page, tables

    record = {
        "experiment": experiment,
        "settings": options.settings,
        "options": {"steps": options.steps, "warmup": options.warmup, "fixed": options.fixed,
                    "image": options.image},
        "machine": hardware.description(),
        "points": entries,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "throughput.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / "index.html").write_text(page.html(record), encoding="utf-8")
    measured = [entry for entry in entries if "steps" in entry]
    if measured:
        print(f"\n{measured[0]['formula']}\npeak: {measured[0]['peak']['source']}")
    print(f"\n{tables.markdown(record)}\n\n{tables.DEFINITIONS}")
    print(f"\n{path} and {options.out / 'index.html'}")
    if not measured:
        raise SystemExit(1)


def _say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    run_main(main)

"""Measure the converters against plain reading and writing of the same bytes, from a cold cache.

Usage: python tools/measure_conversion.py [--megabytes 1500] [--repeats 3] [--folder DIR]

A model of about that size is made in bfloat16 with the tiny model's tokenizer. Each repeat runs,
in turn: a plain copy of the Hugging Face files (read, write, fsync in blocks of 16 MiB), the same
with our hint to start writing each block to disk at once, the conversion to Megatron, both copies
of the checkpoint, and the conversion back; each in a process of its own, timed from after the
imports to the last fsync. Before each, the source's pages are put out of the cache. Memory is the
growth of anonymous memory after the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 16 << 20
_SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32000}
_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4}
_LAYER_BYTES = 31 << 20


def main() -> None:
    """Make the model, run the repeats, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; it needs 4 times the size")
    parser.add_argument(
        "--one", nargs=3, metavar=("WHAT", "SOURCE", "OUT"),
        help="run one step in this process and print a JSON object (the tool calls itself so)",
    )  # fmt: skip
    args = parser.parse_args()
    if args.one:
        what, source, out = args.one
        print(json.dumps(_STEPS[what](Path(source), Path(out), args.megabytes)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="conversion-") as name:
        _print_table(*_measure(Path(name), args.megabytes, args.repeats))


def _measure(folder: Path, megabytes: int, repeats: int) -> tuple[dict[str, list[Any]], int]:
    hf, megatron = folder / "hf", folder / "megatron"
    _run("make", folder, hf, megabytes)
    _run("to_megatron", hf, megatron, megabytes)
    results: dict[str, list[Any]] = {}
    for _ in range(repeats):
        for what, source in (
            ("copy", hf), ("hinted", hf), ("to_megatron", hf),
            ("copy back", megatron), ("hinted back", megatron), ("to_hf", megatron),
        ):  # fmt: skip
            _drop_from_cache(source)
            out = folder / "out"
            step = what.partition(" ")[0]
            results.setdefault(what, []).append(_run(step, source, out, megabytes))
            shutil.rmtree(out)
    return results, sum(path.stat().st_size for path in hf.glob("*.safetensors"))


def _print_table(results: dict[str, list[Any]], num_bytes: int) -> None:
    print(f"{num_bytes / 1e9:.2f} GB of weights, {len(results['copy'])} repeats\n")
    print(f"{'':28}{'seconds (all)':28}{'GB/s':>8}{'ratio (min..max)':>26}{'memory MB':>12}")
    for what, title, plain in (
        ("copy", "plain copy of the folder", "copy"),
        ("hinted", "the same with hints", "copy"),
        ("to_megatron", "Hugging Face to Megatron", "copy"),
        ("copy back", "plain copy of the checkpoint", "copy back"),
        ("hinted back", "the same with hints", "copy back"),
        ("to_hf", "Megatron to Hugging Face", "copy back"),
    ):
        times = [run["seconds"] for run in results[what]]
        pairs = zip(times, (run["seconds"] for run in results[plain]), strict=True)
        ratios = [a / b for a, b in pairs]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        shown = " ".join(f"{t:.1f}" for t in times)
        peak = max(run["peak_bytes"] for run in results[what]) / 1e6
        speed = num_bytes / statistics.median(times) / 1e9
        print(f"{title:28}{shown:28}{speed:8.2f}{spread:>26}{peak:12.0f}")
    largest = results["to_hf"][0]["largest_bytes"] / 1e6
    print(f"\nlargest parameter: {largest:.0f} MB")


def _run(what: str, source: Path, out: Path, megabytes: int) -> Any:
    """Run one step in a process of its own."""
    command = [sys.executable, __file__, "--one", what, str(source), str(out)]
    done = subprocess.run(
        [*command, "--megabytes", str(megabytes)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _timed(work: Callable[[], Any]) -> dict[str, Any]:
    from megatron_mmr1.observability.memory import PeakMemory

    with PeakMemory() as memory:
        start = time.monotonic()
        work()
        seconds = time.monotonic() - start
    return {"seconds": seconds, "peak_bytes": memory.growth_bytes}


def _copy(source: Path, out: Path, megabytes: int, is_hinted: bool = False) -> dict[str, Any]:
    """Read, write and fsync the large files; one buffer."""
    out.mkdir()
    buffer = memoryview(bytearray(_BLOCK_BYTES))

    def copy() -> None:
        for path in sorted(source.iterdir()):
            if path.suffix in (".safetensors", ".distcp"):
                with path.open("rb", buffering=0) as a, (out / path.name).open("wb", 0) as b:
                    while count := a.readinto(buffer):
                        b.write(buffer[:count])
                        if is_hinted:
                            for file in (a, b):
                                place = file.tell() - count, count
                                os.posix_fadvise(file.fileno(), *place, os.POSIX_FADV_DONTNEED)
                    os.fsync(b.fileno())

    return _timed(copy)


def _hinted(source: Path, out: Path, megabytes: int) -> dict[str, Any]:
    return _copy(source, out, megabytes, is_hinted=True)


def _to_megatron(source: Path, out: Path, megabytes: int) -> dict[str, Any]:
    conversion = _start()
    result = _timed(lambda: conversion.convert_hf_to_megatron(source, out))
    return result | _largest(source)


def _to_hf(source: Path, out: Path, megabytes: int) -> dict[str, Any]:
    conversion = _start()
    result = _timed(lambda: conversion.convert_megatron_to_hf(source, out))
    return result | _largest(out)


def _memory(source: Path, out: Path, megabytes: int) -> dict[str, Any]:
    """Convert there and back in one process, then, as a control, hold the whole model in memory.

    All compared with the memory before the first of them.
    """
    conversion = _start()
    from megatron_mmr1.convert.hf_files import HfWeights
    from megatron_mmr1.observability.memory import PeakMemory, anonymous_bytes

    before, megatron, back = anonymous_bytes(), out / "megatron", out / "hf"
    weights, held = HfWeights(source), {}
    steps: dict[str, Callable[[], Any]] = {
        "to_megatron": lambda: conversion.convert_hf_to_megatron(source, megatron),
        "to_hf": lambda: conversion.convert_megatron_to_hf(megatron, back),
        "verify": lambda: conversion.verify(back, megatron),
        "whole_model": lambda: held.update({name: weights[name] for name in weights.tensors}),
    }
    found = _largest(source)
    for name, step in steps.items():
        with PeakMemory(before) as memory:
            step()
        found[name] = memory.growth_bytes
    return found


def _largest(hf: Path) -> dict[str, Any]:
    """The bytes of the parameter that is made of most, and of all."""
    from megatron_mmr1.backend.conversion_plan import plan_of
    from megatron_mmr1.convert.hf_files import HfWeights

    weights = HfWeights(hf)
    sizes = [
        sum(weights.info(name).num_bytes for name in parameter.hf_shapes)
        for parameter in plan_of(hf).parameters
    ]
    return {"largest_bytes": max(sizes), "model_bytes": sum(sizes)}


def _make(source: Path, out: Path, megabytes: int) -> dict[str, Any]:
    """Write a model of about `megabytes` with random bits as its weights."""
    _start()
    import torch

    from megatron_mmr1.backend.conversion_plan import plan_of
    from megatron_mmr1.convert.hf_files import HfFolderWriter, HfLayout
    from megatron_mmr1.convert.safetensors_file import TensorInfo
    from megatron_mmr1.data.tiny_model import build_tiny_qwen2_5_vl

    build_tiny_qwen2_5_vl(out)
    (out / "model.safetensors").unlink()
    config = json.loads((out / "config.json").read_text())
    embeddings = 2 * 2 * _SIZES["hidden_size"] * _SIZES["vocab_size"]
    num_layers = max(1, ((megabytes << 20) - embeddings) // _LAYER_BYTES)
    config["text_config"] |= _SIZES | _HEADS | {"num_hidden_layers": num_layers}
    config["text_config"].pop("layer_types", None)
    config["text_config"]["rope_parameters"]["mrope_section"] = [8, 12, 12]
    config["vision_config"]["out_hidden_size"] = _SIZES["hidden_size"]
    (out / "config.json").write_text(json.dumps(config))
    tensors = {
        name: TensorInfo(torch.bfloat16, shape)
        for parameter in plan_of(out).parameters
        for name, shape in parameter.hf_shapes.items()
    }
    writer = HfFolderWriter(out, HfLayout.by_size(tensors), tensors, is_first=True)
    for name, info in tensors.items():
        bits = torch.randint(-(1 << 15), 1 << 15, info.shape, dtype=torch.int16)
        writer.write(name, bits.view(torch.bfloat16))
    writer.write_index()
    writer.close()
    return {}


def _start() -> Any:
    from conversion_command import start

    start()
    from megatron_mmr1.backend import conversion

    return conversion


_STEPS = {
    "make": _make, "copy": _copy, "hinted": _hinted, "to_megatron": _to_megatron, "to_hf": _to_hf,
    "memory": _memory,
}  # fmt: skip

if __name__ == "__main__":
    main()

"""Measure that large images don't stay in memory: check a data set of them, then use its prompts.

Usage: python tools/measure_image_memory.py [--rows 15000] [--used 1000] [--cache-mib 64]

Writes a parquet file of MMR1-RL's schema whose rows have a 1-megapixel JPEG each (about 2 GB for
15,000 rows, in a temporary folder), opens it as a run does, which decodes every image once, and
takes random prompts from it, as an engine does: each has 24 MB of pixels. Reports anonymous memory
at its peak above what the process took before; beside it, what all pixels would take. Checking is
done in as many threads as there are cores, each with an image of 3 MB and its copies. The first
time a parquet file is opened, the datasets library copies it into its cache, and Arrow reads up to
1 GiB ahead.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from itertools import batched
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megatron_mmr1.data.dataset import PromptDataset
from megatron_mmr1.data.loader import PromptView
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.data.tiny_model import build_tiny_qwen2_5_vl
from megatron_mmr1.observability.memory import PeakMemory, anonymous_bytes
from megatron_mmr1.observability.progress import Progress

SIDE = 1008  # pixels; 36 times the size of a visual token
MAX_PIXELS = 1_048_576
_NUM_PICTURES = 16


def main() -> None:
    """Write the file, check it, use its prompts, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=15_000)
    parser.add_argument("--used", type=int, default=1_000, help="prompts to make")
    parser.add_argument("--cache-mib", type=int, default=64, help="data.cache_bytes, in MiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        write_rows(folder / "train.parquet", options.rows)
        measure(folder, options.rows, options.used, options.cache_mib << 20)


def write_rows(path: Path, num_rows: int) -> None:
    """Write rows with an image each, no two files alike."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(_NUM_PICTURES):
        coarse = generator.integers(0, 256, (SIDE // 12, SIDE // 12, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG")
        files.append(file.getvalue())
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("problem", pa.string()), ("answer", pa.string()), ("images", pa.list_(image))]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for numbers in batched(range(num_rows), 100):
            rows = [
                {
                    "problem": "<image>Read the digits.",
                    "answer": str(number),
                    # What follows the end of a JPEG is passed over.
                    "images": [{"bytes": files[number % _NUM_PICTURES] + str(number).encode(),
                                "path": None}],
                }
                for number in numbers
            ]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(rows, schema))


def measure(folder: Path, num_rows: int, num_used: int, cache_bytes: int) -> None:
    """Open and use the file, and print what it took."""
    model = build_tiny_qwen2_5_vl(folder / "model")
    config = json.loads((model / "processor_config.json").read_text())
    config["image_processor"]["size"]["longest_edge"] = MAX_PIXELS
    (model / "processor_config.json").write_text(json.dumps(config))
    processor = PromptProcessor(model, max_pixels=MAX_PIXELS)

    def open_file() -> PromptDataset:
        with Progress(num_rows, title="checking", is_brief=True) as progress:
            return PromptDataset(
                folder / "train.parquet", processor, max_tokens=4096, cache_bytes=cache_bytes,
                on_progress=lambda done, _: progress.update(done, {}),
            )  # fmt: skip

    before = anonymous_bytes()
    with PeakMemory(before) as checking:
        start = time.perf_counter()
        dataset = open_file()
        seconds = time.perf_counter() - start
    assert len(dataset) == num_rows, dataset.bad_rows[:3]
    left_bytes = anonymous_bytes() - before
    start = time.perf_counter()
    dataset = open_file()
    again = time.perf_counter() - start
    order = np.random.default_rng(1).integers(0, num_rows, num_used).tolist()
    num_bytes = 0
    with (
        PeakMemory(before) as using,
        Progress(num_used, title="using", is_brief=True) as progress,
    ):
        for done, prompt in enumerate(PromptView.of(dataset, order), 1):
            num_bytes += prompt.pixel_bytes
            progress.update(done, {})
    everything = num_bytes / num_used * num_rows
    size = (folder / "train.parquet").stat().st_size
    print(
        f"{num_rows:,} rows, file of {size / 1e9:.2f} GB, pixels of all prompts"
        f" {everything / 1e9:.0f} GB\n"
        f"checking every image: {seconds:.0f} s ({1e3 * seconds / num_rows:.1f} ms a row), once;"
        f" opening it again {again:.1f} s\n"
        "memory above the start, peaks:"
        f" checking {checking.growth_bytes / 1e6:.0f} MB (after it {left_bytes / 1e6:.0f} MB),"
        f" using {num_used:,} prompts with a cache of {cache_bytes / 1e6:.0f} MB"
        f" {using.growth_bytes / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()

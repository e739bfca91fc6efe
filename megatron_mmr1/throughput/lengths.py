"""A data file whose prompts all have the same number of tokens, so that figures compare."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megatron_mmr1.data.processor import PromptProcessor

_TRIES = 50


def write_prompts(
    path: Path,
    processor: PromptProcessor,
    num_prompts: int,
    num_tokens: int,
    image_size: tuple[int, int] | None = None,
) -> None:
    """Write questions of random digits, all different, each exactly so long as a prompt.

    Args:
        num_tokens: of a prompt, chat template and visual tokens included.
        image_size: width and height of one image of noise in each; None = text alone.

    Raises:
        ValueError: no question of that length was found.
    """
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(num_prompts):
        images = [_noise(generator, image_size)] if image_size else []
        text = _question(generator, processor, num_tokens, images)
        files = [{"bytes": file, "path": None} for file in images]
        rows.append({"problem": text, "answer": "0", "images": files})
    images_type = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    schema = pa.schema([("problem", pa.string()), ("answer", pa.string()), ("images", images_type)])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def _question(
    generator: np.random.Generator,
    processor: PromptProcessor,
    num_tokens: int,
    images: list[bytes],
) -> str:
    pictures = [processor.picture(file) for file in images]
    digits = "".join(map(str, generator.integers(0, 10, 8 * num_tokens).tolist()))
    length = num_tokens
    found = 0
    for _ in range(_TRIES):
        text = "<image>" * len(images) + digits[:length]
        found = processor.count_tokens(text, pictures)
        if found == num_tokens:
            return text
        length += num_tokens - found
        if length < 1:
            break
    raise ValueError(
        f"--fixed: no prompt of {num_tokens} tokens was found (the last try has {found}); ask for "
        "more tokens, or for a smaller image"
    )


def _noise(generator: np.random.Generator, size: tuple[int, int]) -> bytes:
    width, height = size
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()

"""Encoded image files to RGB pictures, within limits.

Owns which files are read, what is accepted and how it becomes RGB; trainer and engine both decode
here, so that both see the same pixels. Does not resize or normalise: that is the model's own
processor.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

MAX_IMAGE_PIXELS = 1 << 26  # 67 million: 200 MB as RGB
MAX_ASPECT_RATIO = 200  # Qwen-VL's own limit, for all families
# What Pillow raises for broken files, besides OSError and ValueError.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def decode_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode a PNG or JPEG file completely, and convert it to RGB.

    Size and aspect ratio are read from the header and checked before any pixel is decoded. Colour:
    what is transparent is composited on white (dropping the alpha channel would reveal hidden
    colours); 16-bit grey keeps its high byte (Pillow's own conversion clips it to white); anything
    else is Pillow's `convert("RGB")`. An EXIF orientation is not applied.

    Args:
        data: the file's bytes.
        max_pixels: larger images are refused.

    Returns:
        An image of mode RGB.

    Raises:
        ValueError: with the reason: empty, neither PNG nor JPEG, too large, too narrow, or broken.
    """
    if not data:
        raise ValueError("the image file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except Image.DecompressionBombError as error:
        raise ValueError(f"image too large: {error}") from error
    except _BROKEN as error:
        raise ValueError("not a readable PNG or JPEG image") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"image too large: {width} x {height} exceeds {max_pixels} pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"image too narrow: {width} x {height} exceeds {MAX_ASPECT_RATIO}:1")
    try:
        image.load()
        return _to_rgb(image)
    except _BROKEN as error:
        raise ValueError(f"broken image: {error}") from error


def read_below(folder: Path, name: str) -> bytes:
    """Read the file `name`, a path relative to `folder` that stays below it.

    Raises:
        ValueError: it leads out of the folder, also by a link, or is no file.
    """
    folder = folder.resolve()
    path = Path(os.path.realpath(folder / name))  # follows links, so that none leads out
    if not path.is_relative_to(folder):
        raise ValueError(f"image path {name!r} leads out of the data folder")
    if not path.is_file():
        raise ValueError(f"image file {name!r} does not exist")
    return path.read_bytes()


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert as `decode_image` states."""
    if image.mode.startswith("I"):  # 16-bit grey, whatever the byte order
        high_byte = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, picture).convert("RGB")
    return image.convert("RGB")

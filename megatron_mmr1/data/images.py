"""Encoded image files to RGB pictures, within limits.

Owns what is accepted, how it becomes RGB, and the limits of its size; trainer and engine both get
their pixels from here. What a model's vision tower needs besides is its own processor's business.
"""

from __future__ import annotations

import io
import math
import struct
import zlib

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


def fit_pixels(image: Image.Image, min_pixels: int, max_pixels: int) -> Image.Image:
    """Scale an image whose area is out of [min_pixels, max_pixels], keeping its shape.

    As the released MMR1 loader does: both sides times the root of limit / area, cut to integers,
    Pillow's default filter (bicubic). Here no side falls below one pixel.
    """
    width, height = image.size
    limit = min(max(width * height, min_pixels), max_pixels)
    if limit == width * height:
        return image
    factor = math.sqrt(limit / (width * height))
    return image.resize((max(int(width * factor), 1), max(int(height * factor), 1)))


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

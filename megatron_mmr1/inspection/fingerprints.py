"""Texts and images to values that can be compared: normal form, word n-grams, two image hashes."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from megatron_mmr1.data.processor import IMAGE_TAG

NGRAM_WORDS = 8
_GRADIENT_MARGIN = 2  # grey levels of 255; below it, noise of a JPEG decides the sign
_SIDE = 8


class ImagePrint(NamedTuple):
    """What is kept of an image.

    Attributes:
        pixels: hash of size and RGB values, 64 bits: the same for a PNG and its copy saved anew.
        across, down: 64 bits each: whether the image of 9 x 9 grey cells becomes brighter from a
            cell to the next one on the right, or below (dHash in both directions).
    """

    width: int
    height: int
    pixels: int
    across: int
    down: int


def image_print(picture: Image.Image) -> ImagePrint:
    """Fingerprint an RGB image."""
    width, height = picture.size
    pixels = digest(f"{width}x{height}".encode(), picture.tobytes())
    small = picture.resize((_SIDE + 1, _SIDE + 1), Image.Resampling.BOX).convert("L")
    grey = np.asarray(small).astype(np.int16)
    across = grey[:_SIDE, 1:] - grey[:_SIDE, :-1] > _GRADIENT_MARGIN
    down = grey[1:, :_SIDE] - grey[:-1, :_SIDE] > _GRADIENT_MARGIN
    return ImagePrint(width, height, pixels, _to_int(across), _to_int(down))


def digest(*parts: bytes) -> int:
    """Hash some bytes to 64 bits; where one part ends matters."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return int.from_bytes(found.digest(), "little")


def row_key(text: str, prints: Sequence[ImagePrint]) -> int:
    """Hash what makes two rows duplicates: the text in normal form, and the images' pixels.

    Normal form: Unicode NFKC, and runs of white space are one space. Case and punctuation count.
    """
    normal = " ".join(unicodedata.normalize("NFKC", text).split())
    pixels = b"".join(image.pixels.to_bytes(8, "little") for image in prints)
    return digest(normal.encode(), pixels)


def ngrams(text: str) -> set[str]:
    """Return the runs of 8 words: NFKC, lower case, without image tags and punctuation."""
    plain = unicodedata.normalize("NFKC", text.replace(IMAGE_TAG, " ")).casefold()
    words = re.findall(r"\w+", plain)
    return {" ".join(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)}


def _to_int(bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "little")

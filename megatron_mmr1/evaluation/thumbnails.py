"""Small copies of images, for the report alone."""

from __future__ import annotations

import io

from megatron_mmr1.data.images import decode_image

MAX_SIDE = 360
_AS_IT_IS = 128  # at most so wide and high an image stays sharp


def thumbnail(data: bytes) -> bytes:
    """Return a PNG of a tiny image as it is, a JPEG of any other within `MAX_SIDE` pixels.

    Raises:
        ValueError: see `decode_image`.
    """
    picture = decode_image(data)
    file = io.BytesIO()
    if max(picture.size) <= _AS_IT_IS:
        picture.save(file, "PNG")
    else:
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
        picture.save(file, "JPEG", quality=80)
    return file.getvalue()

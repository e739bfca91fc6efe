"""Some rows as a person sees them: text, answer and small pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_mmr1.data.images import decode_image
from megatron_mmr1.inspection.rows import Row, Rows

_THUMBNAIL = 240  # pixels at most, either side
_MAX_IMAGES = 4  # of a row


class Sample(NamedTuple):
    """A row, and its images as small PNG files in base64."""

    row: Row
    thumbnails: list[str]


def samples_of(rows: Rows, numbers: np.ndarray, count: int, seed: int) -> list[Sample]:
    """Draw `count` of the rows with `seed`; bad ones among them."""
    drawn = np.random.default_rng(seed).choice(numbers, min(count, len(numbers)), replace=False)
    return [
        Sample(rows.read(number), _thumbnails(rows.files(number)))
        for number in sorted(drawn.tolist())
    ]


def _thumbnails(files: Sequence[bytes]) -> list[str]:
    """Make small copies; an image that can't be decoded is left out, its row says why."""
    made = []
    for data in files[:_MAX_IMAGES]:
        try:
            picture = decode_image(data)
        except ValueError:
            continue
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        file = io.BytesIO()
        picture.save(file, "PNG", optimize=True)
        made.append(base64.b64encode(file.getvalue()).decode())
    return made

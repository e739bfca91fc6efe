"""The encoded images of a record: bytes in it, or files below a root folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 64 << 20
_MAX_SHOWN = 80  # characters of a path, in a reason


class ImageFiles:
    """Reads images as data sets have them.

    Args:
        root: image paths are relative to it, and may not leave it; None: a record must hold bytes.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root

    def read(self, images: Any) -> list[bytes]:
        """Return the encoded files of a record's images.

        Args:
            images: one or a list of: bytes; a path; {"bytes": ..., "path": ...}, either of which
                may be null. None: no images.

        Raises:
            ValueError: says what is wrong with which image.
        """
        if images is None:
            return []
        return [self._read(image) for image in (images if isinstance(images, list) else [images])]

    def stamps(self, images: Any) -> list[tuple[str, int, int]]:
        """Return name, size in bytes and time (ns) of a record's image files; -1 of missing ones.

        Nothing of images whose bytes are in the record.
        """
        found = []
        for image in images if isinstance(images, list) else [images]:
            path = image
            if isinstance(image, dict):
                path = image.get("path") if image.get("bytes") is None else None
            if isinstance(path, str) and self._root is not None:
                try:
                    status = (self._root / path).stat()
                    found.append((path, status.st_size, status.st_mtime_ns))
                except (OSError, ValueError):
                    found.append((path, -1, -1))
        return found

    def _read(self, image: Any) -> bytes:
        data, path = image, None
        if isinstance(image, dict):
            data, path = image.get("bytes"), image.get("path")
        elif isinstance(image, str):
            data, path = None, image
        if isinstance(data, bytes):
            return data
        if data is None and isinstance(path, str) and path:
            if self._root is None:
                raise ValueError(f"image path {path!r}: this source has no folder of images")
            return read_below(self._root, path)
        raise ValueError("an image has neither bytes nor path")


def read_below(folder: Path, name: str) -> bytes:
    """Read the file `name`, a path relative to `folder` that stays below it.

    Raises:
        ValueError: it leads out of the folder, also by a link, is no file, can't be read, or is too
            large.
    """
    shown = repr(name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}...")
    if "\0" in name:
        raise ValueError(f"image path {shown} holds a NUL character")
    folder = folder.resolve()
    try:
        path = Path(os.path.realpath(folder / name))  # follows links, so that none leads out
        if not path.is_relative_to(folder):
            raise ValueError(f"image path {shown} leads out of the data folder")
        if not path.is_file():
            raise ValueError(f"image file {shown} does not exist")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"image file {shown} has more than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:  # a name that is too long, such as an image in base64; no permission
        raise ValueError(f"image file {shown} can't be read: {error.strerror}") from error

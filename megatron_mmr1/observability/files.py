"""Two habits of a run's files: lines end in "\\n" only, and a rewrite is all or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def iter_lines(path: Path) -> Iterator[str]:
    """Yield a text file's lines, split on "\\n" only (str.splitlines also breaks on U+2028)."""
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from file

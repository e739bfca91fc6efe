"""Reading and writing tensors at places in a file, without a copy of the file in memory.

Nothing is mapped: a tensor is read straight into its own memory, and its pages are given back to
the system at once, so that a model may be larger than the memory.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 16 << 20
_HINT_BYTES = 1 << 20  # below, a hint costs more than it gives


class OpenFile:
    """A file's descriptor, read and written by position.

    Args:
        is_read_once: pages go back to the system after use. False leaves them to other processes
            of the machine that read the same file.
    """

    def __init__(self, path: Path, flags: int = os.O_RDONLY, is_read_once: bool = True) -> None:
        self.path, self._is_read_once = path, is_read_once
        self._fd = os.open(path, flags, 0o644)
        self._close = weakref.finalize(self, os.close, self._fd)

    def read_into(self, tensor: Tensor, offset: int) -> None:
        """Fill a contiguous tensor with the bytes from `offset` on."""
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        self.read_bytes_into(view, offset)

    def read_bytes_into(self, view: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset` on.

        Raises:
            ValueError: the file ends before.
        """
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + BLOCK_BYTES]], offset + done)
            if count == 0:
                raise ValueError(
                    f"{self.path} ends at byte {offset + done}, in the middle of a tensor; "
                    "copy it again"
                )
            if count >= _HINT_BYTES and self._is_read_once:
                self.give_back(offset + done, count)
            done += count

    def will_need(self, offset: int, length: int) -> None:
        """Have the system read ahead while we do something else."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def give_back(self, offset: int, length: int) -> None:
        """Have the system drop a range's pages; those not on disk yet it starts to write."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def write(self, tensor: Tensor, offset: int) -> None:
        """Write a tensor's bytes at `offset`, and have the system start to put them on disk."""
        view = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        self.write_bytes(view, offset)

    def write_bytes(self, view: memoryview | bytes, offset: int) -> None:
        """Write bytes at `offset`."""
        view, done = memoryview(view), 0
        while done < len(view):
            count = os.pwrite(self._fd, view[done : done + BLOCK_BYTES], offset + done)
            if count >= _HINT_BYTES:
                self.give_back(offset + done, count)
            done += count

    def truncate(self, size: int) -> None:
        """Give the file its size."""
        os.ftruncate(self._fd, size)

    def sync(self) -> None:
        """Wait until all of it is on disk."""
        os.fsync(self._fd)
        self.give_back(0, 0)  # all of it

    def close(self) -> None:
        """Give the descriptor back; again, or when the object is dropped, does nothing."""
        self._close()

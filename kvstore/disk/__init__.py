"""The disk under the cold tier: the few calls it makes, in one object that a test can replace.

Values lie in segment files (`segments`), their places and lives in LMDB (`rows`). LMDB makes its own calls.
"""

import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Buffer = bytes | memoryview

_KEEP_SIZE_AND_PUNCH = 0x01 | 0x02
_IOV_MAX = 1024
_WRITE = 2
"""SYNC_FILE_RANGE_WRITE: begin to write back, do not wait."""
BEHIND_NBYTES = 1 << 20
"""Smaller writes wait for the sync that follows: starting them earlier costs as much as it saves."""


class Disk(Protocol):
    """Calls on files. All raise OSError."""

    def open(self, path: Path, flags: int) -> int:
        """A file descriptor."""
        ...

    def close(self, fd: int) -> None:
        """Give a descriptor back."""
        ...

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all buffers one behind the other from `offset` on."""
        ...

    def read(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """Fill the buffers from `offset` on. Returns the bytes read, fewer only at the end of the file."""
        ...

    def sync(self, fd: int) -> None:
        """Return once the file's data is on the disk."""
        ...

    def sync_directory(self, path: Path) -> None:
        """Return once the directory's names are on the disk."""
        ...

    def punch(self, fd: int, offset: int, nbytes: int) -> None:
        """Give a range's blocks back to the file system; the range then reads as zeros."""
        ...

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        ...

    def room(self, path: Path) -> tuple[int, int]:
        """Bytes that the file system has left for this process, and its total bytes."""
        ...


class SystemDisk:
    """The operating system's files."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        self._libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def open(self, path: Path, flags: int) -> int:
        """A file descriptor; a new file is readable by its owner only. No symbolic link is followed."""
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        """Give a descriptor back."""
        os.close(fd)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all buffers; a short write is continued.

        A large write is on its way to the disk when this returns, so the disk works while the next one is prepared.
        """
        start = offset
        views = [memoryview(b).cast("B") for b in buffers if len(b)]
        while views:
            n = os.pwritev(fd, views[:_IOV_MAX], offset)
            if n == 0:
                raise OSError(errno.ENOSPC, "short write")
            offset += n
            while views and n >= len(views[0]):
                n -= len(views.pop(0))
            if n:
                views[0] = views[0][n:]
        if offset - start >= BEHIND_NBYTES:
            # Only a hint: the sync reports errors of the disk.
            self._libc.sync_file_range(fd, start, offset - start, _WRITE)

    def read(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """Fill the buffers; Linux reads at most 2 GiB a call."""
        views = [b.data for b in buffers if b.size]
        total = 0
        while views:
            n = os.preadv(fd, views[:_IOV_MAX], offset + total)
            if n == 0:
                break
            total += n
            while views and n >= len(views[0]):
                n -= len(views.pop(0))
            if n:
                views[0] = views[0][n:]
        return total

    def sync(self, fd: int) -> None:
        """By fdatasync."""
        os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        """By fsync of the directory."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def punch(self, fd: int, offset: int, nbytes: int) -> None:
        """By fallocate(PUNCH_HOLE): ext4, xfs, btrfs, tmpfs."""
        if self._libc.fallocate(fd, _KEEP_SIZE_AND_PUNCH, offset, nbytes) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink(missing_ok=True)

    def room(self, path: Path) -> tuple[int, int]:
        """From statvfs, without the blocks reserved for root."""
        stat = os.statvfs(path)
        return stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize

"""Shared memory of the daemon's, mapped once and kept: a fresh mapping costs 50 us a MiB, a kept one nothing.

A Window keeps its owner until nothing refers to it any more, however many arrays and tensors were made of it.
"""

import _thread
import contextlib
import mmap
import os
from collections.abc import Callable

import numpy as np

from kvstored_client.aside import Aside, Job, call_off
from kvstored_client.buffers import Window
from kvstored_client.wire.frames import Bytes

PARALLEL_NBYTES = 8 << 20
"""Below this a second thread costs more than it brings."""
_POPULATE_READ = 22  # MADV_POPULATE_READ


class MappedSegment:
    """One segment, mapped. bytes, words: all of it, and 8 bytes at a time; writable only for an ingest segment.

    shift: the generation of a block that begins at `start` is word `start >> shift`. device: that of a GPU's memory.
    """

    shift = 3
    device: int | None = None

    def __init__(self, fd: int, nbytes: int, *, writable: bool) -> None:
        """Map the descriptor, which stays the caller's. Raises ValueError, TypeError or OSError for what cannot be."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, protection)
        self.nbytes = nbytes
        self.words = memoryview(self._map).cast("Q")
        self.bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.address = int(self.bytes.ctypes.data)
        self.writable = writable

    def window(self, start: int, nbytes: int, owner: object, *, writable: bool) -> "Window":
        """A run of it, which keeps the mapping and `owner`."""
        return Window(self.address + start, nbytes, (self, owner), writable=writable)

    def populate(self) -> None:
        """Fill the page tables, in another thread: the first reader would otherwise pay 50 us a MiB."""
        with contextlib.suppress(RuntimeError):  # out of threads: the reader pays
            _thread.start_new_thread(self._populate, ())

    def _populate(self) -> None:
        import ctypes

        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        with contextlib.suppress(OSError):
            for start in range(0, self.nbytes, PARALLEL_NBYTES):
                if madvise(self.address + start, min(PARALLEL_NBYTES, self.nbytes - start), _POPULATE_READ):
                    return  # an older kernel: the reader pays


Copy = Callable[[Bytes, Bytes], None]
"""Copies bytes: (target, source)."""


class Copier:
    """Copies bytes, large runs with two threads. Fork-safe as far as each process makes its own."""

    def __init__(self) -> None:
        self._aside = Aside()

    def copy(self, target: Bytes, source: Bytes) -> None:
        """target[:] = source, without the GIL. Whatever it ends with, nothing writes to `target` any more."""
        if target.size < PARALLEL_NBYTES or (os.cpu_count() or 1) < 2:
            np.copyto(target, source)
            return
        half = target.size // 2 // 4096 * 4096
        jobs: list[Job] = []
        try:
            self._aside.start(jobs, np.copyto, target[half:], source[half:])
            np.copyto(target[:half], source[:half])
            jobs[0].wait()
        except BaseException:
            call_off(jobs)
            raise

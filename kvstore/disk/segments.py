"""Values on disk: records one behind the other in segment files.

Invariants: a byte once written is never written again, and a segment's number is never used twice while a row may name
it, so a stale place reads as zeros or as nothing, never as another record. Records begin at whole blocks; the
blocks of one that left go back to the file system at once (a hole), and a segment with nothing left is unlinked. So
no room is lost to fragmentation and nothing is moved: the file system, which is good at it, places the blocks.
LMDB as the place for values was measured and left (docs/decisions/0001-values-in-segment-files.md).
Thread rule: one writer; `read` may be called by any thread.
"""

import errno
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvstore.disk import Buffer, Bytes, Disk

log = logging.getLogger(__name__)

BLOCK_NBYTES = 4096
PlaceTable = np.ndarray[Any, np.dtype[np.int64]]
"""Places as rows of (segment, offset, nbytes): a million of them as tuples would take 200 MiB and a second."""
_ZEROS = bytes(BLOCK_NBYTES)
_SUFFIX = ".seg"
OPEN_MAX = 64
"""Descriptors kept for reading: the segments of a tier, give or take."""


class Place(NamedTuple):
    """Where a record lies: nbytes from an offset in a segment."""

    segment: int
    offset: int
    nbytes: int


def blocks_nbytes(nbytes: int) -> int:
    """Bytes of the blocks that hold `nbytes`."""
    return -(-nbytes // BLOCK_NBYTES) * BLOCK_NBYTES


class _Opened:
    """A descriptor for reading, given back when the last thread that uses it lets go of this object.

    Kept, since the kernel reads ahead by descriptor: chunks of a prefix, written in a row, are then read in a row.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self.fd = disk.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self._disk.close(self.fd)


class Segments:
    """The segment files of one directory. segment_nbytes: a segment is closed once it is that long."""

    def __init__(self, path: Path, disk: Disk, segment_nbytes: int) -> None:
        self.path = path
        self._disk = disk
        self._segment_nbytes = segment_nbytes
        self._live: dict[int, int] = {}
        self._next = 1
        self._active: int | None = None
        self._fd = -1
        self._tail = 0
        self._can_punch = True
        self._readable: dict[int, _Opened] = {}
        self._opened_lock = threading.Lock()

    def recover(self, places: PlaceTable) -> None:
        """Take over what an earlier process left: unlink segments nobody names, punch what nobody names.

        places: of all rows. A crash between a commit and the punch that belongs to it leaves such bytes.
        """
        table = places[np.lexsort((places[:, 1], places[:, 0]))]
        table[:, 2] = -(-table[:, 2] // BLOCK_NBYTES) * BLOCK_NBYTES
        numbers, starts = np.unique(table[:, 0], return_index=True)
        extents = dict(zip(map(int, numbers), np.split(table[:, 1:], starts[1:]), strict=False))
        found = self._found()
        for number in found - extents.keys():
            self._disk.unlink(self._file(number))
        self._live = {number: int(rows[:, 1].sum()) for number, rows in extents.items()}
        self._next = max([*found, *extents, 0]) + 1
        for number in found & extents.keys():
            self._trim(number, extents[number])

    def append(self, records: Sequence[Sequence[Buffer]]) -> list[Place]:
        """Write records and wait until they are on the disk. Raises OSError: none of them is written then."""
        places: list[Place] = []
        batch: list[Buffer] = []
        try:
            for record in records:
                nbytes = sum(len(part) for part in record)
                pending = sum(len(part) for part in batch)
                if self._active is None or (self._tail + pending >= self._segment_nbytes):
                    self._write(batch)
                    batch, pending = [], 0
                    self._start()
                places.append(self._place(self._tail + pending, nbytes))
                batch += [*record, _ZEROS[: blocks_nbytes(nbytes) - nbytes]]
            self._write(batch)
        except OSError:
            # After a failed fdatasync nobody knows which pages are on the disk: never add to this file again.
            self._drop_active()
            self.free(places)
            raise
        return places

    def read(self, place: Place, buffers: Sequence[Bytes], skip: int = 0) -> int:
        """Fill the buffers from a place, `skip` bytes into it; the bytes there were. Raises OSError."""
        return self._disk.read(self._opened(place.segment).fd, buffers, place.offset + skip)

    def free(self, places: Iterable[Place]) -> None:
        """Give the blocks of records that no row names any more back to the file system."""
        for place in places:
            left = self._live.get(place.segment, 0) - blocks_nbytes(place.nbytes)
            self._live[place.segment] = left
            try:
                if left <= 0 and place.segment != self._active:
                    self._live.pop(place.segment)
                    self._unlink(place.segment)
                else:
                    self._punch(place.segment, place.offset, blocks_nbytes(place.nbytes))
            except OSError as error:
                # Space is lost until the next start finds it (`recover`); no value is.
                log.warning("cold segment=%s event=free_failed error=%s", place.segment, error)

    def disk_nbytes(self) -> int:
        """Bytes the file system has given to the segments."""
        return sum(_allocated(self._file(number)) for number in self._found())

    def close(self) -> None:
        """Give back the descriptor."""
        self._drop_active()
        with self._opened_lock:
            self._readable.clear()

    def _opened(self, number: int) -> "_Opened":
        with self._opened_lock:
            opened = self._readable.pop(number, None) or _Opened(self._disk, self._file(number))
            self._readable[number] = opened
            if len(self._readable) > OPEN_MAX:
                del self._readable[next(iter(self._readable))]
        return opened

    def _unlink(self, number: int) -> None:
        with self._opened_lock:
            self._readable.pop(number, None)
        self._disk.unlink(self._file(number))

    def _file(self, number: int) -> Path:
        return self.path / f"{number:08d}{_SUFFIX}"

    def _found(self) -> set[int]:
        return {int(f.stem) for f in self.path.glob(f"*{_SUFFIX}") if f.stem.isdigit()}

    def _place(self, offset: int, nbytes: int) -> Place:
        """A place in the active segment, counted as live from now on: else a full segment would look empty."""
        assert self._active is not None
        self._live[self._active] = self._live.get(self._active, 0) + blocks_nbytes(nbytes)
        return Place(self._active, offset, nbytes)

    def _start(self) -> None:
        self._drop_active()
        number = self._next
        self._next += 1
        fd = self._disk.open(self._file(number), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._active, self._fd, self._tail = number, fd, 0
        self._disk.sync_directory(self.path)

    def _drop_active(self) -> None:
        if self._active is None:
            return
        number, fd = self._active, self._fd
        self._active, self._fd = None, -1
        self._disk.close(fd)
        if self._live.get(number, 0) <= 0:
            self._live.pop(number, None)
            self._unlink(number)

    def _write(self, buffers: Sequence[Buffer]) -> None:
        if buffers:
            self._disk.write(self._fd, buffers, self._tail)
            self._disk.sync(self._fd)
            self._tail += sum(len(b) for b in buffers)

    def _punch(self, number: int, offset: int, nbytes: int) -> None:
        if not self._can_punch:
            return
        fd = self._disk.open(self._file(number), os.O_RDWR)
        try:
            self._disk.punch(fd, offset, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            self._can_punch = False
            log.warning("cold path=%s event=no_hole_punching effect=space returns by whole segments only", self.path)
        finally:
            self._disk.close(fd)

    def _trim(self, number: int, rows: PlaceTable) -> None:
        """Punch everything outside the sorted (offset, nbytes) of a segment, if it holds more than they need."""
        path = self._file(number)
        if _allocated(path) <= int(rows[:, 1].sum()) + BLOCK_NBYTES:
            return
        ends = np.concatenate(([0], rows[:, 0] + rows[:, 1]))
        starts = np.concatenate((rows[:, 0], [max(path.stat().st_size, int(ends[-1]))]))
        for gap in np.flatnonzero(starts > ends):
            self._punch(number, int(ends[gap]), int(starts[gap] - ends[gap]))


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0

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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from kvstore.disk import Buffer, Bytes, Disk

log = logging.getLogger(__name__)

BLOCK_NBYTES = 4096
_ZEROS = bytes(BLOCK_NBYTES)
_SUFFIX = ".seg"


class Place(NamedTuple):
    """Where a record lies: nbytes from an offset in a segment."""

    segment: int
    offset: int
    nbytes: int


def blocks_nbytes(nbytes: int) -> int:
    """Bytes of the blocks that hold `nbytes`."""
    return -(-nbytes // BLOCK_NBYTES) * BLOCK_NBYTES


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

    def recover(self, places: Iterable[Place]) -> None:
        """Take over what an earlier process left: unlink segments nobody names, punch what nobody names.

        places: of all rows. A crash between a commit and the punch that belongs to it leaves such bytes.
        """
        extents: dict[int, list[tuple[int, int]]] = {}
        for place in places:
            extents.setdefault(place.segment, []).append((place.offset, blocks_nbytes(place.nbytes)))
        found = self._found()
        for number in found:
            if number not in extents:
                self._disk.unlink(self._file(number))
        self._live = {number: sum(n for _, n in rows) for number, rows in extents.items()}
        self._next = max([*found, *extents, 0]) + 1
        for number, rows in extents.items():
            if number in found:
                self._trim(number, sorted(rows))

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
                assert self._active is not None
                places.append(Place(self._active, self._tail + pending, nbytes))
                batch += [*record, _ZEROS[: blocks_nbytes(nbytes) - nbytes]]
            self._write(batch)
        except OSError:
            # After a failed fdatasync nobody knows which pages are on the disk: never add to this file again.
            self._drop_active()
            raise
        for place in places:
            self._live[place.segment] = self._live.get(place.segment, 0) + blocks_nbytes(place.nbytes)
        return places

    def read(self, place: Place, buffers: Sequence[Bytes]) -> int:
        """Fill the buffers from a place; the bytes there were. Raises OSError."""
        # Opened for each read: 10 us beside a value's 100, and no descriptor can be closed under a reader.
        fd = self._disk.open(self._file(place.segment), os.O_RDONLY)
        try:
            return self._disk.read(fd, buffers, place.offset)
        finally:
            self._disk.close(fd)

    def free(self, places: Iterable[Place]) -> None:
        """Give the blocks of records that no row names any more back to the file system."""
        for place in places:
            left = self._live.get(place.segment, 0) - blocks_nbytes(place.nbytes)
            self._live[place.segment] = left
            try:
                if left <= 0 and place.segment != self._active:
                    self._live.pop(place.segment)
                    self._disk.unlink(self._file(place.segment))
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

    def _file(self, number: int) -> Path:
        return self.path / f"{number:08d}{_SUFFIX}"

    def _found(self) -> set[int]:
        return {int(f.stem) for f in self.path.glob(f"*{_SUFFIX}") if f.stem.isdigit()}

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
            self._disk.unlink(self._file(number))

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

    def _trim(self, number: int, rows: list[tuple[int, int]]) -> None:
        """Punch everything outside the sorted (offset, nbytes) of a segment, if it holds more than they need."""
        path = self._file(number)
        if _allocated(path) <= sum(n for _, n in rows) + BLOCK_NBYTES:
            return
        at = 0
        for offset, nbytes in [*rows, (max(path.stat().st_size, at), 0)]:
            if offset > at:
                self._punch(number, at, offset - at)
            at = max(at, offset + nbytes)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0

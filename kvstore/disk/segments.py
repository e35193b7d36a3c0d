"""Values on disk: records one behind the other in segment files.

Invariants: a written byte is never written again, and a segment's number is never reused while a row may name it. So a
stale place reads as zeros or as nothing, never as another record. The blocks of a record that left go back to the file
system at once (a hole), and an empty segment is unlinked. Large records are never moved: the file system finds room for
new blocks. Small records share blocks (`occupancy`); their bytes that holes cannot give back are `slack_nbytes`,
and `sparsest` names the segment whose records should move.
Values in LMDB were measured and rejected (docs/decisions/0001-values-in-segment-files.md).
Thread rule: one writer; `read` may be called by any thread.
"""

import errno
import logging
import os
import threading
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvstore.disk import Buffer, Bytes, Disk
from kvstore.disk.occupancy import BLOCK_NBYTES, Occupancy, PlaceTable, align_of, place_nbytes, round_up

log = logging.getLogger(__name__)

_ZEROS = bytes(BLOCK_NBYTES)
_SUFFIX = ".seg"
WRITE_NBYTES = 4 << 20
"""Records go to the disk in pieces of this size; the disk writes one while the next is prepared."""
SEGMENT_MAX = 1 << 31
"""The largest number of a segment: a row has 32 bits for it, and a larger one is not believed."""
WHOLE = -1
"""In place of a length: all of a segment."""
UNFREED_MAX = 10_000
"""Places that the file system did not take back and that are remembered, 1 MB; the others wait for the next start."""
OPEN_MAX = 64
"""Descriptors kept for reading: about the number of segments in a tier."""


class Place(NamedTuple):
    """Where a record lies: a segment, an offset in it, a length in bytes."""

    segment: int
    offset: int
    nbytes: int


class _Opened:
    """A descriptor for reading, closed when the last thread that uses it drops this object.

    Descriptors are kept because the kernel reads ahead per descriptor: the chunks of a prefix are written in a row and
    read in a row.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self.fd = disk.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self._disk.close(self.fd)


class Segments:
    """The segment files of one directory. segment_nbytes: a segment is closed once it is that long.

    slack_nbytes: dead bytes in blocks that the file system cannot take back, because a live record shares them.
    """

    def __init__(self, path: Path, disk: Disk, segment_nbytes: int) -> None:
        self.path = path
        self._disk = disk
        self._segment_nbytes = segment_nbytes
        self._blocks: dict[int, Occupancy] = {}
        self.slack_nbytes = 0
        self._next = 1
        self._active: int | None = None
        self._fd = -1
        self._tail = 0
        self._synced = True
        self._can_punch = True
        self._unfreed: list[tuple[int, int, int]] = []
        self._readable: dict[int, _Opened] = {}
        self._opened_lock = threading.Lock()

    def recover(self, places: PlaceTable) -> None:
        """Take over the files of an earlier process: unlink segments, and punch bytes, that no row names.

        places: those of all rows. A crash between a commit and its punch leaves such bytes.
        """
        table = places[np.lexsort((places[:, 1], places[:, 0]))]
        numbers, starts = np.unique(table[:, 0], return_index=True)
        extents = dict(zip(map(int, numbers), np.split(table[:, 1:], starts[1:]), strict=False))
        found = self._found()
        for number in found - extents.keys():
            self._disk.unlink(self._file(number))
        self._next = max([*found, *extents, 0]) + 1
        for number, rows in extents.items():
            blocks = self._blocks[number] = Occupancy()
            gaps = blocks.recover(rows)
            self.slack_nbytes += blocks.slack_nbytes
            end = round_up(int((rows[:, 0] + rows[:, 1]).max()), BLOCK_NBYTES)
            if number in found:
                self._trim(number, blocks, gaps, end)

    def append(self, records: Iterable[Sequence[Buffer]]) -> list[Place]:
        """Write records and wait until they are on the disk. Raises OSError: then none of them is written.

        `records` may be a generator: records are written while later ones are made.
        """
        places: list[Place] = []
        batch: list[Buffer] = []
        at = self._tail
        try:
            for record in records:
                nbytes = sum(len(part) for part in record)
                if self._active is None or at >= self._segment_nbytes:
                    self._write(batch)
                    self._sync()
                    self._start()
                    batch, at = [], 0
                elif at - self._tail >= WRITE_NBYTES:
                    self._write(batch)
                    batch = []
                before, after = -at % align_of(nbytes), place_nbytes(nbytes) - nbytes
                places.append(self._place(at + before, nbytes))
                batch += [_ZEROS[:before], *record, _ZEROS[:after]]
                at += before + nbytes + after
            self._write(batch)
            self._sync()
        except OSError:
            # After a failed fdatasync it is unknown which pages are on the disk: never append to this file again.
            self._drop_active()
            self.free(places)
            raise
        return places

    def read(self, place: Place, buffers: Sequence[Bytes], skip: int = 0) -> int:
        """Fill the buffers from a place, `skip` bytes into it. Returns the bytes read. Raises OSError."""
        return self._disk.read(self._opened(place.segment).fd, buffers, place.offset + skip)

    def lacks(self, number: int) -> bool:
        """Whether there is no file of that number in a directory that can be read. Raises OSError where it cannot."""
        return self.path.is_dir() and not self._file(number).exists()

    def free(self, places: Iterable[Place]) -> None:
        """Give the blocks of records that no row names any more back to the file system.

        What it does not take now it is offered again with the next records that leave.
        """
        self._unfreed = [part for part in self._unfreed if not self._given_back_again(*part)]
        for place in places:
            blocks = self._blocks.get(place.segment)
            if blocks is None:
                continue
            self.slack_nbytes -= blocks.slack_nbytes
            offset, nbytes = blocks.remove(place.offset, place.nbytes)
            self.slack_nbytes += blocks.slack_nbytes
            if blocks.live_nbytes <= 0 and place.segment != self._active:
                del self._blocks[place.segment]
                offset, nbytes = 0, WHOLE
            self._give_back(place.segment, offset, nbytes)

    def _give_back(self, number: int, offset: int, nbytes: int) -> None:
        """Take away a part of a segment, or note it for the next time."""
        try:
            self._take_away(number, offset, nbytes)
        except OSError as error:
            # No value is lost, and what is not taken before the daemon ends the next start finds (`recover`).
            log.warning("cold segment=%s event=free_failed error=%s", number, error)
            if len(self._unfreed) < UNFREED_MAX:
                self._unfreed.append((number, offset, nbytes))

    def _given_back_again(self, number: int, offset: int, nbytes: int) -> bool:
        """Whether the file system takes now what it did not take before, or it is nobody's any more."""
        is_there = number in self._blocks
        if is_there == (nbytes == WHOLE):
            return True  # unlinked meanwhile with all of its parts; or its number was given to a new segment
        try:
            self._take_away(number, offset, nbytes)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _take_away(self, number: int, offset: int, nbytes: int) -> None:
        """Punch a part of a segment, or unlink the WHOLE of it. Raises OSError."""
        if nbytes == WHOLE:
            self._unlink(number)
        else:
            self._punch(number, offset, nbytes)

    def sparsest(self, share: float, ignored: Container[int] = ()) -> int | None:
        """The closed segment with the most slack, if that is over `share` of its blocks; its records should move."""
        closed = ((n, blocks) for n, blocks in self._blocks.items() if n != self._active and n not in ignored)
        worth = [(b.slack_nbytes, n) for n, b in closed if b.slack_nbytes > share * b.count * BLOCK_NBYTES]
        return max(worth)[1] if worth else None

    def disk_nbytes(self) -> int:
        """Bytes that the segments take on the file system. Any thread; needs no descriptor."""
        numbers = {*self._blocks, *(number for number, _, _ in self._unfreed)}
        return sum(_allocated(self._file(number)) for number in numbers)

    def close(self) -> None:
        """Close the descriptors."""
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
        named = [file for file in self.path.glob(f"*{_SUFFIX}") if file.stem.isdecimal()]
        return {int(file.stem) for file in named if self._file(int(file.stem)) == file}

    def _place(self, offset: int, nbytes: int) -> Place:
        """A place in the active segment. It counts as live at once: else a full segment would look empty."""
        assert self._active is not None
        blocks = self._blocks[self._active]
        self.slack_nbytes -= blocks.slack_nbytes
        blocks.add(offset, nbytes)
        self.slack_nbytes += blocks.slack_nbytes
        return Place(self._active, offset, nbytes)

    def _start(self) -> None:
        self._drop_active()
        if self._next > SEGMENT_MAX:  # a stranger's file or row: ours do not get so far
            self._next = 1
        while self._next in self._blocks:
            self._next += 1
        number = self._next
        self._next += 1
        fd = self._disk.open(self._file(number), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._active, self._fd, self._tail = number, fd, 0
        self._blocks[number] = Occupancy()
        self._disk.sync_directory(self.path)

    def _drop_active(self) -> None:
        if self._active is None:
            return
        number, fd = self._active, self._fd
        self._active, self._fd, self._synced = None, -1, True
        self._disk.close(fd)
        if self._blocks[number].live_nbytes <= 0:
            del self._blocks[number]
            self._give_back(number, 0, WHOLE)

    def _write(self, buffers: Sequence[Buffer]) -> None:
        if buffers:
            self._disk.write(self._fd, buffers, self._tail)
            self._tail += sum(len(b) for b in buffers)
            self._synced = False

    def _sync(self) -> None:
        if not self._synced:
            self._disk.sync(self._fd)
            self._synced = True

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

    def _trim(self, number: int, blocks: Occupancy, gaps: list[tuple[int, int]], end: int) -> None:
        """Punch the blocks that no row needs, if the segment takes more blocks than the rows need."""
        path = self._file(number)
        if _allocated(path) <= (blocks.count + 1) * BLOCK_NBYTES:
            return
        for offset, nbytes in [*gaps, (end, path.stat().st_size - end)]:
            if nbytes > 0:
                self._punch(number, offset, nbytes)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0

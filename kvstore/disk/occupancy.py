"""Which blocks of a segment hold live records, and which places records take there.

A file system takes back whole blocks only. A record of 64 KiB or more begins at a block and shares no block: at most 6%
of it is lost, and freeing it gives back all its blocks. Smaller records are aligned to 64 bytes (a record of 4.8 KiB
would lose 3.2 KiB to whole blocks) and share blocks, so this counts the records that touch each block: one byte per 4
KiB, kept only for segments with small records. A record that leaves gives back the blocks that no other record touches;
the dead bytes in the remaining blocks are `slack_nbytes`.
Records of an older version all begin at blocks, which is a special case of this. Not thread-safe; knows no files.
"""

from typing import Any

import numpy as np

BLOCK_NBYTES = 4096
ALIGN_NBYTES = 64
SHARED_BELOW_NBYTES = 64 << 10
PlaceTable = np.ndarray[Any, np.dtype[np.int64]]
"""Places as rows of (segment, offset, nbytes): a million of them as tuples would take 200 MiB and a second."""
_Counts = np.ndarray[Any, np.dtype[np.uint8]]


def align_of(nbytes: int) -> int:
    """The alignment of a record of `nbytes`: it begins at a multiple of this, and its length is rounded up to one."""
    return ALIGN_NBYTES if nbytes < SHARED_BELOW_NBYTES else BLOCK_NBYTES


def place_nbytes(nbytes: int) -> int:
    """Bytes a record takes in its segment."""
    return round_up(nbytes, align_of(nbytes))


def places_nbytes(nbytes: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`place_nbytes` of a column."""
    align = np.where(nbytes < SHARED_BELOW_NBYTES, ALIGN_NBYTES, BLOCK_NBYTES)
    return -(-nbytes // align) * align


def round_up(nbytes: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-nbytes // unit) * unit


class Occupancy:
    """The blocks of one segment. live_nbytes: bytes of the places in use. count: blocks that live records touch."""

    __slots__ = ("_touching", "count", "live_nbytes")

    def __init__(self) -> None:
        self.live_nbytes = 0
        self.count = 0
        self._touching: _Counts | None = None

    @property
    def slack_nbytes(self) -> int:
        """Bytes of blocks in use that belong to no live record."""
        return self.count * BLOCK_NBYTES - self.live_nbytes

    def add(self, offset: int, nbytes: int) -> None:
        """Count a record at a place."""
        self.live_nbytes += place_nbytes(nbytes)
        first, last = _span(offset, nbytes)
        if nbytes >= SHARED_BELOW_NBYTES:
            self.count += last - first
            return
        touching = self._grown(last)
        self.count += int(np.count_nonzero(touching[first:last] == 0))
        touching[first:last] += 1

    def remove(self, offset: int, nbytes: int) -> tuple[int, int]:
        """Stop counting a record. Returns the offset and length to punch: its place, and all blocks that are free now.

        The whole place is punched, even if its first and last block stay: a hole reads as zeros, so a row that a
        damaged index brings back finds no record there.
        """
        self.live_nbytes -= place_nbytes(nbytes)
        first, last = _span(offset, nbytes)
        if nbytes >= SHARED_BELOW_NBYTES:
            self.count -= last - first
            return first * BLOCK_NBYTES, (last - first) * BLOCK_NBYTES
        touching = self._grown(last)
        touching[first:last] -= 1
        # Only the first and the last block can be shared, so the free ones are contiguous.
        free = np.flatnonzero(touching[first:last] == 0)
        self.count -= free.size
        start, stop = offset, offset + place_nbytes(nbytes)
        if free.size:
            start = min(start, (first + int(free[0])) * BLOCK_NBYTES)
            stop = max(stop, (first + int(free[-1]) + 1) * BLOCK_NBYTES)
        return start, stop - start

    def recover(self, rows: PlaceTable) -> list[tuple[int, int]]:
        """Count the (offset, nbytes) of all records at once. Returns the runs of free blocks between them to punch."""
        firsts = rows[:, 0] // BLOCK_NBYTES
        lasts = -(-(rows[:, 0] + rows[:, 1]) // BLOCK_NBYTES)
        small = rows[:, 1] < SHARED_BELOW_NBYTES
        self.live_nbytes = int(places_nbytes(rows[:, 1]).sum())
        self.count = int((lasts - firsts)[~small].sum())
        if small.any():
            self._touching = _touched(firsts[small], lasts[small]).astype(np.uint8)
            self.count += int(np.count_nonzero(self._touching))
        edges = np.diff(_touched(firsts, lasts) == 0, prepend=False, append=False)
        runs = np.flatnonzero(edges).reshape(-1, 2) * BLOCK_NBYTES
        return [(int(start), int(stop - start)) for start, stop in runs]

    def _grown(self, blocks: int) -> _Counts:
        if self._touching is None or self._touching.size < blocks:
            grown = np.zeros(max(blocks, 1024, 2 * (0 if self._touching is None else self._touching.size)), np.uint8)
            if self._touching is not None:
                grown[: self._touching.size] = self._touching
            self._touching = grown
        return self._touching


def _span(offset: int, nbytes: int) -> tuple[int, int]:
    return offset // BLOCK_NBYTES, -(-(offset + nbytes) // BLOCK_NBYTES)


def _touched(
    firsts: np.ndarray[Any, np.dtype[np.int64]], lasts: np.ndarray[Any, np.dtype[np.int64]]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each block the number of spans [first, last) that contain it, up to the last block of all spans."""
    size = int(lasts.max(initial=0))
    begin, end = np.bincount(firsts, minlength=size + 1), np.bincount(lasts, minlength=size + 1)
    counts: np.ndarray[Any, np.dtype[np.int64]] = np.cumsum(begin - end)[:size]
    return counts

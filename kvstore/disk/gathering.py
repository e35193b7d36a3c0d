"""Gathering small records: the few records that keep a segment's blocks are written elsewhere, the segment is unlinked.

Large records give their blocks back as holes and never need it (`occupancy`). Records move unchanged, with their
checksums; only their rows change. Each step moves one batch, so that puts and deletes wait a few milliseconds at most.
Thread rule: the writer's thread only. No other thread changes rows, so a row read at the beginning of a step is valid
until its end.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kvstore.disk import Buffer
from kvstore.disk.rows import Row, Rows
from kvstore.disk.segments import Place, Segments
from kvstore.keys import Key

SLACK_MAX = 0.15
"""Gathering begins above this idle share of the bytes held: files then stay under 1.2 times the live bytes."""
SPARSE_MIN = 0.3
"""The idle share of a segment from which gathering pays: two bytes written give one back."""
STEP_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """What one step moved: bytes written, records, and the places that no row names any more."""

    nbytes: int
    records: int
    freed: list[Place]


class Gatherer:
    """Moves the records of one sparse segment after the other. allowed: whether so many bytes may be written now."""

    def __init__(self, rows: Rows, segments: Segments, allowed: Callable[[int], bool]) -> None:
        self._rows = rows
        self._segments = segments
        self._allowed = allowed
        self._left: list[Key] = []
        self._number = 0
        self._given_up: set[int] = set()

    def due(self, used_nbytes: int) -> bool:
        """Whether a segment should be gathered, in a tier that holds `used_nbytes`."""
        if self._left:
            return True
        if self._segments.slack_nbytes <= SLACK_MAX * used_nbytes:
            return False
        return self._segments.sparsest(SPARSE_MIN, self._given_up) is not None and self._allowed(STEP_NBYTES)

    def step(self) -> Step:
        """Move a batch. Raises OSError or lmdb.Error: then no row has changed, and the segment waits for later."""
        if not self._left:
            number = self._segments.sparsest(SPARSE_MIN, self._given_up)
            if number is None:
                return Step(0, 0, [])
            # Tried only once: a record that cannot be read stays, and its segment would be the sparsest forever.
            self._given_up.add(number)
            self._number, self._left = number, self._rows.of_segment(number)
        left, self._left = self._left, []
        moving: list[tuple[Key, Row, Buffer]] = []
        nbytes = 0
        while left and nbytes < STEP_NBYTES:
            found = self._record(left.pop())
            if found is not None:
                moving.append(found)
                nbytes += found[1].place.nbytes
        places = self._segments.append([[record] for _, _, record in moving])
        try:
            moved = {key: replace(row, place=place) for (key, row, _), place in zip(moving, places, strict=True)}
            freed = self._rows.write(moved, [])
        except BaseException:
            self._segments.free(places)
            raise
        self._left = left
        return Step(nbytes, len(moved), freed)

    def _record(self, key: Key) -> tuple[Key, Row, Buffer] | None:
        """A key's row and its record's bytes; None when it left or moved meanwhile, or cannot be read."""
        row = self._rows.get(key)
        if row is None or row.place.segment != self._number:
            return None
        record = np.empty(row.place.nbytes, np.uint8)
        try:
            whole = self._segments.read(row.place, [record]) == row.place.nbytes
        except OSError:
            return None
        return (key, row, record.data) if whole else None

"""Room for puts in memory that the daemon lends to a connection, and what tells that something is let go of.

An interrupt may come between any two instructions (see `interrupts`): what ends is noted by C code in one step.
"""

import weakref
from collections import deque
from typing import Any, NamedTuple

from kvstore.shm.freelist import FreeList
from kvstored_client.shm.mapping import MappedSegment
from kvstored_client.wire.frames import Bytes


class Room(NamedTuple):
    """Bytes of an ingest segment, taken for as long as any array or tensor over them is there."""

    data: Bytes
    segment: int
    start: int


class Mark:
    """Something to hold, so that weak references tell when it is let go of."""

    __slots__ = ("__weakref__",)


class Ended(weakref.ref[Any]):
    """Put into a queue, by C code, when its object is gone: a finalizer that no interrupt can stop half-way.

    number: of a lease; start: of room.
    """

    __slots__ = ("number",)
    number: int


class IngestSegment:
    """An ingest segment: room for puts, given back when the last tensor over it is gone."""

    def __init__(self, number: int, mapping: MappedSegment) -> None:
        self.number = number
        self.mapping = mapping
        self._free = FreeList(mapping.nbytes)
        # Windows end wherever their last reference dies, also inside `take`.
        self._dead: deque[Ended] = deque()
        self._used: dict[int, Ended] = {}

    def take(self, nbytes: int) -> Room | None:
        """So many bytes; None where there is no room.

        Who is interrupted in here must not use this again: it may be half done.
        """
        while self._dead:
            start = self._dead.popleft().number
            del self._used[start]
            self._free.give(start)
        found = self._free.take(nbytes)
        if found is None:
            return None
        mark = Mark()
        used = self._used[found] = Ended(mark, self._dead.append)
        used.number = found
        return Room(self.mapping.window(found, nbytes, mark, writable=True).array, self.number, found)

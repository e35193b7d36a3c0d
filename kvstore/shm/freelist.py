"""Free room in one run of shared memory. No torch: clients use it for their ingest segments."""

from bisect import bisect_left, insort

from kvstore.shm.layout import ALIGN


class FreeList:
    """Free room of one run of bytes: best fit, neighbours joined when freed. Not thread-safe.

    Best fit, because KV chunks of one model have one size and fit the holes that such chunks left.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used_nbytes = 0
        self._by_size: list[tuple[int, int]] = [(nbytes, 0)]
        self._free: dict[int, int] = {0: nbytes}
        self._ends: dict[int, int] = {nbytes: 0}
        self._taken: dict[int, int] = {}

    @property
    def largest_nbytes(self) -> int:
        """The largest block that fits now."""
        return self._by_size[-1][0] if self._by_size else 0

    def holds(self, start: int) -> bool:
        """Whether a block that was taken begins here."""
        return start in self._taken

    def take(self, nbytes: int) -> int | None:
        """The start of a block of at least `nbytes`; None when no hole is large enough."""
        size = -(-max(nbytes, 1) // ALIGN) * ALIGN
        i = bisect_left(self._by_size, (size, 0))
        if i == len(self._by_size):
            return None
        hole, start = self._by_size[i]
        self._drop(start, hole)
        if hole > size:
            self._add(start + size, hole - size)
        self._taken[start] = size
        self.used_nbytes += size
        return start

    def give(self, start: int) -> None:
        """Give back a block by its start."""
        size = self._taken.pop(start)
        self.used_nbytes -= size
        before = self._ends.get(start)
        after = self._free.get(start + size)
        if after is not None:
            self._drop(start + size, after)
            size += after
        if before is not None:
            length = self._free[before]
            self._drop(before, length)
            start, size = before, size + length
        self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        insort(self._by_size, (size, start))
        self._free[start] = size
        self._ends[start + size] = start

    def _drop(self, start: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, start))]
        del self._free[start]
        del self._ends[start + size]

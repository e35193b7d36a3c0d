"""Which entries are written to disk: each byte written wears out a solid-state disk.

    all      every entry
    reused   entries that were hit at least once
    ghost    also entries that left the store lately and were put again: the second put counts as a hit
In addition there is a budget of bytes a day, a token bucket that holds one day's bytes: while it is empty only entries
that were hit at least once are written. A pinned entry is always written. Holds no lock: the store's lock covers
`deserves` and `refused`, and only the writer calls `wrote`.
"""

from collections import OrderedDict

from kvstore.clock import Clock
from kvstore.keys import Key
from kvstore.metadata.meta import Meta

GHOSTS_MAX = 65_536
"""Keys remembered after they left: 6 MiB, or prefixes of 16 million tokens in chunks of 256 tokens."""
DAY_S = 86_400.0


class Admission:
    """The rule and the bucket. nbytes_per_day: 0 for no budget."""

    def __init__(self, rule: str, nbytes_per_day: int, clock: Clock) -> None:
        self._rule = rule
        self._nbytes_per_day = nbytes_per_day
        self._clock = clock
        self._filled_at = clock.now()
        self._left_nbytes = float(nbytes_per_day)
        self._ghosts: OrderedDict[Key, None] = OrderedDict()
        self.refusals = 0

    def deserves(self, key: Key, meta: Meta) -> bool:
        """Whether an entry may be written now. Changes no state."""
        if meta.pinned or meta.hits > 0:
            return True
        if self.exhausted:
            return False
        return self._rule == "all" or (self._rule == "ghost" and key in self._ghosts)

    def refused(self, key: Key) -> None:
        """Remember an entry that left the store without a record."""
        self.refusals += 1
        self.left(key)

    def left(self, key: Key) -> None:
        """Remember an entry whose record was evicted."""
        if self._rule == "ghost":
            self._ghosts[key] = None
            self._ghosts.move_to_end(key)
            if len(self._ghosts) > GHOSTS_MAX:
                self._ghosts.popitem(last=False)

    def wrote(self, nbytes: int) -> None:
        """Count bytes that went to the disk; the bucket may go below zero by one batch."""
        self._left_nbytes = self.left_nbytes - nbytes
        self._filled_at = self._clock.now()

    @property
    def exhausted(self) -> bool:
        """Whether there is a budget and it is used up."""
        return self._nbytes_per_day > 0 and self.left_nbytes <= 0

    @property
    def left_nbytes(self) -> float:
        """Bytes that may still be written."""
        gained = (self._clock.now() - self._filled_at) * self._nbytes_per_day / DAY_S
        return min(self._left_nbytes + gained, float(self._nbytes_per_day))

    @property
    def shown_nbytes(self) -> float:
        """The same for people: 0 where there is no budget, or it is overdrawn."""
        return max(0.0, self.left_nbytes) if self._nbytes_per_day else 0.0

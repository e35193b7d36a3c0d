"""Which entries are worth a write: solid-state disks wear out by the byte.

    all      everything
    reused   what was hit at least once
    ghost    also what left the store lately and was put again: the second put is as good as a hit
Over all of them a budget of bytes a day, as a token bucket that holds one day's worth: while it is empty only what was
hit at least once is written. A pinned entry is always written. Holds no lock: the store's covers `deserves` and
`refused`, and `wrote` is called by the writer alone.
"""

from collections import OrderedDict

from kvstore.clock import Clock
from kvstore.keys import Key
from kvstore.metadata.meta import Meta

GHOSTS_MAX = 65_536
"""Keys remembered after they left: 6 MiB, and at a chunk of 256 tokens 16 million tokens' worth of prefixes."""
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
        """Whether an entry may be written now. Asking changes nothing."""
        if meta.pinned or meta.hits > 0:
            return True
        if self.exhausted:
            return False
        return self._rule == "all" or (self._rule == "ghost" and key in self._ghosts)

    def refused(self, key: Key) -> None:
        """An entry left the store without a record: remember that it was here."""
        self.refusals += 1
        self.left(key)

    def left(self, key: Key) -> None:
        """A record was evicted."""
        if self._rule == "ghost":
            self._ghosts[key] = None
            self._ghosts.move_to_end(key)
            if len(self._ghosts) > GHOSTS_MAX:
                self._ghosts.popitem(last=False)

    def wrote(self, nbytes: int) -> None:
        """So many bytes went to the disk; the bucket may go below zero by one batch."""
        self._left_nbytes = self.left_nbytes - nbytes
        self._filled_at = self._clock.now()

    @property
    def exhausted(self) -> bool:
        """Whether there is a budget and nothing of it is left."""
        return self._nbytes_per_day > 0 and self.left_nbytes <= 0

    @property
    def left_nbytes(self) -> float:
        """Bytes that may still be written."""
        gained = (self._clock.now() - self._filled_at) * self._nbytes_per_day / DAY_S
        return min(self._left_nbytes + gained, float(self._nbytes_per_day))

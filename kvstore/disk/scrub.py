"""Background reads of all records, so that damage is found while other copies of a value still exist.

The tier's read does all the work: it checks a record, and drops, counts and logs a corrupt one.
"""

from collections.abc import Iterator
from typing import Protocol

from kvstore.entries.entry import Entry
from kvstore.hit import Verified
from kvstore.keys import Key

SCRUB_NBYTES = 64 << 20
"""Bytes checked per turn, once a minute: 90 GiB a day, for some hundredths of a second of disk time each minute."""


class Readable(Protocol):
    """The tier that is scrubbed."""

    def keys(self) -> Iterator[Key]:
        """Keys."""
        ...

    def get(self, key: Key) -> Entry | None:
        """Read and check."""
        ...

    def nbytes_of(self, key: Key) -> int:
        """Bytes on disk."""
        ...


class Checkable(Readable, Protocol):
    """The tier that is verified."""

    @property
    def corrupt_total(self) -> int:
        """Records found damaged since the tier was opened."""
        ...


class Scrubber:
    """Reads a tier again and again, some bytes each turn."""

    def __init__(self, tier: Readable) -> None:
        self._tier = tier
        self._left: list[Key] = []

    def turn(self, nbytes: int) -> None:
        """Continue where the last turn stopped, until `nbytes` bytes are checked or all keys of the round are."""
        if not self._left:
            self._left = list(self._tier.keys())
        while nbytes > 0 and self._left:
            key = self._left.pop()
            nbytes -= max(self._tier.nbytes_of(key), 1)
            self._tier.get(key)


def verify(tier: Checkable) -> Iterator[Verified]:
    """Check every record while serving; yields the progress after each. Damaged records are dropped when found."""
    keys = list(tier.keys())
    corrupt, nbytes = tier.corrupt_total, 0
    yield Verified(0, len(keys), 0, 0)
    for done, key in enumerate(keys, start=1):
        held = tier.nbytes_of(key)
        # None does not mean damaged: the record may have been evicted or have expired since it was listed.
        tier.get(key)
        nbytes += held
        yield Verified(done, len(keys), nbytes, tier.corrupt_total - corrupt)

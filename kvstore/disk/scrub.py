"""Reading what nobody asks for, so that damage is found while the other copies of a value can still be had.

A read does all the work: it checks, and drops, counts and names what is corrupt.
"""

from collections.abc import Iterator
from typing import Protocol

from kvstore.entries.entry import Entry
from kvstore.hit import Verified
from kvstore.keys import Key

SCRUB_NBYTES = 64 << 20
"""Checked in one turn, once a minute: 90 GiB a day for a few hundredths of a second of disk time each minute."""


class Readable(Protocol):
    """What is scrubbed: a cold tier."""

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
    """What is verified."""

    @property
    def corrupt_total(self) -> int:
        """Records found damaged since the tier was opened."""
        ...


class Scrubber:
    """Goes round and round, a little each turn."""

    def __init__(self, tier: Readable) -> None:
        self._tier = tier
        self._left: list[Key] = []

    def turn(self, nbytes: int) -> None:
        """Read on where the last turn stopped until so many bytes are checked, or the round ends."""
        if not self._left:
            self._left = list(self._tier.keys())
        while nbytes > 0 and self._left:
            key = self._left.pop()
            nbytes -= max(self._tier.nbytes_of(key), 1)
            self._tier.get(key)


def verify(tier: Checkable) -> Iterator[Verified]:
    """Check every record while serving; after each, how far it is. Damaged ones are dropped as they are found."""
    keys = list(tier.keys())
    corrupt, nbytes = tier.corrupt_total, 0
    yield Verified(0, len(keys), 0, 0)
    for done, key in enumerate(keys, start=1):
        held = tier.nbytes_of(key)
        # Not "None means damaged": it may as well have been evicted or have expired since it was listed.
        tier.get(key)
        nbytes += held
        yield Verified(done, len(keys), nbytes, tier.corrupt_total - corrupt)

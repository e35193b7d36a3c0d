"""A tier is a bounded place for entries, in least-recently-used order.

A tier knows keys, sizes and order; never time, never the other tiers. `Store` walks them.
Memory tiers are not thread-safe: the store holds its lock around each call. The cold tier locks itself,
because its reads and writes take milliseconds and must not hold up the others.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

from kvstore.entry import Entry, Key

TierName = Literal["hot", "warm", "cold"]


class Tier(Protocol):
    """A bounded place. `used_nbytes` counts metadata and never exceeds `capacity_nbytes` after a put."""

    name: TierName
    capacity_nbytes: int

    @property
    def used_nbytes(self) -> int:
        """Bytes counted now."""
        ...

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...

    def keys(self) -> Iterator[Key]:
        """Keys, least recently used first."""
        ...

    def get(self, key: Key) -> Entry | None:
        """The entry, without counting as use. None: not here (or, cold, found corrupt and dropped)."""
        ...

    def displace(self, nbytes: int) -> Entry | None:
        """Make room: None when `nbytes` fit; else take out the least recently used unpinned entry and return it.

        Raises OverQuota when nothing is left to take out.
        """
        ...

    def put(self, entry: Entry) -> None:
        """Hold an entry as the most recently used, replacing one of the same key. Needs room: displace first."""
        ...

    def touch(self, keys: Iterable[Key]) -> None:
        """Count as use, in the order given: the last one becomes the most recently used."""
        ...

    def remove(self, key: Key) -> bool:
        """Forget a key. True: it was here."""
        ...

    def close(self) -> None:
        """Give back memory, files and threads."""
        ...

"""A tier is a bounded place for entries, in least-recently-used order.

A tier knows keys, sizes and order; never the time or the other tiers. `residency` moves entries between them.
Memory tiers are not thread-safe: the store holds its lock around each call. The cold tier locks itself,
because its reads and writes take milliseconds and must not hold up the others.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal, Protocol

from kvstore.entries.entry import Described, Entry
from kvstore.hit import Verified
from kvstore.keys import Key
from kvstore.tiers.admission import Admission

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
        """The entry; this does not count as use. None: not held here (or, in cold, found corrupt and dropped)."""
        ...

    def put(self, entry: Entry) -> None:
        """Hold an entry as the most recently used; it replaces an entry of the same key. Needs room: displace first."""
        ...

    def touch(self, keys: Collection[Key]) -> None:
        """Count as use, in the order given: the last one becomes the most recently used."""
        ...

    def pin(self, key: Key) -> None:
        """Keep a held key from eviction. Raises OverQuota over the tier's share for pins."""
        ...

    def unpin(self, key: Key) -> None:
        """Allow a key's eviction again."""
        ...

    def close(self) -> None:
        """Give back memory, files and threads."""
        ...


class LastTier(Tier, Protocol):
    """The lowest tier: entries that it displaces are gone, which it reports by itself. Locks itself.

    admission: the rule for entering this tier.
    """

    admission: Admission

    def get(self, key: Key, *, seen: bool = False) -> Entry | None:
        """As `Tier.get`. seen: the caller saw that the key is held, and gives out what was held then."""
        ...

    def displace(self, entry: Entry) -> None:
        """Make room for an entry, in the tier and in its owner's quotas, by evicting.

        Raises OverQuota if only pinned entries are left, TierUnavailable if the disk fails.
        """
        ...

    def resize(self, nbytes: int, pin_max_nbytes: int) -> int:
        """Another budget, and another limit of pins, by evicting what no longer fits. Returns how many left."""
        ...

    def let_go(self, keys: Iterable[Key]) -> list[tuple[Key, bool, int]]:
        """Take keys out of the order, not out of the tier: their owner changes. Returns (key, if pinned, bytes)."""
        ...

    def take_back(self, keys: Iterable[tuple[Key, bool, int]]) -> None:
        """Put the keys that `let_go` returned back into the order, under their present owners."""
        ...

    def tenants(self) -> dict[str, int]:
        """Bytes held by tenant."""
        ...

    def queue_removal(self, key: Key) -> int | None:
        """Forget a key at once and queue its durable deletion. Returns a ticket for `wait`; None: no deletion."""
        ...

    def wait(self, ticket: int | None) -> None:
        """Return when a ticket's operation is durable. Tickets rise."""
        ...

    def nbytes_of(self, key: Key) -> int:
        """Bytes counted for a key; 0 if it is not held here."""
        ...

    def specs_of(self, key: Key) -> Mapping[str, Described] | None:
        """The tensors' types, shapes and receipts."""
        ...

    def gauges(self) -> Mapping[str, float]:
        """Numbers of this tier for the store's statistics, by name."""
        ...

    def flush(self) -> None:
        """Return when all pending operations are durable."""
        ...

    def flush_meta(self) -> None:
        """Write order and deadlines to the index."""
        ...

    def verify(self) -> Iterator[Verified]:
        """Read and check every value, drop damaged ones, and yield the progress after each."""
        ...

    def maintain(self) -> None:
        """Do periodic work."""
        ...

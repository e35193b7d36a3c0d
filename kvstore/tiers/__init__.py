"""A tier is a bounded place for entries, in least-recently-used order.

A tier knows keys, sizes and order; never time, never the other tiers. `Store` walks them.
Memory tiers are not thread-safe: the store holds its lock around each call. The cold tier locks itself,
because its reads and writes take milliseconds and must not hold up the others.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
        """The entry, without counting as use. None: not here (or, cold, found corrupt and dropped)."""
        ...

    def put(self, entry: Entry) -> None:
        """Hold an entry as the most recently used, replacing one of the same key. Needs room: displace first."""
        ...

    def touch(self, keys: Collection[Key]) -> None:
        """Count as use, in the order given: the last one becomes the most recently used."""
        ...

    def pin(self, key: Key) -> None:
        """Keep a key held from leaving for capacity. Raises OverQuota over the tier's share for pins."""
        ...

    def unpin(self, key: Key) -> None:
        """Let it leave again."""
        ...

    def close(self) -> None:
        """Give back memory, files and threads."""
        ...


class LastTier(Tier, Protocol):
    """The tier with none below: what it displaces is gone, which it reports by itself. Locks itself.

    admission: which entries are worth a place here.
    """

    admission: Admission

    def displace(self, entry: Entry) -> None:
        """Make room for an entry, in the tier and in its owner's quotas, by evicting.

        Raises OverQuota when only pins are left, TierUnavailable when the disk fails.
        """
        ...

    def let_go(self, concerns: Callable[[Key], bool]) -> list[tuple[Key, bool]]:
        """Take keys out of the order, not out of the tier: their owner is about to change. Returns whether pinned."""
        ...

    def take_back(self, keys: Iterable[tuple[Key, bool]]) -> None:
        """Order again what `let_go` returned, under the owner each key has now."""
        ...

    def tenants(self) -> dict[str, int]:
        """Bytes held by tenant."""
        ...

    def queue_removal(self, key: Key) -> int | None:
        """Forget a key at once and queue its durable deletion. Returns a ticket to `wait` for; None: nothing is due."""
        ...

    def wait(self, ticket: int | None) -> None:
        """Return once what a ticket stands for is durable. Tickets rise."""
        ...

    def nbytes_of(self, key: Key) -> int:
        """Bytes counted for a key; 0 when it is not here."""
        ...

    def specs_of(self, key: Key) -> Mapping[str, Described] | None:
        """The tensors' types, shapes and receipts."""
        ...

    def gauges(self) -> Mapping[str, float]:
        """What the store's stats show of this tier, by name."""
        ...

    def flush(self) -> None:
        """Return once everything pending is durable."""
        ...

    def flush_meta(self) -> None:
        """Write down order and deadlines."""
        ...

    def verify(self) -> Iterator[Verified]:
        """Read and check every value, dropping what is damaged; how far it is after each."""
        ...

    def maintain(self) -> None:
        """Periodic work."""
        ...

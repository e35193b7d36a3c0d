"""Which key leaves a tier next. A policy only keeps an order: it sees keys, never bytes, sizes, time, chains or pins.

A pinned key is not tracked: its tier forgets it here and tracks it again when it is unpinned. A policy may remember
keys that were evicted (ghosts), at most as many as it tracks; `forget` leaves no ghost, `evict` may leave one.
Chunks arrive and are touched deepest first, root last. LRU then evicts leaf first by itself; for every policy the tier
evicts a victim's deepest descendant in its place (`tiers.order`), so no policy can leave an orphan.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from kvstore.keys import Key


class Policy(Protocol):
    """An order of keys. Not thread-safe: the tier's lock covers it."""

    def track(self, key: Key, *, soon: bool = False) -> None:
        """Track a key as the most recently used; `soon`: as the next to leave. A known key is touched."""
        ...

    def touch(self, keys: Iterable[Key]) -> list[Key]:
        """Count as use, in the order given. Returns the tracked ones; unknown keys are ignored."""
        ...

    def forget(self, key: Key) -> None:
        """Stop tracking a key, and drop its ghost. An unknown key is ignored."""
        ...

    def evict(self, key: Key) -> None:
        """Stop tracking a key because its place is needed. It need not be the `victim`. An unknown key is ignored."""
        ...

    def victim(self) -> Key | None:
        """The key that should leave next, still tracked; None if no key is."""
        ...

    def __iter__(self) -> Iterator[Key]:
        """Tracked keys, those that leave sooner first."""
        ...

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...


def policy_named(name: str) -> Callable[[], Policy]:
    """What makes a policy of this name. Raises KeyError for an unknown one: the configuration has checked it."""
    from kvstore.policies.arc import ARC
    from kvstore.policies.lru import LRU
    from kvstore.policies.s3fifo import S3FIFO

    factories: dict[str, Callable[[], Policy]] = {"lru": LRU, "arc": ARC, "s3fifo": S3FIFO}
    return factories[name]

"""Which key leaves next. A policy keeps order only: it sees keys, never bytes, sizes, time, chains or pins.

A pinned key is simply not tracked: its tier forgets it here and tracks it again when the pin is taken off. A policy may
remember keys that were evicted (ghosts), at most as many as it tracks; `forget` leaves no ghost, `evict` may.
Chunks arrive and are touched deepest first, root last. LRU then evicts leaf first by itself; for every policy the tier
evicts a victim's deepest descendant in its place (`tiers.order`), so none can leave an orphan.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from kvstore.keys import Key


class Policy(Protocol):
    """An order of keys. Not thread-safe: the tier's lock covers it."""

    def track(self, key: Key, *, soon: bool = False) -> None:
        """Start keeping a key, as the most recently used; `soon`: as the next to leave. A known key: as touch."""
        ...

    def touch(self, keys: Iterable[Key]) -> list[Key]:
        """Count as use, in the order given. Returns those it keeps: nothing happens to an unknown one."""
        ...

    def forget(self, key: Key) -> None:
        """Stop keeping a key, and any memory of it. An unknown key: nothing happens."""
        ...

    def evict(self, key: Key) -> None:
        """Stop keeping a key because its place was needed; not always the `victim`. An unknown key: nothing happens."""
        ...

    def victim(self) -> Key | None:
        """The key that should leave next, still tracked; None when there is none."""
        ...

    def __iter__(self) -> Iterator[Key]:
        """Keys, those likely to leave sooner first."""
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

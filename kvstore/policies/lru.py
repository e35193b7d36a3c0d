"""LRU order of keys.

Touched with the deepest chunk of a chain first and the root last, this plain list evicts exactly what a radix tree's
leaf-first LRU would: an ancestor is always more recent than its descendants. So no tree is kept.
"""

from collections.abc import Iterable, Iterator, Sequence

from kvstore.keys import Key
from kvstore.metadata.spread import Column
from kvstore.policies.key_order import KeyOrder


class LRU:
    """Least recently used first. All operations O(1)."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order = KeyOrder()

    def track(self, key: Key, *, soon: bool = False) -> None:
        """Track a key as the most recently used; `soon`: as the least recently used, if it is new."""
        if soon and key not in self._order:
            self._order.prepend(key)
        else:
            self._order.append(key)

    def track_all(self, keys: Sequence[Key], rows: Column, hashes: Column) -> None:
        """Track many new keys at once, see `KeyOrder.extend`; that of the last row is the most recently used."""
        self._order.extend(keys, rows, hashes)

    def touch(self, keys: Iterable[Key]) -> list[Key]:
        """Make known keys the most recently used, the last one the most recent. Returns the known keys."""
        return self._order.touch(keys)

    def forget(self, key: Key) -> None:
        """Stop tracking a key."""
        self._order.discard(key)

    def evict(self, key: Key) -> None:
        """Stop tracking a key; it leaves no ghost."""
        self._order.discard(key)

    def victim(self) -> Key | None:
        """The least recently used key."""
        return self._order.first()

    def keys_now(self) -> list[Key]:
        """A copy of all keys, least recently used first. Any thread, without the lock."""
        return self._order.keys_now()

    def __iter__(self) -> Iterator[Key]:
        """Keys, least recently used first."""
        return iter(self._order)

    def __contains__(self, key: object) -> bool:
        return key in self._order

    def __len__(self) -> int:
        return len(self._order)

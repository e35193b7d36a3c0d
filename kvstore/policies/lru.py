"""LRU order of keys.

Touched with the deepest chunk of a chain first and the root last, this plain list evicts exactly what a radix tree's
leaf-first LRU would: an ancestor is always more recent than its descendants. So no tree is kept.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from kvstore.keys import Key


class LRU:
    """Least recently used first. All operations O(1)."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def track(self, key: Key, *, soon: bool = False) -> None:
        """Track a key as the most recently used; `soon`: as the least recently used, if it is new."""
        if key not in self._order:
            self._order[key] = None  # at the end
            if soon:
                self._order.move_to_end(key, last=False)
        else:
            self._order.move_to_end(key)

    def touch(self, keys: Iterable[Key]) -> list[Key]:
        """Make known keys the most recently used, the last one the most recent. Returns the known keys."""
        known = list(filter(self._order.__contains__, keys))
        for key in known:
            self._order.move_to_end(key)
        return known

    def forget(self, key: Key) -> None:
        """Stop tracking a key."""
        self._order.pop(key, None)

    def evict(self, key: Key) -> None:
        """Stop tracking a key; it leaves no ghost."""
        self._order.pop(key, None)

    def victim(self) -> Key | None:
        """The least recently used key."""
        return next(iter(self._order), None)

    def __iter__(self) -> Iterator[Key]:
        """Keys, least recently used first."""
        return iter(self._order)

    def __contains__(self, key: object) -> bool:
        return key in self._order

    def __len__(self) -> int:
        return len(self._order)

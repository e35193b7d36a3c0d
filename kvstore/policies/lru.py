"""LRU order of keys.

Touched with the deepest chunk of a chain first and the root last, this plain list evicts exactly what a radix tree's
leaf-first LRU would: an ancestor is always more recent than its descendants. So no tree is kept.
"""

from kvstore.keys import Key
from kvstore.policies.key_order import KeyOrder


class LRU(KeyOrder):
    """Least recently used first. All operations O(1)."""

    __slots__ = ()

    def track(self, key: Key, *, soon: bool = False) -> None:
        """Track a key as the most recently used; `soon`: as the least recently used, if it is new."""
        if soon and key not in self:
            self.prepend(key)
        else:
            self.append(key)

    def forget(self, key: Key) -> None:
        """Stop tracking a key."""
        self.discard(key)

    def evict(self, key: Key) -> None:
        """Stop tracking a key; it leaves no ghost."""
        self.discard(key)

    def victim(self) -> Key | None:
        """The least recently used key."""
        return self.first()

"""Which keys of one tier continue which other keys, so that an eviction finds a chunk that nothing continues.

`chains` knows the children of a key wherever they are held; a root may have a million of them and a tier hold the last
one. This knows those that may leave this tier, so nobody looks through the others. A parent need not be held.
Not thread-safe: the tier's lock covers each call.
"""

from kvstore.keys import Key
from kvstore.metadata.spread import Spread
from kvstore.policies.key_order import KeyOrder

LEVELS_MAX = 1024
"""Chunks followed downwards for one eviction: 0.2 ms. Who touches a chain deepest first never goes down one."""


class Branches:
    """Children by parent. All operations O(1). Its owner does not ask it to add or drop a key without a parent."""

    def __init__(self) -> None:
        # Most chunks have one child: no container for it. Of several the newest is the first.
        self._below: Spread[Key | KeyOrder] = Spread()

    def __len__(self) -> int:
        return len(self._below)

    def add(self, key: Key, parent: Key) -> None:
        """Add a key, the newest child of its parent."""
        held = self._below.get(parent)
        if held is None:
            self._below[parent] = key
        elif isinstance(held, KeyOrder):
            held.prepend(key)
        elif held != key:
            children = self._below[parent] = KeyOrder()
            children.append(key)
            children.append(held)

    def drop(self, key: Key, parent: Key) -> None:
        """Drop a key from those of its parent, if it is there."""
        held = self._below.get(parent)
        if held is None:
            return
        if isinstance(held, KeyOrder):
            held.discard(key)
            if held:
                return
        elif held != key:
            return
        del self._below[parent]

    def leaf(self, key: Key) -> Key:
        """The newest chunk that continues a key, directly or not, and that none continues; itself if there is none."""
        for _ in range(LEVELS_MAX):
            held = self._below.get(key)
            if held is None:
                break
            newest = held.first() if isinstance(held, KeyOrder) else held
            assert newest is not None, "it has no children"
            key = newest
        return key

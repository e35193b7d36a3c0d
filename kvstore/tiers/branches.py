"""Which keys of one tier continue which other keys, so that an eviction finds a chunk that nothing continues.

`chains` knows the children of a key wherever they are held; a root may have a million of them and a tier hold the last
one. This knows those that may leave this tier, so nobody looks through the others. A parent need not be held.
Not thread-safe: the tier's lock covers each call.
"""

from collections import OrderedDict
from collections.abc import Mapping

from kvstore.keys import Key
from kvstore.metadata.meta import Meta

LEVELS_MAX = 1024
"""Chunks followed downwards for one eviction: 0.2 ms. Who touches a chain deepest first never goes down one."""


class Branches:
    """Children by parent. All operations O(1). index: the Metas, which name the parents."""

    def __init__(self, index: Mapping[Key, Meta]) -> None:
        self._index = index
        # Most chunks have one child: no container for it. Not a dict for the others: finding its last key takes a step
        # for each one that left.
        self._below: dict[Key, Key | OrderedDict[Key, None]] = {}

    def __len__(self) -> int:
        return len(self._below)

    def add(self, key: Key) -> None:
        """Add a key, the newest child of its parent."""
        meta = self._index.get(key)
        parent = None if meta is None else meta.parent
        if parent is None:
            return
        held = self._below.get(parent)
        if held is None:
            self._below[parent] = key
        elif isinstance(held, OrderedDict):
            held[key] = None
        elif held != key:
            self._below[parent] = OrderedDict.fromkeys((held, key))

    def drop(self, key: Key) -> None:
        """Drop a key, if it is there."""
        meta = self._index.get(key)
        parent = None if meta is None else meta.parent
        held = None if parent is None else self._below.get(parent)
        if parent is None or held is None:
            return
        if isinstance(held, OrderedDict):
            held.pop(key, None)
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
            key = next(reversed(held)) if isinstance(held, OrderedDict) else held
        return key

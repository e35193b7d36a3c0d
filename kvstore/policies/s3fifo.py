"""S3-FIFO: a small queue for new keys, a main queue for keys that were hit there, and ghosts of the others.

A hit moves no key: it is counted, up to 3. At the head of the small queue a key that was hit goes to the main queue,
and one that was not is evicted and remembered. At the head of the main queue a key with a count goes round once more
and loses one. A ghost that comes back enters the main queue at once.
Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1, with one hit enough to
be promoted. The capacity is the number of keys tracked, since a policy knows no bytes.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

from kvstore.keys import Key
from kvstore.metadata.index import Spread
from kvstore.policies.lru import KeyOrder

SMALL_SHARE = 0.1
"""Share of the tracked keys. The paper's choice; on the Mooncake trace 0.05 to 0.2 differ by less than a point."""
COUNT_MAX = 3
MOVES_MAX = 1024
"""Keys that move on for one eviction, 0.5 ms: were a million keys hit three times each, it would be three million."""
TRIM_MAX = 64
"""Ghosts forgotten at one eviction, which adds one: after many keys were deleted the rest go with the next ones."""


class S3FIFO:
    """Two queues of keys with their counts of hits, and ghosts. Amortized O(1), never more than `MOVES_MAX` steps."""

    __slots__ = ("_ghosts", "_hits", "_main", "_small")

    def __init__(self) -> None:
        self._small, self._main, self._ghosts = KeyOrder(), KeyOrder(), KeyOrder()
        self._hits: Spread[int] = Spread()  # of keys that have any

    def track(self, key: Key, *, soon: bool = False) -> None:
        """Track a key in the small queue, or in the main queue if it is a ghost; `soon`: at the head of its queue."""
        if key in self:
            self.touch((key,))
        else:
            queue = self._main if self._ghosts.discard(key) else self._small
            (queue.prepend if soon else queue.append)(key)

    def touch(self, keys: Iterable[Key]) -> list[Key]:
        """Count a hit of each. Returns the known keys."""
        known = [key for key in keys if key in self]
        for key in known:
            self._hits[key] = min((self._hits.get(key) or 0) + 1, COUNT_MAX)
        return known

    def forget(self, key: Key) -> None:
        """Stop tracking a key, and drop its ghost."""
        for keys in (self._small, self._main, self._ghosts):
            keys.discard(key)
        self._hits.take(key)

    def evict(self, key: Key) -> None:
        """Stop tracking a key; one of the small queue leaves a ghost."""
        self._hits.take(key)
        if self._small.discard(key):
            self._ghosts.append(key)
        else:
            self._main.discard(key)
        for _ in range(min(TRIM_MAX, len(self._ghosts) - len(self))):
            self._ghosts.pop_first()

    def victim(self) -> Key | None:
        """The first key at a head that was not hit; the keys before it move on, up to `MOVES_MAX` of them."""
        for _ in range(MOVES_MAX):
            small = self._small and (not self._main or len(self._small) > SMALL_SHARE * len(self))
            key = (self._small if small else self._main).first()
            if key is None:
                return None
            hits = self._hits.take(key)
            if not hits:
                return key
            if small:
                self._small.discard(key)
            elif hits > 1:
                self._hits[key] = hits - 1
            self._main.append(key)
        return next(iter(self), None)

    def __contains__(self, key: object) -> bool:
        return key in self._small or key in self._main

    def __iter__(self) -> Iterator[Key]:
        """The small queue, then the main queue, each from its head."""
        return chain(self._small, self._main)

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    @property
    def ghosts(self) -> int:
        """Keys remembered after they were evicted."""
        return len(self._ghosts)

"""S3-FIFO: a small queue for new keys, a main queue for keys that were hit there, and ghosts of the others.

A hit moves no key: it is counted, up to 3. At the head of the small queue a key that was hit goes to the main queue,
and one that was not is evicted and remembered. At the head of the main queue a key with a count goes round once more
and loses one. A ghost that comes back enters the main queue at once.
Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1, with one hit enough to
be promoted. The capacity is the number of keys tracked, since a policy knows no bytes.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain

from kvstore.keys import Key

SMALL_SHARE = 0.1
"""Share of the tracked keys. The paper's choice; on the Mooncake trace 0.05 to 0.2 differ by less than a point."""
COUNT_MAX = 3
MOVES_MAX = 1024
"""Keys that move on for one eviction, 0.5 ms: were a million keys hit three times each, it would be three million."""
TRIM_MAX = 64
"""Ghosts forgotten at one eviction, which adds one: after many keys were deleted the rest go with the next ones."""


class S3FIFO:
    """Two queues of keys with their counts of hits, and ghosts. Amortized O(1), never more than `MOVES_MAX` steps."""

    __slots__ = ("_ghosts", "_main", "_small")

    def __init__(self) -> None:
        self._small: OrderedDict[Key, int] = OrderedDict()
        self._main: OrderedDict[Key, int] = OrderedDict()
        self._ghosts: OrderedDict[Key, None] = OrderedDict()

    def track(self, key: Key, *, soon: bool = False) -> None:
        """Track a key in the small queue, or in the main queue if it is a ghost; `soon`: at the head of its queue."""
        if key in self:
            self.touch((key,))
        else:
            queue = self._main if key in self._ghosts else self._small
            self._ghosts.pop(key, None)
            queue[key] = 0
            queue.move_to_end(key, last=not soon)

    def touch(self, keys: Iterable[Key]) -> list[Key]:
        """Count a hit of each. Returns the known keys."""
        known = [key for key in keys if key in self]
        for key in known:
            queue = self._small if key in self._small else self._main
            queue[key] = min(queue[key] + 1, COUNT_MAX)
        return known

    def forget(self, key: Key) -> None:
        """Stop tracking a key, and drop its ghost."""
        self._small.pop(key, None)
        self._main.pop(key, None)
        self._ghosts.pop(key, None)

    def evict(self, key: Key) -> None:
        """Stop tracking a key; one of the small queue leaves a ghost."""
        if key in self._small:
            del self._small[key]
            self._ghosts[key] = None
        else:
            self._main.pop(key, None)
        for _ in range(min(TRIM_MAX, len(self._ghosts) - len(self))):
            self._ghosts.popitem(last=False)

    def victim(self) -> Key | None:
        """The first key at a head that was not hit; the keys before it move on, up to `MOVES_MAX` of them."""
        for _ in range(MOVES_MAX):
            if self._small and (not self._main or len(self._small) > SMALL_SHARE * len(self)):
                key, count = next(iter(self._small.items()))
                if not count:
                    return key
                del self._small[key]
                self._main[key] = 0
            else:
                if not self._main:
                    return None
                key, count = next(iter(self._main.items()))
                if not count:
                    return key
                self._main[key] = count - 1
                self._main.move_to_end(key)
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

"""When keys expire: a heap that is corrected late.

Sliding deadlines move with every get. The heap is not told: an item whose key turns out to live longer is pushed back
when it surfaces. So a get costs nothing here, and a key has one item however often it is used.
Not thread-safe: the store's lock covers each call.
"""

import heapq
from collections.abc import Callable

from kvstore.entry import Key


class Deadlines:
    """Keys by deadline. `deadline_of` tells a key's present deadline, or None when it is gone or does not expire."""

    def __init__(self, deadline_of: Callable[[Key], float | None]) -> None:
        self._deadline_of = deadline_of
        self._heap: list[tuple[float, Key]] = []
        self._scheduled: dict[Key, float] = {}

    def __len__(self) -> int:
        return len(self._scheduled)

    def watch(self, key: Key, expires_at: float) -> None:
        """Watch a key. Needed again only when its deadline moved to earlier, or after it surfaced in `due`."""
        if self._scheduled.get(key, float("inf")) <= expires_at:
            return
        self._scheduled[key] = expires_at
        heapq.heappush(self._heap, (expires_at, key))

    def due(self, now: float, limit: int) -> list[Key]:
        """Up to `limit` keys whose deadline has passed; they are no longer watched."""
        found: list[Key] = []
        while self._heap and self._heap[0][0] <= now and len(found) < limit:
            at, key = heapq.heappop(self._heap)
            if self._scheduled.get(key) != at:
                continue  # a second item of this key, pushed when its deadline moved to earlier
            del self._scheduled[key]
            expires_at = self._deadline_of(key)
            if expires_at is None:
                continue
            if expires_at > now:
                self.watch(key, expires_at)
            else:
                found.append(key)
        return found

"""When keys expire: buckets of one second each, corrected late.

Sliding deadlines move with every get, and the buckets are not updated: a key that lives longer is moved to a later
bucket when its bucket is due. So a get costs nothing here, and a key is in one bucket however often it is used. Its
Meta says which one (`watched_at`). A heap of pairs with a dictionary took 170 bytes a key, this takes 17.
Not thread-safe: the store's lock covers each call.
"""

import heapq
from collections.abc import Mapping
from math import floor, inf

from kvstore.keys import Key
from kvstore.metadata.meta import Meta


class Deadlines:
    """The keys of an index, ordered by their Metas' deadlines."""

    def __init__(self, index: Mapping[Key, Meta]) -> None:
        self._index = index
        self._buckets: dict[int, list[Key]] = {}
        self._order: list[int] = []

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def watch(self, key: Key, meta: Meta) -> None:
        """Watch a key. Needed again only if its deadline moved to an earlier time, or after `due` returned the key."""
        deadline = meta.deadline
        if deadline >= meta.watched_at or deadline == inf:
            return
        meta.watched_at = deadline
        number = floor(deadline)
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = []
            heapq.heappush(self._order, number)
        bucket.append(key)

    def due(self, now: float, limit: int) -> list[Key]:
        """Up to `limit` keys whose deadline has passed; they are no longer watched."""
        found: list[Key] = []
        while self._order and self._order[0] <= now and len(found) < limit:
            number = self._order[0]
            bucket, early = self._buckets[number], []
            while bucket and len(found) < limit:
                key = bucket.pop()
                meta = self._index.get(key)
                if meta is None or floor(min(meta.watched_at, 1e18)) != number:
                    continue  # gone, or moved to the bucket of an earlier deadline
                if floor(min(meta.deadline, 1e18)) == number and meta.deadline > now:
                    early.append(key)
                    continue
                meta.watched_at = inf
                if meta.deadline <= now:
                    found.append(key)
                else:
                    self.watch(key, meta)
            bucket.extend(early)
            if bucket:
                break  # the rest of this second waits for the next call
            heapq.heappop(self._order)
            del self._buckets[number]
        return found

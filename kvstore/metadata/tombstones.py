"""Why keys are gone: the latest departures, bounded.

It answers an operator's question where a key went; no decision of the store depends on it. It holds no values. After
`capacity` departures the oldest one is dropped, and its key counts as never put.
Not thread-safe: the store's lock covers each call.
"""

from collections import OrderedDict
from typing import Literal, NamedTuple

from kvstore.keys import Key

GoneCause = Literal["expired", "evicted", "corrupt", "over quota", "deleted", "orphaned", "write failed"]
"""orphaned: the chunk before it left, so no prompt could match it any more."""

TOMBSTONES_MAX = 16_384
"""About 4 MB, 250 bytes each: the last minutes of a busy store, the last days of a quiet one."""


class Tombstone(NamedTuple):
    """One departure. tier: the lowest tier that held the key, "" if none did. at: Unix seconds. hits: of its life."""

    cause: GoneCause
    tier: str
    at: float
    hits: int


class Tombstones:
    """The latest departures by key."""

    def __init__(self, capacity: int = TOMBSTONES_MAX) -> None:
        self._capacity = capacity
        self._stones: OrderedDict[Key, Tombstone] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stones)

    def add(self, key: Key, stone: Tombstone) -> None:
        """Note that a key is gone."""
        self._stones.pop(key, None)
        self._stones[key] = stone
        if len(self._stones) > self._capacity:
            self._stones.popitem(last=False)

    def discard(self, key: Key) -> None:
        """Forget a tombstone: the key is back."""
        self._stones.pop(key, None)

    def get(self, key: Key) -> Tombstone | None:
        """Why a key is gone, if that is still known."""
        return self._stones.get(key)

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


class Tombstones(OrderedDict[Key, Tombstone]):
    """The latest departures by key, the oldest first."""

    def __init__(self, capacity: int = TOMBSTONES_MAX) -> None:
        super().__init__()
        self._capacity = capacity

    def add(self, key: Key, stone: Tombstone) -> None:
        """Note that a key is gone."""
        self[key] = stone
        self.move_to_end(key)
        if len(self) > self._capacity:
            self.popitem(last=False)

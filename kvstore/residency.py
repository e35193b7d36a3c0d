"""Which key is where: the tiers, the index of Metas, and the entries on their way between two tiers.

Invariants, all under `lock`:
- A key has a Meta exactly as long as some tier, or `transit`, holds it.
- An entry in transit has left one tier and not reached the next; it can still be read.
- A lossy copy in hot never outlives the encoded form below it. So an entry is encoded once in its life, and after any
  number of trips its bytes are those of the first encoding.
- What the cold tier drops by itself it reports through `dropped_from_cold`, not holding its own lock.
Thread rule: hold `lock` for every call here; the cold tier is read and flushed outside it.
"""

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvstore.clock import Clock
from kvstore.deadlines import Deadlines
from kvstore.entry import Entry, Key
from kvstore.index import Meta
from kvstore.inflight import InFlight
from kvstore.stats import Counters, MissCause, TierCounters
from kvstore.tiers import TierName
from kvstore.tiers.memory import MemoryTier

if TYPE_CHECKING:
    from kvstore.tiers.cold import Cold  # lmdb is needed by who has a disk tier, not by a store in memory


class Residency:
    """The store's state. `hot` and `warm` are memory; `cold` is None for a store without a disk."""

    def __init__(self, clock: Clock, hot: MemoryTier, warm: MemoryTier) -> None:
        self.lock = threading.RLock()
        self.clock = clock
        self.hot = hot
        self.warm = warm
        self.cold: Cold | None = None
        self.index: dict[Key, Meta] = {}
        self.transit: dict[Key, tuple[TierName, Entry]] = {}
        self.flights = InFlight()
        self.deadlines = Deadlines(self._deadline_of)
        names: tuple[TierName, ...] = ("hot", "warm", "cold")
        self.counters = Counters(tiers={name: TierCounters() for name in names})

    def _deadline_of(self, key: Key) -> float | None:
        meta = self.index.get(key)
        return None if meta is None or meta.pinned else meta.expires_at

    def in_cold(self, key: Key) -> bool:
        """Whether the cold tier holds the key."""
        return self.cold is not None and key in self.cold

    def tiers_of(self, key: Key) -> list[TierName]:
        """Where the key is held, uppermost first. An entry in transit counts as in the tier it left."""
        moving = self.transit.get(key)
        left = moving[0] if moving is not None else None
        found = [tier.name for tier in (self.hot, self.warm) if key in tier or tier.name == left]
        if self.in_cold(key):
            found.append("cold")
        return found

    def peek(self, key: Key) -> Meta | None:
        """The Meta of a key that is held and not expired. An expired one is left for a get to find and count."""
        meta = self.index.get(key)
        return None if meta is None or meta.expired(self.clock.now()) else meta

    def live(self, key: Key) -> Meta | None:
        """The Meta of a key that is held and has not expired; an expired one is forgotten here and now."""
        meta = self.index.get(key)
        if meta is None:
            return None
        if meta.expired(self.clock.now()):
            self.expire(key)
            return None
        return meta

    def lookup(self, key: Key) -> tuple[TierName, Entry | None] | None:
        """The uppermost place of a live key, and the entry there: None for cold, which is read outside the lock."""
        entry = self.hot.get(key)
        if entry is not None:
            return "hot", entry
        moving = self.transit.get(key)
        if moving is not None:
            return moving
        entry = self.warm.get(key)
        if entry is not None:
            return "warm", entry
        return ("cold", None) if self.in_cold(key) else None

    def miss_cause(self, key: Key) -> MissCause:
        """Why a key that is not live is missing, as far as the index still knows."""
        return "absent" if key not in self.index else "expired"

    def touch(self, keys_deepest_first: Iterable[Key]) -> None:
        """Count as use, in every tier that holds them."""
        keys = list(keys_deepest_first)
        self.hot.touch(keys)
        self.warm.touch(keys)
        if self.cold is not None:
            self.cold.touch(keys)

    def forget(self, key: Key) -> int | None:
        """Take a key out of everything at once, and leave a tombstone for work under way.

        The deletion on disk is queued. Who promises that the value never comes back waits for the ticket returned,
        outside the lock: `cold.wait`.
        """
        self.flights.call_off(key)
        self.transit.pop(key, None)
        self.hot.remove(key)
        self.warm.remove(key)
        self.index.pop(key, None)
        return self.cold.queue_removal(key) if self.cold is not None else None

    def expire(self, key: Key) -> None:
        """Forget a key whose deadline has passed. Nobody waits: should a crash bring it back, so does its deadline."""
        self.forget(key)
        self.counters.expirations += 1

    def forget_if_gone(self, key: Key) -> bool:
        """Drop the Meta of a key that no tier holds any more. True: it is gone."""
        if self.tiers_of(key):
            return False
        self.flights.call_off(key)
        return self.index.pop(key, None) is not None

    def lost_clean_copy(self, key: Key) -> None:
        """The encoded form of a key has left its last tier: a lossy copy in hot goes with it."""
        entry = self.hot.get(key)
        kept = key in self.warm or key in self.transit or self.in_cold(key)
        if entry is not None and entry.lossy and not kept:
            self.hot.remove(key)

    def dropped_from_cold(self, key: Key, reason: str) -> None:
        """The cold tier let go of a key: "evicted" for capacity, "corrupt", or another word of its own."""
        with self.lock:
            if self.in_cold(key):
                return  # put again since
            if reason == "evicted":
                self.counters.tiers["cold"].evictions += 1
            self.lost_clean_copy(key)
            self.forget_if_gone(key)

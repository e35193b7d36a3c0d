"""A tier in memory: entries as they are, in a dictionary, in the order of a policy.

Serves as hot (raw tensors on the hot device) and as warm (encoded tensors in RAM).
Invariants: `used_nbytes` is the sum of `entry.nbytes` held, and at most `capacity_nbytes` after every put; every key
held is either tracked by the policy or pinned, never both. Not thread-safe: the store's lock covers each call.
"""

from collections.abc import Callable, Iterable, Iterator

from kvstore.entry import Entry, Key
from kvstore.errors import OverQuota
from kvstore.policies import Policy
from kvstore.policies.lru import LRU
from kvstore.tiers import TierName


class MemoryTier:
    """A bounded dictionary of entries."""

    def __init__(
        self,
        name: TierName,
        capacity_nbytes: int,
        *,
        pin_max_fraction: float = 0.5,
        policy: Callable[[], Policy] = LRU,
    ) -> None:
        self.name: TierName = name
        self.capacity_nbytes = capacity_nbytes
        self._pin_max_nbytes = int(capacity_nbytes * pin_max_fraction)
        self._entries: dict[Key, Entry] = {}
        self._order = policy()
        self._pinned: set[Key] = set()
        self._used_nbytes = 0
        self._pinned_nbytes = 0

    @property
    def used_nbytes(self) -> int:
        """Bytes counted now, metadata included."""
        return self._used_nbytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def keys(self) -> Iterator[Key]:
        """Keys, least recently used first; pinned ones last."""
        yield from self._order
        yield from self._pinned

    def get(self, key: Key) -> Entry | None:
        """The entry, without counting as use."""
        return self._entries.get(key)

    def admits(self, nbytes: int) -> bool:
        """Whether an entry of this size could be held if everything unpinned left."""
        return nbytes <= self.capacity_nbytes - self._pinned_nbytes

    def displace(self, nbytes: int) -> Entry | None:
        """Make room: None when `nbytes` fit, else the entry taken out. Raises OverQuota when only pins are left."""
        if self._used_nbytes + nbytes <= self.capacity_nbytes:
            return None
        key = self._order.victim()
        if key is None:
            raise OverQuota(
                f"{nbytes} bytes do not fit the {self.name} tier: {self._pinned_nbytes} of its "
                f"{self.capacity_nbytes} bytes are pinned"
            )
        entry = self._entries[key]
        self.remove(key)
        return entry

    def put(self, entry: Entry) -> None:
        """Hold an entry as the most recently used, replacing one of the same key. Displace first."""
        pinned = entry.key in self._pinned
        self.remove(entry.key)
        if self._used_nbytes + entry.nbytes > self.capacity_nbytes:
            raise OverQuota(f"the {self.name} tier has no room for {entry.nbytes} bytes: displace first")
        self._entries[entry.key] = entry
        self._used_nbytes += entry.nbytes
        self._order.track(entry.key)
        if pinned:
            self.pin(entry.key)

    def touch(self, keys: Iterable[Key]) -> None:
        """Count as use, in the order given."""
        for key in keys:
            self._order.touch(key)

    def remove(self, key: Key) -> bool:
        """Forget a key and its pin."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        self.unpin(key)
        del self._entries[key]
        self._order.forget(key)
        self._used_nbytes -= entry.nbytes
        return True

    def pin(self, key: Key) -> None:
        """Keep a key from `displace`. Raises OverQuota over the tier's share for pins. Unknown or pinned: nothing."""
        entry = self._entries.get(key)
        if entry is None or key in self._pinned:
            return
        if self._pinned_nbytes + entry.nbytes > self._pin_max_nbytes:
            raise OverQuota(
                f"pinning {entry.nbytes} bytes would make {self._pinned_nbytes + entry.nbytes} pinned bytes in the "
                f"{self.name} tier, the limit is {self._pin_max_nbytes}"
            )
        self._pinned.add(key)
        self._pinned_nbytes += entry.nbytes
        self._order.forget(key)

    def unpin(self, key: Key) -> None:
        """Let a key be displaced again, as the most recently used."""
        if key in self._pinned:
            self._pinned.remove(key)
            self._pinned_nbytes -= self._entries[key].nbytes
            self._order.track(key)

    def close(self) -> None:
        """Let go of every entry."""
        for key in list(self._entries):
            self.remove(key)

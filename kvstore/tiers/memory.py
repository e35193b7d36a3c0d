"""A tier in memory: entries in a dictionary, with an order of eviction.

Serves as hot (raw tensors, in RAM or on a device) and as warm (encoded tensors in RAM).
Invariants: `used_nbytes` is the sum of `entry.nbytes` held, and at most `capacity_nbytes` after every put; the order
holds exactly the keys held. Not thread-safe: the store's lock covers each call.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

from kvstore.entries.entry import Entry
from kvstore.errors import OverQuota
from kvstore.keys import Key
from kvstore.metadata.index import Spread
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import NOBODY, Owner
from kvstore.tiers import TierName
from kvstore.tiers.order import Order
from kvstore.untracked import untrack_held


class MemoryTier:
    """A bounded dictionary of entries. order: who leaves next; it is told of use without a word to the tier."""

    def __init__(
        self, name: TierName, capacity_nbytes: int, *, pin_max_fraction: float = 0.5, order: Order | None = None
    ) -> None:
        """order: who leaves next, and how much may be pinned; by default LRU, and that fraction of the capacity."""
        self.name: TierName = name
        self.capacity_nbytes = capacity_nbytes
        self._entries: Spread[Entry] = Spread()
        self.get = self._entries.get
        """The entry of a key, None if it is not held. This does not count as use."""
        self.get_all = self._entries.get_all
        """The same of each of several keys."""
        pin_max_nbytes = int(capacity_nbytes * pin_max_fraction)
        self.order = Order(tier=name, pin_max_nbytes=pin_max_nbytes) if order is None else order
        self._used_nbytes = 0

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
        return iter(self.order)

    def keys_now(self) -> list[Key]:
        """A copy of `keys`. Any thread, without the lock: a million take some milliseconds."""
        return self.order.keys_now()

    def tenants(self) -> dict[str, int]:
        """Bytes held by tenant."""
        return self.order.used()

    def leaf(self, key: Key) -> Key:
        """A chunk that continues a key, that this tier holds unpinned, and that none in it continues; or the key."""
        return self.order.leaf(key)

    def let_go(self, keys: Iterable[Key]) -> list[tuple[Key, bool, int]]:
        """Take keys out of the order, not out of the tier: their owner changes. Returns (key, if pinned, bytes)."""
        found = [(key, self.order.is_pinned(key), self._entries[key].nbytes) for key in keys if key in self._entries]
        for key, _, nbytes in found:
            self.order.forget(key, nbytes)
        return found

    def take_back(self, keys: Iterable[tuple[Key, bool, int]]) -> None:
        """Put the keys that `let_go` returned back into the order, under their present owners."""
        for key, pinned, nbytes in keys:
            self.order.track(key, nbytes)
            if pinned:
                self.order.pin(key, nbytes)

    def resize(self, nbytes: int, pin_max_nbytes: int) -> None:
        """Another budget, and another limit of pins. It may hold more until somebody displaces the rest."""
        self.capacity_nbytes = nbytes
        self.order.set_pin_limit(pin_max_nbytes)

    def admits(self, nbytes: int, key: Key, owner: Owner) -> bool:
        """Whether an entry of this size fits if all unpinned entries leave, within its owner's quotas."""
        return nbytes <= self.capacity_nbytes - self.order.pinned_beside(key) and self.order.admits(owner, nbytes)

    def has_room_for(self, nbytes: int, owner: Owner) -> bool:
        """Whether an owner can put so many bytes more now."""
        return self._used_nbytes + nbytes <= self.capacity_nbytes and (
            not owner.limited or self.order.within_quota(owner, nbytes)
        )

    def has_room(self, nbytes: int, key: Key, owner: Owner) -> bool:
        """Whether an entry of this size can be put now; it replaces the entry of the same key, if there is one."""
        replaced = self._entries.get(key)
        return self.has_room_for(nbytes if replaced is None else nbytes - replaced.nbytes, owner)

    def displace(self, nbytes: int, key: Key, owner: Owner = NOBODY) -> Entry | None:
        """Make room for `nbytes` of an owner under `key`. Returns None if they fit, else one entry, taken out.

        Raises OverQuota if only pinned entries are left.
        """
        return None if self.has_room(nbytes, key, owner) else self.take_next(nbytes, owner)

    def take_next(self, nbytes: int, owner: Owner) -> Entry:
        """The entry that is the next to leave for `nbytes` of an owner, taken out. Raises OverQuota as `displace`."""
        victim = self.order.victim(owner, nbytes)
        if victim is None:
            raise OverQuota(
                f"{nbytes} bytes do not fit the {self.name} tier: {self.order.pinned_nbytes} of its "
                f"{self.capacity_nbytes} bytes are pinned; unpin something or enlarge the tier"
            )
        entry = self._entries.pop(victim)
        self._used_nbytes -= entry.nbytes
        self.order.evict(victim, entry.nbytes)
        return entry

    def put(self, entry: Entry, *, soon: bool = False, meta: Meta | None = None) -> None:
        """Hold an entry as the most recently used; it replaces an entry of the same key. Displace first.

        soon: as the next to leave, unless it is used. meta: the key's, where the caller has it.
        """
        key, nbytes, pinned = entry.key, entry.nbytes, False
        if key in self._entries:
            pinned = self.order.is_pinned(key)
            self.remove(key)
        if self._used_nbytes + nbytes > self.capacity_nbytes:
            raise OverQuota(f"the {self.name} tier has no room for {nbytes} bytes: displace first")
        untrack_held([(entry, meta)])
        self._entries[key] = entry
        self._used_nbytes += nbytes
        self.order.track(key, nbytes, soon=soon, meta=meta)
        if pinned:
            self.order.pin(entry.key, entry.nbytes)

    def put_new(self, held: Sequence[tuple[Entry, Meta]], nbytes: int) -> None:
        """`put` of one owner's entries that are not held and have room, the last one as the most recently used.

        nbytes: of all of them.
        """
        untrack_held(held)
        for entry, _ in held:
            self._entries[entry.key] = entry
        self._used_nbytes += nbytes
        self.order.track_all(held, nbytes)

    def replace(self, held: Entry, other: Entry) -> bool:
        """Hold another object of the same value in an entry's place. False: it is held no more, and nothing changes."""
        if self._entries.get(held.key) is not held or other.nbytes != held.nbytes:
            return False
        untrack_held([(other, None)])
        self._entries[held.key] = other
        return True

    def touch(self, keys: Collection[Key]) -> None:
        """Count as use, in the order given."""
        self.order.touch(keys)

    def remove(self, key: Key) -> bool:
        """Forget a key and its pin."""
        entry = self._entries.take(key)
        if entry is None:
            return False
        self.order.forget(key, entry.nbytes)
        self._used_nbytes -= entry.nbytes
        return True

    def pin(self, key: Key) -> None:
        """Keep a held key from `displace`. Does nothing if it is pinned. Raises OverQuota over the share for pins."""
        entry = self._entries.get(key)
        if entry is None or self.order.is_pinned(key):
            return
        self.order.check_pin(key, entry.nbytes)
        self.order.pin(key, entry.nbytes)

    def unpin(self, key: Key) -> None:
        """Allow `displace` to take a key again; it counts as the most recently used."""
        self.order.unpin(key)

    def close(self) -> None:
        """Drop every entry."""
        for key in list(self._entries):
            self.remove(key)

"""Which key is where: the tiers, the index of Metas, and the entries on their way between two tiers.

Invariants, all under `lock`:
- A key has a Meta exactly as long as some tier, or `transit`, holds it.
- No orphans: a chunk put with a parent has a Meta only while its parent has one (`chains`).
- An entry in transit has left one tier and not reached the next; it can still be read.
- A lossy copy in hot never outlives the encoded form below it. So an entry is encoded once in its life, and after any
  number of trips its bytes are those of the first encoding.
- What the cold tier drops by itself it reports through `dropped_from_cold`, not holding its own lock.
- A key in `leaving` is expired, so gone for every verb; it and what continues it are still to be taken out.
Thread rule: hold `lock` for every call here; the cold tier is read and flushed outside it. Whoever takes the lock finds
every get counted that was answered before. No call follows more links than `Lock.steps` has left of one hold: a chain
with more chunks leaves in slices, the deepest chunks first, so that there are no orphans meanwhile.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf

from kvstore.clock import Clock
from kvstore.entries.entry import Entry
from kvstore.keys import Key
from kvstore.metadata.block_events import BlockEvents
from kvstore.metadata.chains import Chains
from kvstore.metadata.deadlines import Deadlines
from kvstore.metadata.inflight import InFlight
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import NOBODY, Owner
from kvstore.metadata.slices import STEPS, slices
from kvstore.metadata.tenants import Tenants
from kvstore.metadata.tombstones import GoneCause, Tombstone, Tombstones
from kvstore.residency.lookups import Lookups
from kvstore.stats import Counters, MissCause, TierCounters
from kvstore.tiers import LastTier, TierName
from kvstore.tiers.balance import Balance
from kvstore.tiers.memory import MemoryTier


class Lock(type(threading.RLock())):  # type: ignore[misc]  # CPython's own class, which has no public name
    """The store's lock. owed: what a get left to be counted after its answer, which is done before anything else.

    So no verb can see the store without it, and none has to ask for it. Taken by `with` alone.
    steps: what is left of the links that may be followed, and of the keys that may leave, in this hold.
    """

    def __init__(self) -> None:
        self.owed: deque[Callable[[], None]] = deque()
        self.steps = STEPS

    def __enter__(self) -> bool:
        self.acquire()
        self.steps = STEPS
        try:
            while self.owed:
                self.owed.popleft()()
        except BaseException:
            self.release()
            raise
        return True


@dataclass(slots=True, eq=False)
class Departure:
    """A key that leaves, with the chunks that continue it.

    tier: the one it left last, if it is in none any more. at, meta: how far the walk over the chunks has come, and the
    Meta that was there: while it still is, so is everything above it. ticket: of the last deletion queued on the disk.
    """

    key: Key
    cause: GoneCause
    tier: str = ""
    at: Key | None = None
    meta: Meta | None = None
    ticket: int | None = None


class Residency:
    """The store's state. `hot` and `warm` are memory; `cold` is None for a store without a disk."""

    def __init__(self, clock: Clock, chains: Chains, *, hot: MemoryTier, warm: MemoryTier, tenants: Tenants) -> None:
        self.lock = Lock()
        self.clock = clock
        self.hot = hot
        self.warm = warm
        self.cold: LastTier | None = None
        self.chains = chains
        self.tenants = tenants
        self.index = chains.index
        self.tombstones = Tombstones()
        self.transit: dict[Key, tuple[TierName, Entry]] = {}
        self.flights = InFlight()
        self.deadlines = Deadlines(self.index, clock.now())
        self.leaving: OrderedDict[Key, Departure] = OrderedDict()
        self.balance: Balance | None = None
        self.deleted: Callable[[Key], None] | None = None
        """Told, under the lock, of each key that a caller deletes, and of each that goes with it."""
        self.events: BlockEvents | None = None
        """For routers, of each key that comes and that leaves; None: nobody publishes them."""
        names: tuple[TierName, ...] = ("hot", "warm", "cold")
        self.counters = Counters(tiers={name: TierCounters() for name in names})
        self.lookups = Lookups(self.counters.lookups)

    def in_cold(self, key: Key) -> bool:
        """Whether the cold tier holds the key."""
        return self.cold is not None and key in self.cold

    def tier(self, name: TierName) -> MemoryTier | LastTier:
        """A tier by name."""
        tiers: dict[TierName, MemoryTier | LastTier | None] = {"hot": self.hot, "warm": self.warm, "cold": self.cold}
        found = tiers[name]
        assert found is not None
        return found

    def tiers_of(self, key: Key) -> list[TierName]:
        """Where the key is held, uppermost first. An entry in transit counts as in the tier it left."""
        moving = self.transit.get(key)
        left = moving[0] if moving is not None else None
        found = [tier.name for tier in (self.hot, self.warm) if key in tier or tier.name == left]
        if self.in_cold(key):
            found.append("cold")
        return found

    def in_a_tier(self, key: Key) -> bool:
        """Whether a tier holds the key, or will once it has arrived there.

        False with a Meta: cold has let go of the key, and has not yet told.
        """
        return key in self.hot or key in self.warm or key in self.transit or self.in_cold(key)

    def peek(self, key: Key) -> Meta | None:
        """The Meta of a key that is held and not expired. An expired one is left for a get to find and count."""
        meta = self.index.get(key)
        return None if meta is None or meta.expired(self.clock.now()) else meta

    def live(self, key: Key) -> Meta | None:
        """The Meta of a key that is held and has not expired; an expired one is forgotten here and now."""
        meta = self.index.get(key)
        if meta is None:
            return None
        now = self.clock.now()
        if meta.pinned and now >= meta.pinned_until:
            self.unpin(key)
        if meta.expired(now):
            self.expire(key)
            return None
        return meta

    def first_missing(self, keys: Sequence[Key]) -> int:
        """How many of the leading keys are held and have not expired. Any thread, without the lock; forgets nothing."""
        index, now = self.index, self.clock.now()
        for i, meta in enumerate(map(index.get, keys)):
            if meta is None or now >= meta.deadline:
                return i
        return len(keys)

    def first_held(self, keys: Sequence[Key]) -> int:
        """Which of some keys is the first that is held and has not expired; their number: none is. As above."""
        index, now = self.index, self.clock.now()
        for i, meta in enumerate(map(index.get, keys)):
            if meta is not None and now < meta.deadline:
                return i
        return len(keys)

    def lookup(self, key: Key) -> tuple[TierName, Entry | None] | None:
        """The uppermost place of a live key, and the entry there: None for cold, which is read outside the lock."""
        entry = self.hot.get(key)
        return self.lookup_below(key) if entry is None else ("hot", entry)

    def lookup_below(self, key: Key) -> tuple[TierName, Entry | None] | None:
        """The same of a key that is not in hot."""
        moving = self.transit.get(key)
        if moving is not None:
            return moving
        entry = self.warm.get(key)
        if entry is not None:
            return "warm", entry
        return ("cold", None) if self.in_cold(key) else None

    def miss_cause(self, key: Key) -> MissCause:
        """Why a key is missing, as far as that is still known: two looks, and nothing is made for it."""
        gone = self.leaving.get(key) or self.tombstones.get(key)
        if gone is not None:
            return _MISSES[gone.cause]
        meta = self.index.get(key)
        return "absent" if meta is None else "expired" if meta.expired(self.clock.now()) else "lost"

    def touch(self, keys_deepest_first: Sequence[Key]) -> None:
        """Count as use, in every tier that holds them."""
        if self.cold is not None:
            self.cold.touch(keys_deepest_first)
        self.hot.order.touch(keys_deepest_first)
        self.warm.order.touch(keys_deepest_first)

    def count_hot(self, keys: Sequence[Key], metas: Sequence[Meta | None], now: float, nbytes: int) -> None:
        """Count a get of keys that all lay in hot at `now`, root first: hits and use. nbytes: of their values."""
        balance = self.balance
        for meta in metas:
            assert meta is not None
            if balance is not None:
                balance.hit("hot", now - meta.used_at)
            meta.hits += 1
            meta.owner.hits += 1
            meta.last_hit_at = now
            if meta.sliding:
                meta.expires_at = now + meta.ttl_s
        c, count = self.counters, len(metas)
        c.gets += count
        c.tiers["hot"].hits += count
        c.hit_nbytes += nbytes
        c.hits_in["hot", "raw"] += count  # hot holds nothing else
        self.touch(keys[::-1])

    def use(self, keys_deepest_first: Sequence[Key], ttl_s: float | None) -> int:
        """Count as use, and move deadlines that slide, to `ttl_s` from now, or their own. Returns how many are held."""
        now, keys = self.clock.now(), keys_deepest_first
        metas: Sequence[Meta | None] = self.index.get_all(keys)
        for meta in metas:
            if meta is not None and now >= meta.deadline:
                for key in keys:
                    self.live(key)
                # Only now: a key that is forgotten takes along what continues it, which may stand before it.
                metas = [self.peek(key) for key in keys]
                break
        live = [(key, meta) for key, meta in zip(keys, metas, strict=True) if meta is not None]
        for key, meta in live:
            meta.refresh(now, ttl_s)
            if ttl_s is not None:  # it may be earlier now, which by its own it never is
                self.deadlines.watch(key, meta)
        if live:
            self.touch([key for key, _ in live])
        return len(live)

    def register_tenant(self, name: str, prefixes: Sequence[bytes]) -> None:
        """Keys that begin so are this tenant's from now on, those already held included. Without the lock."""
        own = tuple(prefixes)
        with self.lock:
            if not self.tenants.register(name, prefixes):
                return
        # What is put from here on has its owner already.
        for keys in slices([key for key in self._keys_as_used() if key.startswith(own)]):
            with self.lock:
                self._give_to_tenant(keys)

    def _keys_as_used(self) -> Iterable[Key]:
        """All keys, the least recently used first, as the lowest tier that holds them has it. Without the lock."""
        cold = () if self.cold is None else self.cold.keys()
        return dict.fromkeys(chain(cold, self.warm.keys_now(), self.hot.keys_now(), self.keys_now()))

    def _give_to_tenant(self, keys: Sequence[Key]) -> None:
        moving = [key for key in keys if key in self.index]
        # Cold first: its index may not be readable, and then all stays as it was.
        tiers = [tier for tier in (self.cold, self.hot, self.warm) if tier is not None]
        held = [tier.let_go(moving) for tier in tiers]
        for key in moving:
            meta = self.index[key]
            meta.owner.entries -= 1
            meta.owner = self.tenants.owner(key, meta.owner.namespace)
            meta.owner.entries += 1
        for tier, found in zip(tiers, held, strict=True):
            tier.take_back(found)

    def keys_now(self) -> list[Key]:
        """A copy of all keys: one step of the interpreter. Any thread, without the lock: it takes some milliseconds."""
        return self.index.keys_now()

    def owner_of(self, key: Key) -> Owner:
        """Whose a held key is. Any thread, without the lock."""
        meta = self.index.get(key)
        return NOBODY if meta is None else meta.owner

    def install(self, key: Key, meta: Meta, *, put: bool = True) -> int | None:
        """Give a key a Meta, new or in place of an older value, which leaves all tiers; its chain stays whole.

        put: False: it came from outside, for a lookup that has been counted.

        The caller puts the value somewhere before letting go of the lock. Returns a ticket as `forget` does.
        """
        old = self.index.get(key)
        ticket = None
        if old is not None:  # a key without a Meta is in no tier and on no way
            ticket = self._take_out(key)
            self.deadlines.unwatch(old)
        self.index[key] = meta
        meta.owner.entries += 1
        if old is None:
            self.chains.link(key, meta)
            self._came(key, put=put)
        else:
            old.owner.entries -= 1
            self.leaving.pop(key, None)
            meta.hits = old.hits  # a chunk put again is no stranger: what continues it was admitted for its hits
            self.chains.replace(key, meta, old)
        self.deadlines.watch(key, meta)
        return ticket

    def put_new(self, held: Sequence[tuple[Entry, Meta]], owner: Owner) -> bool:
        """Hold raw values of an owner in hot, what is continued after what continues it. All are held, or none is.

        False: not all of them are raw, of keys that are new, and have room, and nothing has changed. In a chain the
        parent of the first is held.
        """
        metas: dict[Key, Meta] = {}
        linked, nbytes, value_nbytes = bool(self.chains.awaited), 0, 0
        for entry, meta in reversed(held):
            if entry.encoding != "raw":
                return False
            meta.owner = owner
            metas[entry.key] = meta
            nbytes += entry.nbytes
            value_nbytes += meta.value_nbytes
            linked = linked or meta.parent is not None
        count = len(held)
        if len(metas) < count or not self.hot.has_room_for(nbytes, owner) or not self.index.add_new(metas):
            return False
        if linked:
            self.chains.link_all(metas)
        for key in metas:
            self._came(key)
        self.deadlines.watch_new(metas)
        self.hot.put_new(held, nbytes)
        owner.entries += count
        c = self.counters
        c.puts += count
        c.put_nbytes += value_nbytes
        c.tiers["hot"].puts += count
        return True

    def _came(self, key: Key, *, put: bool = True) -> None:
        """A key that was not held is now."""
        self.tombstones.pop(key, None)
        asked = self.lookups.asked
        if put and (asked.young or asked.old):  # seldom: a put makes no call for it
            asked.discard(key)
        if self.balance is not None:
            self.balance.put(key)

    def forget(self, key: Key, cause: GoneCause = "deleted", tier: str = "") -> int | None:
        """Take a key, and the chunks that continue it, out of everything; leave a tombstone for work under way.

        What this hold of the lock has no steps for is `collect`ed later; the key itself is gone for every verb at once.
        The deletion on disk is queued. Who promises that the value never comes back uses `depart` until it is done, and
        waits for the ticket returned, outside the lock: `cold.wait`.
        """
        departure = Departure(key, cause, tier)
        if not self.depart(departure):
            meta = self.index[key]
            self.chains.set_pinned(meta, pinned=False)
            meta.expires_at = min(meta.expires_at, 0.0)
            self.leaving.setdefault(key, departure)
        return departure.ticket

    def depart(self, departure: Departure) -> bool:
        """Take out what continues a key, the deepest first, and then the key. False: this hold has no steps left.

        The walk follows first children down and parents up, so each call goes on where the last one ended.
        """
        key, index = departure.key, self.index
        if key not in index:
            departure.ticket = self._take_out(key) or departure.ticket
            return True
        at = departure.at
        if at is None or index.get(at) is not departure.meta:
            at = key
        while self.lock.steps > 0:
            self.lock.steps -= 1
            meta = index[at]
            if meta.first_child is not None:
                at = meta.first_child
                continue
            parent = meta.parent
            self._leave(at, meta, departure)
            if at == key:
                return True
            assert parent is not None
            at = parent
        departure.at, departure.meta = at, index[at]
        return False

    def _leave(self, key: Key, meta: Meta, departure: Departure) -> None:
        self.tombstones.add(key, self._tombstone(key, meta, departure))
        self.counters.orphaned += key != departure.key
        if self.deleted is not None and departure.cause == "deleted":
            self.deleted(key)
        # Out of the tiers first: their orders ask the index whose a key is, and what it continues.
        ticket = self._take_out(key)
        if ticket is not None:
            departure.ticket = ticket  # tickets rise: the last one stands for all
        self._drop_meta(key, meta)

    def _drop_meta(self, key: Key, meta: Meta) -> None:
        self.deadlines.unwatch(meta)
        self.chains.unlink(key, meta)
        meta.owner.entries -= 1
        self.leaving.pop(key, None)
        del self.index[key]
        if self.events is not None:
            self.events.removed(key)

    def _tombstone(self, key: Key, meta: Meta, departure: Departure) -> Tombstone:
        tiers = self.tiers_of(key)
        own = key == departure.key
        tier = tiers[-1] if tiers else departure.tier if own else ""
        return Tombstone(departure.cause if own else "orphaned", tier, self.clock.now(), meta.hits)

    def why_gone(self, key: Key) -> Tombstone | None:
        """Why a key is gone, as far as that is still known; also of one that is still to be taken out."""
        departure = self.leaving.get(key)
        return self.tombstones.get(key) if departure is None else self._tombstone(key, self.index[key], departure)

    def collect(self) -> bool:
        """Go on with what is `leaving`, as far as this hold goes. True: nothing is left."""
        while self.leaving and self.lock.steps > 0:
            self.depart(next(iter(self.leaving.values())))
        return not self.leaving

    def is_gone(self, key: Key) -> bool:
        """Whether a key is not held, or about to be taken out."""
        return key not in self.index or key in self.leaving

    def _take_out(self, key: Key) -> int | None:
        self.flights.call_off(key)
        if self.transit:
            self.transit.pop(key, None)
        self.hot.remove(key)
        self.warm.remove(key)
        return self.cold.queue_removal(key) if self.cold is not None else None

    def unpin(self, key: Key) -> None:
        """Let a pinned key be evicted and expire again; its deadline starts anew."""
        meta = self.index[key]
        self.chains.set_pinned(meta, pinned=False)
        meta.pinned_until = inf
        meta.expires_at = self.clock.now() + meta.ttl_s
        self.deadlines.watch(key, meta)
        for tier in (self.hot, self.warm, self.cold):
            if tier is not None:
                tier.unpin(key)

    def expire(self, key: Key) -> None:
        """Forget a key whose deadline has passed. Nobody waits: should a crash bring it back, so does its deadline."""
        if key not in self.leaving:
            self.forget(key, "expired")
            self.counters.expirations += 1

    def forget_if_gone(self, key: Key, cause: GoneCause, left: TierName) -> bool:
        """Drop the Meta of a key that no tier holds any more, and what continues it. True: it is gone."""
        meta = self.index.get(key)
        if meta is None or self.in_a_tier(key):
            return False
        if meta.first_child is not None or left == "cold":
            self.forget(key, cause, left)
        else:
            # Nearly always a leaf, and in no tier: nothing to take out, nobody to take along.
            self.flights.call_off(key)
            self._drop_meta(key, meta)
            self.tombstones.add(key, Tombstone(cause, left, self.clock.now(), meta.hits))
        return True

    def lost_clean_copy(self, key: Key) -> None:
        """The encoded form of a key has left its last tier: a lossy copy in hot goes with it."""
        entry = self.hot.get(key)
        if entry is None or not entry.lossy or key in self.warm or key in self.transit or self.in_cold(key):
            return
        self.hot.remove(key)

    def dropped_from_cold(self, key: Key, reason: str) -> None:
        """The cold tier let go of a key: "evicted" for capacity, "corrupt", or another word of its own."""
        with self.lock:
            if self.in_cold(key):
                return  # put again since
            if reason == "evicted":
                self.counters.tiers["cold"].evictions += 1
            self.lost_clean_copy(key)
            self.forget_if_gone(key, _CAUSES.get(reason, "write failed"), "cold")


_MISSES: dict[GoneCause, MissCause] = {
    "expired": "expired", "evicted": "evicted", "over quota": "evicted", "deleted": "deleted", "orphaned": "orphaned",
    "corrupt": "corrupt", "write failed": "lost",
}  # fmt: skip
_CAUSES: dict[str, GoneCause] = {"evicted": "evicted", "corrupt": "corrupt"}

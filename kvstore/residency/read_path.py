"""The read side: find keys in the tiers, count hits and misses, move deadlines, touch, ask for promotions.

One lock for a whole chain of keys, so a get of a prefix sees one moment. Reading from disk happens after it, without
the lock; what left its tier meanwhile becomes a miss. Knows no tensors: `simulation` reads through it as well.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import inf
from operator import attrgetter
from typing import NamedTuple

from kvstore.config import StoreConfig
from kvstore.entries.entry import Entry
from kvstore.hit import Held
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.residency.state import Residency
from kvstore.stats import MissCause
from kvstore.tiers import TierName

_VALUE_NBYTES = attrgetter("value_nbytes")


class Place(NamedTuple):
    """Where a key was found. entry: None for cold, which is read outside the lock."""

    key: Key
    tier: TierName
    entry: Entry | None
    meta: Meta


class Found(NamedTuple):
    """A value found, in the form it is held in."""

    key: Key
    tier: TierName
    entry: Entry
    age_s: float


class Resident(NamedTuple):
    """Values found in hot, each with its Meta, and the time of the store's clock."""

    keys: Sequence[Key]
    entries: list[Entry]
    metas: list[Meta]
    now: float

    @property
    def nbytes(self) -> int:
        """Bytes of all their tensors."""
        return sum(map(_VALUE_NBYTES, self.metas))


class ReadPath:
    """Finds and counts. request_promotions: takes the keys of one get, root first; asked under the lock."""

    def __init__(
        self, residency: Residency, config: StoreConfig, request_promotions: Callable[[Sequence[Key]], None]
    ) -> None:
        self._r = residency
        self._promote_after = config.promote_after
        self._promote_window_s = config.promote_window_s
        self._request_promotions = request_promotions
        self._due: deque[Resident] = deque()

    def read(self, keys: Sequence[bytes], *, leading: bool) -> list[Found | None]:
        """Values in the order of keys, None for a miss. leading: a chain, root first, up to the first miss."""
        now = self._r.clock.now()
        found: list[Found | None] = []
        for place in self.find(keys, leading=leading):
            found.append(self._fetch(place, now) if place is not None else None)
            if found[-1] is None and leading:
                found.pop()
                break
        return found

    def resident(
        self, keys: Sequence[Key], at_most_nbytes: float = inf, *, count_later: bool = False
    ) -> Resident | None:
        """What `read` would find where hot holds all of the keys, counted the same; None, uncounted: `read` them.

        at_most_nbytes: of their tensors; a single key may have more. count_later: `settle` counts them.
        The commonest get of all, so each step goes over all keys at once: a call for each of them costs ten times this.
        """
        r = self._r
        with r.lock:
            entries = r.hot.held(keys)
            if not all(entries):
                return None
            now = r.clock.now()
            metas = list(map(r.index.__getitem__, keys))
            for meta in metas:
                if now >= (meta.pinned_until if meta.pinned else meta.expires_at):
                    return None  # `read` forgets and counts it
            found = Resident(keys, entries, metas, now)  # type: ignore[arg-type]  # no None among them
            if at_most_nbytes < inf and len(keys) > 1 and found.nbytes > at_most_nbytes:
                return None
            if count_later:
                self._due.append(found)
            else:
                self._count_resident(found)
        return found

    def settle(self) -> None:
        """Count what was found and is to be counted later. Cheap where there is nothing."""
        if self._due:
            with self._r.lock:
                self._settle()

    def _settle(self) -> None:
        while self._due:
            self._count_resident(self._due.popleft())

    def _count_resident(self, found: Resident) -> None:
        r = self._r
        keys, _, metas, now = found
        if r.balance is not None:
            for meta in metas:
                r.balance.hit("hot", now - meta.used_at)
        for meta in metas:
            meta.hits += 1
            meta.owner.hits += 1
            meta.last_hit_at = now
            if meta.sliding:
                meta.expires_at = now + meta.ttl_s
        c = r.counters
        c.gets += len(keys)
        c.tiers["hot"].hits += len(keys)
        c.hit_nbytes += found.nbytes
        c.hits_in["hot", "raw"] += len(keys)  # hot holds nothing else
        r.touch(keys[::-1])

    def leading(self, keys: Sequence[bytes]) -> list[Held]:
        """Where the leading keys of a chain are held, up to the first miss. Does not count as use.

        The hottest question there is, a thousand keys at a time: so one look at the clock, and one Held for all chunks
        of one size in one tier.
        """
        r = self._r
        held: list[Held] = []
        made: dict[tuple[str, int], Held] = {}
        with r.lock:
            now, index, hot = r.clock.now(), r.index, r.hot
            for key in map(Key, keys):
                meta = index.get(key)
                if meta is None or meta.expired(now):
                    break
                place = ("hot", None) if key in hot else r.lookup(key)
                if place is None:
                    break
                at = (place[0], meta.value_nbytes)
                found = made.get(at)
                if found is None:
                    found = made[at] = Held(*at)
                held.append(found)
        return held

    def find(self, keys: Sequence[bytes], *, leading: bool) -> list[Place | None]:
        """Places in the order of keys, counted as hits, misses and use; `leading`: up to the first miss."""
        r = self._r
        with r.lock:
            self._settle()
            now, index, hot = r.clock.now(), r.index, r.hot
            places: list[Place | None] = []
            used: list[Key] = []
            wanted: list[Key] = []
            hits_in_hot = 0
            for key in map(Key, keys):
                meta = index.get(key)
                entry = hot.get(key) if meta is not None and now < meta.deadline else None
                if meta is not None and entry is not None:
                    place: Place | None = Place(key, "hot", entry, meta)
                    if r.balance is not None:
                        r.balance.hit("hot", now - meta.used_at)
                    self._count_use(meta, now)
                    hits_in_hot += 1
                else:
                    place = self._find(key)
                    if place is not None and self._count_hit(place, now):
                        wanted.append(key)
                if place is not None:
                    used.append(key)
                elif leading:
                    break
                places.append(place)
            r.counters.gets += hits_in_hot
            r.counters.tiers["hot"].hits += hits_in_hot
            if wanted:
                self._request_promotions(wanted)
            if used:
                used.reverse()
                r.touch(used)
        return places

    def _find(self, key: Key) -> Place | None:
        r = self._r
        r.counters.gets += 1
        cause: MissCause = r.miss_cause(key)
        meta = r.live(key)
        place = r.lookup(key) if meta is not None else None
        if meta is None or place is None:
            r.counters.misses[cause] += 1
            return None
        return Place(key, place[0], place[1], meta)

    def _count_use(self, meta: Meta, now: float) -> None:
        self._r.counters.hit_nbytes += meta.value_nbytes
        meta.hits += 1
        meta.owner.hits += 1
        meta.last_hit_at = now
        if meta.sliding:
            meta.expires_at = now + meta.ttl_s

    def _count_hit(self, place: Place, now: float) -> bool:
        """Count; True: the key should be promoted."""
        r, meta = self._r, place.meta
        if r.balance is not None and place.tier != "cold":
            r.balance.hit(place.tier, now - meta.used_at)
        r.counters.tiers[place.tier].hits += 1
        recent = meta.last_hit_at and now - meta.last_hit_at <= self._promote_window_s
        self._count_use(meta, now)
        return place.tier != "hot" and (self._promote_after == 1 or (self._promote_after == 2 and bool(recent)))

    def _fetch(self, place: Place, now: float) -> Found | None:
        key, tier, entry, meta = place
        if entry is None:
            assert self._r.cold is not None
            entry = self._r.cold.get(key)
        with self._r.lock:
            c = self._r.counters
            if entry is None:
                # Counted as a hit when it was found; what it was found in has dropped it since.
                c.tiers[tier].hits -= 1
                c.hit_nbytes -= meta.value_nbytes
                c.misses["corrupt" if key not in self._r.index else "lost"] += 1
                return None
            c.hits_in[tier, entry.encoding] += 1
        return Found(key, tier, entry, now - meta.created_at)


def leading_first(keys: Iterable[Key]) -> list[Key]:
    """A chain's keys in the order of touching: deepest first, so that the root ends most recently used."""
    return list(reversed(list(keys)))

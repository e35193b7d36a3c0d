"""The read side: one look says what is where, how big it is and what it needs; then it is counted, and then read.

`plan` takes the lock once for the keys of a call, so a get of a prefix sees one moment; calls with more than 128 keys
are looked at, and counted, in slices. Under the lock the keys are found,
the caller's budget is charged, and hits, misses, use and deadlines are counted. Nobody looks the keys up again: what is
in memory is in the plan, and what is on disk is read by `fetch`, without the lock; what left its tier meanwhile becomes
a miss. Knows no tensors: `simulation` reads through it as well.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from operator import attrgetter
from typing import NamedTuple, cast

from kvstore.config import StoreConfig
from kvstore.entries.entry import Entry
from kvstore.errors import EntryTooLarge
from kvstore.hit import Held
from kvstore.keys import Key
from kvstore.lookup import Lookup, check_lookup
from kvstore.metadata.meta import Meta
from kvstore.metadata.slices import pause, slices
from kvstore.residency.state import Residency
from kvstore.stats import MissCause
from kvstore.tiers import TierName

_VALUE_NBYTES = attrgetter("value_nbytes")
NOTHING: frozenset[str] = frozenset()
LOOK_MAX = 128
"""Keys looked at in one hold of the lock: half a millisecond, three where each of a million has expired."""
HOT_MAX = 512
"""Those that are all in hot: half a millisecond, three where a million keys leave none in the processor's cache."""
MATCH_MAX = 1024
"""Keys matched in one hold: a millisecond, three where a million keys leave none in the processor's cache."""
_HOT: tuple[TierName] = ("hot",)
More = Callable[[Sequence[Key], int, Lookup], list[Held]]
"""What follows the first of a chain's keys, so many, that are held here: where another host has put it."""
_Lists = tuple[list[Key], list[TierName | None], list[Entry | None], list[Meta | None], list[MissCause]]


class Found(NamedTuple):
    """A value found, in the form it is held in."""

    key: Key
    tier: TierName
    entry: Entry
    age_s: float


@dataclass(slots=True, eq=False)
class Plan:
    """Where the keys of a call were at one moment. The lists are parallel; a Meta that is None is a miss.

    keys: those covered, from the first on: fewer than asked for where a lot is full, or a chain ends. entries: as held;
    None on disk. now: the store's clock, Unix seconds. nbytes: of all tensors once decoded. hot: all that was found
    lies in hot as it was put, and nothing was missing but the end of a chain. ended: a chain ended at a miss, which is
    not in `keys`. accept, from_nbytes: what need not be decoded, as `Store.plan` was told. maps: whose segments on a
    device the caller reads in place, set by who has `Store.read` leave what lies there. lookup: what the next keys of
    the same get count as.
    The entries live as long as the plan does, whatever happens to their keys.
    """

    keys: Sequence[Key]
    tiers: Sequence[TierName | None]
    entries: Sequence[Entry | None]
    metas: Sequence[Meta | None]
    now: float
    nbytes: int
    hot: bool
    leading: bool = False
    ended: bool = False
    misses: Sequence[MissCause] = ()
    accept: Collection[str] = field(default=NOTHING)
    from_nbytes: int = 0
    maps: object = None
    lookup: Lookup | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def held_nbytes(self) -> int:
        """Bytes of what is in memory, in the form it is held in."""
        return sum(entry.nbytes for entry in self.entries if entry is not None)

    @property
    def at_hand(self) -> bool:
        """Whether `fetch` has nothing to read from a disk, and there is nothing to decode."""
        return self.hot or all(
            meta is None or (entry is not None and (entry.encoding == "raw" or self.stays_encoded(entry)))
            for entry, meta in zip(self.entries, self.metas, strict=True)
        )

    def stays_encoded(self, entry: Entry) -> bool:
        """Whether an entry is given out encoded: large enough, and every tensor in an encoding the caller accepts."""
        return bool(self.accept) and entry.value_nbytes >= self.from_nbytes and entry.is_encoded_in(self.accept)

    def stays_in_place(self, entry: Entry) -> bool:
        """Whether an entry lies on a device in a segment that the caller reads in place."""
        if self.maps is None or entry.encoding != "raw":
            return False
        place = getattr(entry.tensors, "place", None)
        return place is not None and bool(place.segment.device) and place.segment.owner == self.maps

    def cut(self, at_most_nbytes: float) -> "Iterator[Plan]":
        """A plan of what is hot, of any size, in lots: each has an entry, and as many more as fit."""
        start = nbytes = 0
        for at, meta in enumerate(self.metas):
            more = 0 if meta is None else meta.value_nbytes
            if nbytes and nbytes + more > at_most_nbytes:
                yield self._lot(start, at, nbytes)
                start, nbytes = at, 0
            nbytes += more
        yield replace(self._lot(start, len(self), nbytes), ended=self.ended)

    def _lot(self, start: int, stop: int, nbytes: int) -> "Plan":
        lists = (self.keys[start:stop], self.tiers[start:stop], self.entries[start:stop], self.metas[start:stop])
        return Plan(*lists, self.now, nbytes, hot=True, leading=self.leading, lookup=self.lookup)


def _nothing_yet(now: float) -> Plan:
    return Plan([], [], [], [], now, 0, hot=True, misses=[])


def _refused(charge: Callable[[Plan], None], plan: Plan) -> EntryTooLarge | None:
    """Have a plan charged. What `charge` says of its size is returned: it may be the size that a record lied about."""
    try:
        charge(plan)
    except EntryTooLarge as error:
        return error
    return None


class _Lot(NamedTuple):
    """How many of a get's keys a plan covers; `Store.plan` says what the fields mean."""

    leading: bool
    at_most_nbytes: float
    whole_if_hot: bool

    @property
    def hot_nbytes(self) -> float:
        """Bytes of one lot where all is in hot."""
        return inf if self.whole_if_hot else self.at_most_nbytes


def _extended(plan: Plan, more: Plan | None, how: _Lot) -> bool:
    """Extend a plan by that of keys which are all in hot, if they fit its lot. Else False, with nothing changed."""
    if more is None or not (plan.nbytes + more.nbytes <= how.at_most_nbytes or (how.whole_if_hot and plan.hot)):
        return False
    for have, found in ((plan.keys, more.keys), (plan.tiers, more.tiers), (plan.entries, more.entries),
                        (plan.metas, more.metas)):  # fmt: skip
        cast("list[object]", have).extend(found)
    plan.nbytes += more.nbytes
    return True


class ReadPath:
    """Finds and counts. request_promotions: as `Maintainer.request_promotions`, asked under the lock."""

    def __init__(self, residency: Residency, config: StoreConfig, request_promotions: Callable[..., None]) -> None:
        self._r = residency
        self._promote_after = config.promote_after
        self._promote_window_s = config.promote_window_s
        self._request_promotions = request_promotions

    def plan(  # noqa: PLR0913 - keyword-only, each one optional
        self,
        keys: Sequence[Key],
        *,
        leading: bool = False,
        accept: Collection[str] = NOTHING,
        from_nbytes: int = 0,
        at_most_nbytes: float = inf,
        whole_if_hot: bool = False,
        charge: Callable[[Plan], None] | None = None,
        count_later: bool = False,
        lookup: Lookup | None = None,
    ) -> Plan:
        """Find, charge and count, under one lock. `Store.plan` says what the arguments mean."""
        r = self._r
        while True:
            plan = None
            if len(keys) > LOOK_MAX:
                plan = self._find_in_slices(keys, _Lot(leading, at_most_nbytes, whole_if_hot))
            with r.lock:
                if plan is None:
                    plan = self._find(keys, leading, at_most_nbytes, whole_if_hot)
                plan.leading, plan.accept, plan.from_nbytes = leading, accept, from_nbytes
                hot = plan.hot and not plan.ended
                too_long = len(plan.keys) > (HOT_MAX if hot else LOOK_MAX)
                refused = None if charge is None or (whole_if_hot and plan.hot) else _refused(charge, plan)
                if refused is None:
                    plan.lookup = r.lookups.got(
                        lookup, keys, plan.metas, plan.misses, ended=plan.ended, leading=leading, now=plan.now
                    )
                    if hot and not too_long:
                        counted = partial(r.count_hot, plan.keys, plan.metas, plan.now, plan.nbytes)
                        r.lock.owed.append(counted) if count_later else counted()
                    elif not too_long:
                        self._count(plan)
            if refused is None:
                if too_long:
                    self._count_in_slices(plan)
                return plan
            if not self._dropped_what_lies(plan):
                raise refused

    def _count_in_slices(self, plan: Plan) -> None:
        """Count a long plan, deepest first, as it is touched."""
        hot = plan.hot and not plan.ended
        most = HOT_MAX if hot else LOOK_MAX
        for start in reversed(range(0, len(plan), most)):
            stop = start + most
            part = Plan(
                plan.keys[start:stop], plan.tiers[start:stop], plan.entries[start:stop], plan.metas[start:stop],
                plan.now, 0 if start else plan.nbytes, hot=hot, misses=() if start else plan.misses,
            )  # fmt: skip
            with self._r.lock:
                if hot:
                    self._r.count_hot(part.keys, part.metas, part.now, part.nbytes)
                else:
                    self._count(part)
            if start:
                pause()

    def _find_in_slices(self, keys: Sequence[Key], how: "_Lot") -> Plan:
        r = self._r
        if len(keys) <= HOT_MAX:
            with r.lock:
                found, *_ = self._all_hot(keys, how.hot_nbytes)
            if found is not None:
                return found
        plan = _nothing_yet(r.clock.now())
        for part in slices(keys, LOOK_MAX):
            with r.lock:
                more, _, entries = self._all_hot(part, inf)
                if not _extended(plan, more, how) and not self._look(plan, part, entries, how):
                    break
        return plan

    def _find(self, keys: Sequence[Key], leading: bool, at_most_nbytes: float, whole_if_hot: bool) -> Plan:  # noqa: FBT001 - a private one's
        plan, now, entries = self._all_hot(keys, inf if whole_if_hot else at_most_nbytes)
        if plan is None:
            plan = _nothing_yet(now)
            self._look(plan, keys, entries, _Lot(leading, at_most_nbytes, whole_if_hot))
        return plan

    def _dropped_what_lies(self, plan: Plan) -> bool:
        """Whether a plan refused for its size held a record that only said so, which is dropped. Without the lock.

        A stranger may have written it, and it would be refused at each get. What is in memory has the size it says.
        """
        cold = self._r.cold
        on_disk = [
            key for key, tier, entry in zip(plan.keys, plan.tiers, plan.entries, strict=True) if tier and not entry
        ]
        return cold is not None and any(cold.specs_of(key) is None and self.peek([key]) == [None] for key in on_disk)

    def fetch(self, plan: Plan) -> list[Found | None]:
        """The values of a plan, None for a miss; a chain stops before the first that was lost. Reads from the disk."""
        found: list[Found | None] = []
        now = plan.now
        if plan.hot:
            pairs = zip(plan.keys, plan.entries, plan.metas, strict=True)
            return [Found(key, "hot", entry, now - meta.created_at) for key, entry, meta in pairs if entry and meta]
        for key, tier, entry, meta in zip(plan.keys, plan.tiers, plan.entries, plan.metas, strict=True):
            if tier is None or meta is None:
                found.append(None)
                continue
            value = entry if entry is not None else self._from_disk(key, meta, plan.lookup)
            if value is None and plan.leading:
                break
            found.append(None if value is None else Found(key, tier, value, now - meta.created_at))
        return found

    def peek(self, keys: Sequence[Key], lookup: Lookup | None = None) -> list[Held | None]:
        """Where each key is held; None where it is not. Leaves what has expired where it is.

        Counts nothing, unless `lookup` says that it is one.
        """
        r = self._r
        held: list[Held | None] = []
        for part in slices(keys, LOOK_MAX):
            before = len(held)
            with r.lock:
                now, get = r.clock.now(), r.index.get
                for key in part:
                    meta = get(key)
                    # Before its deadline no key has expired, pinned or not: the cheaper question first.
                    gone = meta is None or (now >= meta.expires_at and meta.expired(now))
                    place = None if gone else r.lookup(key)
                    held.append(None if meta is None or place is None else Held(place[0], meta.value_nbytes))
                if lookup is not None:
                    missing = held.index(None, before) if None in held[before:] else None
                    found = len(part) - held[before:].count(None)
                    r.lookups.matched(lookup, part, found, None if missing is None else r.miss_cause(keys[missing]))
            lookup = None if lookup is None else lookup.continued()
        if lookup is not None and lookup.prefetch:
            self._prefetch(keys, held)
        return held

    def _prefetch(self, keys: Sequence[Key], held: Sequence[Held | None]) -> None:
        on_disk = [key for key, place in zip(keys, held, strict=False) if place is not None and place.tier == "cold"]
        if on_disk:
            with self._r.lock:
                self._request_promotions(on_disk, prefetch=True)

    def leading(self, keys: Sequence[Key], lookup: Lookup | None = None, more: More | None = None) -> list[Held]:
        """Where the leading keys of a chain are held, up to the first miss. A lookup; does not count as use.

        more: asked, without the lock, for what follows the first miss.

        The hottest question there is, a thousand keys at a time: so one look at the clock, and one Held for all chunks
        of one size in one tier.
        """
        held: list[Held] = []
        made: dict[tuple[str, int], Held] = {}
        how, r = check_lookup(lookup) or Lookup(len(keys)), self._r
        for part in slices(keys, MATCH_MAX):
            before = len(held)
            with r.lock:
                now = r.clock.now()
                whole = self._match(part, now, held, made)
                if whole or more is None:
                    self._count_matched(how, keys, part, held, before, now)
            if not whole and more is not None:
                held += more(keys, len(held), how)
                with r.lock:
                    self._count_matched(how, keys, part, held, before, r.clock.now())
            if not whole:
                break
            if len(held) < len(keys):
                how = how.continued()
        if how.prefetch:
            self._prefetch(keys, held)
        return held

    def _count_matched(
        self, how: Lookup, keys: Sequence[Key], part: Sequence[Key], held: Sequence[Held], before: int, now: float
    ) -> None:
        r, found = self._r, len(held) - before
        missing = None if found >= len(part) else r.miss_cause(keys[len(held)])
        r.lookups.matched(how, part, found, missing)
        if how.counted:
            r.lookups.asked.note(part if found <= len(part) else keys[before : len(held)], now)

    def _match(self, keys: Sequence[Key], now: float, held: list[Held], made: dict[tuple[str, int], Held]) -> bool:
        """Extend `held` by leading keys; False: by fewer than all of them."""
        r = self._r
        get, in_hot = r.index.get, r.hot.get
        for key in keys:
            meta = get(key)
            if meta is None or (now >= meta.expires_at and meta.expired(now)):
                return False
            place = _HOT if in_hot(key) is not None else r.lookup_below(key)
            if place is None:
                return False
            at = (place[0], meta.value_nbytes)
            found = made.get(at)
            if found is None:
                found = made[at] = Held(*at)
            held.append(found)
        return True

    def _all_hot(self, keys: Sequence[Key], at_most_nbytes: float) -> tuple[Plan | None, float, Sequence[Entry | None]]:
        """The plan where all keys are in hot and are one lot, else None; the time, and what hot holds under each key.

        The commonest get of all, so each step goes over all keys at once: a call for each of them costs ten times this.
        """
        r = self._r
        now, entries = r.clock.now(), r.hot.get_all(keys)
        if not all(entries):
            return None, now, entries
        metas = cast("list[Meta]", r.index.get_all(keys))  # what is in a tier has one
        for meta in metas:
            if now >= (meta.pinned_until if meta.pinned else meta.expires_at):
                return None, now, entries  # `_look` forgets it
        nbytes = sum(map(_VALUE_NBYTES, metas))
        if nbytes > at_most_nbytes and len(keys) > 1:
            return None, now, entries
        return Plan(keys, _HOT * len(keys), entries, metas, now, nbytes, hot=True), now, entries

    def _look(self, plan: Plan, keys: Sequence[Key], entries_in_hot: Sequence[Entry | None], how: "_Lot") -> bool:
        """Extend a plan by any keys, as many as make one lot. Forgets those whose deadline has passed.

        entries_in_hot: what hot holds under them. False: the plan ends here, before the last of them.
        """
        r = self._r
        found_keys, tiers, entries, metas, misses = cast("_Lists", (
            plan.keys, plan.tiers, plan.entries, plan.metas, plan.misses,
        ))  # fmt: skip
        nbytes, hot, now = plan.nbytes, plan.hot, plan.now
        for key, in_hot in zip(keys, entries_in_hot, strict=True):
            meta = r.index.get(key)
            if meta is not None and (meta.pinned or now >= meta.expires_at):
                meta = r.live(key)  # which forgets it, unpins it, or leaves it as it is
            place = None if meta is None else r.lookup_below(key) if in_hot is None else ("hot", in_hot)
            if meta is None or place is None:
                misses.append(r.miss_cause(key))
                if how.leading:
                    plan.ended = True
                    break
                hot = False
                tiers.append(None)
                entries.append(None)
                metas.append(None)
                continue
            tier, entry = place
            more, still_hot = nbytes + meta.value_nbytes, hot and tier == "hot"
            if nbytes and more > how.at_most_nbytes and not (how.whole_if_hot and still_hot):
                break
            nbytes, hot = more, still_hot
            tiers.append(tier)
            entries.append(entry)
            metas.append(meta)
        covered = len(metas) - len(found_keys)
        found_keys += keys[:covered]
        plan.nbytes, plan.hot = nbytes, hot
        return covered == len(keys)

    def _count(self, plan: Plan) -> None:
        """Count hits, misses and use of what was not all found in hot."""
        c = self._r.counters
        used: list[Key] = []
        wanted: list[Key] = []
        for key, tier, entry, meta in zip(plan.keys, plan.tiers, plan.entries, plan.metas, strict=True):
            if meta is None or tier is None:
                continue
            used.append(key)
            if self._count_hit(tier, meta, plan.now, entry):
                wanted.append(key)
            if entry is not None:
                c.hits_in[tier, entry.encoding] += 1
        c.gets += len(used) + len(plan.misses)
        for cause in plan.misses:
            c.misses[cause] += 1
        if wanted:
            self._request_promotions(wanted)
        if used:
            used.reverse()
            self._r.touch(used)

    def _count_hit(self, tier: TierName, meta: Meta, now: float, entry: Entry | None) -> bool:
        """Count; True: the key should be promoted."""
        r = self._r
        if r.balance is not None and tier != "cold":
            r.balance.hit(tier, now - meta.used_at, meta.value_nbytes / entry.nbytes if entry is not None else 1.0)
        r.counters.tiers[tier].hits += 1
        r.counters.hit_nbytes += meta.value_nbytes
        recent = meta.last_hit_at and now - meta.last_hit_at <= self._promote_window_s
        meta.hits += 1
        meta.owner.hits += 1
        meta.last_hit_at = now
        if meta.sliding:
            meta.expires_at = now + meta.ttl_s
        return tier != "hot" and (self._promote_after == 1 or (self._promote_after == 2 and bool(recent)))

    def _from_disk(self, key: Key, meta: Meta, lookup: Lookup | None) -> Entry | None:
        r = self._r
        assert r.cold is not None
        entry = r.cold.get(key, seen=True)
        with r.lock:
            c = r.counters
            if entry is not None:
                c.hits_in["cold", entry.encoding] += 1
                return entry
            # Counted as a hit when it was found; cold has dropped it since.
            c.tiers["cold"].hits -= 1
            c.hit_nbytes -= meta.value_nbytes
            cause: MissCause = "corrupt" if key not in r.index else "lost"
            c.misses[cause] += 1
            r.lookups.lost(0 if lookup is None else lookup.key_tokens, cause)
            return None

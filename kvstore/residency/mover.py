"""Moves entries between tiers: admit into hot, sink to the tier below, promote a copy back up.

A put finds room or makes it: what it displaces sinks one tier, which may displace again, down to the last tier, where
displacing means forgetting. One entry moves at a time (`_moving`), so memory exceeds the budgets by no more than the
entry that comes in and the one on its way. Encoding, decoding and the disk run outside the residency lock; whatever
was looked up before is checked again under the lock before a result is installed.
Lock order: `_moving`, then `residency.lock`, then a tier's own.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvstore.entries.entry import Entry
from kvstore.errors import CodecError, OverQuota, TierUnavailable, UnknownEncoding
from kvstore.keys import Key
from kvstore.metadata.inflight import Flight
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import Owner
from kvstore.metadata.slices import SLICE, pause, slices
from kvstore.printable import printable
from kvstore.residency import leaving
from kvstore.residency.state import Residency
from kvstore.residency.transcode import Transcoder
from kvstore.tiers import LastTier, TierName
from kvstore.tiers.memory import MemoryTier

log = logging.getLogger(__name__)

NO_KEY = Key(b"")
EVICTION_STEPS = 2
"""What an eviction counts for among the steps of a hold: some 20 us. 64 of them, then others may have the lock."""


class Mover:
    """The only one who moves entries. Any thread may call; movements queue up."""

    def __init__(self, residency: Residency, transcoder: Transcoder) -> None:
        self._r = residency
        self._transcoder = transcoder
        self._moving = threading.Lock()

    def admit(self, entry: Entry, meta: Meta) -> None:
        """Hold a new value in hot, or below when hot can never hold it.

        A record it replaces is gone from the disk for good when this returns: a crash must not bring an older value
        back. Raises OverQuota when no tier can hold the new one.
        """
        with self._r.lock:
            tickets = self.admit_at_once(entry, meta)
        if tickets is None:
            self.admit_by_moving(entry, meta)
        else:
            self.wait(tickets)

    def admit_by_moving(self, entry: Entry, meta: Meta) -> None:
        """`admit`, of what cannot be held at once: it is encoded, or room must be made."""
        r = self._r
        replaced: list[int] = []
        encoded = entry.encoding != "raw"

        def install() -> bool:
            ticket = r.install(entry.key, meta)
            if ticket is not None:
                replaced.append(ticket)
            if encoded:
                meta.lossy, meta.encoding = entry.lossy, entry.encoding
            else:
                r.counters.tiers["hot"].puts += 1
            return True

        (self._admit_encoded if encoded else self._admit_raw)(entry, meta, install)
        with r.lock:
            self._count_put(meta)
        self.wait(replaced)

    def admit_at_once(self, entry: Entry, meta: Meta) -> list[int] | None:
        """Hold a new value in hot; None: it is encoded, or there is no room. Under the lock.

        Returns what to `wait` for, without the lock.
        """
        r = self._r
        if entry.encoding != "raw" or not r.hot.has_room(entry.nbytes, entry.key, meta.owner):
            return None
        ticket = r.install(entry.key, meta)
        r.counters.tiers["hot"].puts += 1
        r.hot.put(entry, soon=meta.soon, meta=meta)
        self._count_put(meta)
        return [] if ticket is None else [ticket]

    def wait(self, tickets: Sequence[int]) -> None:
        """Return when the records that were replaced are gone from the disk for good. Without the lock."""
        if tickets and self._r.cold is not None:
            self._r.cold.wait(tickets[-1])

    def _count_put(self, meta: Meta) -> None:
        self._r.counters.puts += 1
        self._r.counters.put_nbytes += meta.value_nbytes

    def _admit_raw(self, entry: Entry, meta: Meta, install: Callable[[], bool]) -> None:
        r = self._r
        with self._moving:
            if r.hot.admits(entry.nbytes, entry.key, meta.owner):
                self._place(r.hot, entry, install, meta, soon=meta.soon)
                return
            with r.lock:
                install()
                stays = not leaving.left_at_once(r, "hot", entry)
                if stays:
                    r.transit[entry.key] = ("hot", entry)
            if stays:
                self._sink("hot", entry)
        with r.lock:
            if r.is_gone(entry.key):
                raise OverQuota(
                    f"an entry of {entry.nbytes} bytes fits no tier: hot has {r.hot.capacity_nbytes} bytes, "
                    f"warm {r.warm.capacity_nbytes}, cold {r.cold.capacity_nbytes if r.cold else 0}"
                )

    def _admit_encoded(self, entry: Entry, meta: Meta, install: Callable[[], bool]) -> None:
        """Hold a new value that came encoded, as it is: below hot, which holds what was put as it was."""
        r = self._r
        if self._put_below(entry, meta, install) is None:
            raise OverQuota(
                f"an encoded entry of {entry.nbytes} bytes fits no tier below hot: warm has {r.warm.capacity_nbytes} "
                f"bytes, cold {r.cold.capacity_nbytes if r.cold else 0}"
            )

    def admit_below(self, entry: Entry, meta: Meta, wanted: Callable[[], bool]) -> bool:
        """Hold an entry from outside in its form below hot: in warm, or in cold if it is exact or too large for warm.

        Never in hot: hot holds what was put, or decoded for a promotion. wanted: asked under the lock just before.
        False: it is not wanted, it is held already, or no tier takes it.
        """
        r, key = self._r, entry.key

        def install() -> bool:
            if r.live(key) is not None or not wanted():
                return False
            meta.lossy, meta.encoding = entry.lossy, entry.encoding
            r.install(key, meta, put=False)
            return True

        return self._put_below(entry, meta, install) is not None

    def _put_below(self, entry: Entry, meta: Meta, install: Callable[[], bool]) -> TierName | None:
        """Put into warm, or into cold what is exact or too large for warm; None: no room, or it is not installed."""
        r = self._r
        into: TierName = "warm"
        with self._moving:
            if (entry.lossy or r.cold is None) and r.warm.admits(entry.nbytes, entry.key, meta.owner):
                if not self._place(r.warm, entry, install, meta, soon=meta.soon):
                    return None
            else:
                entry = self._transcoder.coarser(entry, namespace=meta.owner.namespace)
                if r.cold is None or not self._cold_has_room(r.cold, entry):
                    return None
                with r.lock:
                    if not install():
                        return None
                    r.cold.put(entry)
                into = "cold"
        with r.lock:
            r.counters.tiers[into].puts += 1
        return into

    def copy_below(self, key: Key) -> Entry | None:
        """The form below hot of a live key; one that is in hot alone is encoded, and the copy kept in warm.

        Its demotion then finds a clean copy: it is encoded once, only earlier. None: it is gone.
        """
        r = self._r
        with r.lock:
            meta = r.live(key)
            place = r.lookup(key) if meta is not None else None
        if meta is None or place is None:
            return None
        entry = place[1] if place[1] is not None else self._read_cold(key)
        if entry is None:
            return None
        below = self._form_below(entry, meta)
        if place[0] != "hot" or not below.lossy or entry.lossy:
            return below

        def wanted() -> bool:
            # Put again, demoted or deleted meanwhile: then this form is of no use, or there is one already.
            same = r.index.get(key) is meta and key in r.hot
            if not same or key in r.warm or r.in_cold(key):
                return False
            meta.lossy, meta.encoding = below.lossy, below.encoding
            r.counters.tiers["warm"].puts += 1
            return True

        with self._moving:
            if r.warm.admits(below.nbytes, key, meta.owner):
                self._place(r.warm, below, wanted, meta)
        return below

    def promote(self, key: Key) -> bool:
        """Copy a live key to hot, unless it is there, on its way, or has no room. What is below stays, as clean copy.

        True: copied.
        """
        return self._lift(key, from_disk=False)

    def prefetch(self, key: Key) -> bool:
        """Copy a live key that only the disk holds to memory: to warm in its form there, or else to hot.

        True: copied. What is on disk stays, as clean copy.
        """
        return self._lift(key, from_disk=True)

    def _lift(self, key: Key, *, from_disk: bool) -> bool:
        r = self._r
        with r.lock:
            meta = r.live(key)
            place = r.lookup(key) if meta is not None else None
            above = place is None or place[0] == "hot" or (from_disk and place[0] != "cold")
            if meta is None or place is None or above or (flight := r.flights.start(key)) is None:
                return False
        try:
            entry = place[1] if place[1] is not None else self._read_cold(key)
            if entry is None:
                return False
            into = r.hot
            if from_disk and entry.lossy and r.warm.admits(entry.nbytes, key, meta.owner):
                into, copy = r.warm, entry
            elif (found := self._restored(entry, place, flight)) is not None:
                copy = found
            else:
                return False

            def wanted() -> bool:
                # The clean copy must still be there: a promoted copy may not be the only form left.
                return not flight.called_off and key not in into and bool(r.tiers_of(key))

            moved = False
            with self._moving, suppress(OverQuota):  # what may leave is not its owner's, who has pinned the rest
                moved = into.admits(copy.nbytes, key, meta.owner) and self._place(into, copy, wanted, meta)
            if not moved:
                return False
            with r.lock:
                r.counters.tiers[into.name].promotions += 1
            return True
        finally:
            with r.lock:
                r.flights.finish(flight)

    def _restored(self, entry: Entry, place: tuple[TierName, Entry | None], flight: Flight) -> Entry | None:
        """A raw copy for hot; None where it cannot be made. As for a get: what is damaged is not met again."""
        r, key = self._r, entry.key
        try:
            return self._transcoder.restore(entry)
        except (UnknownEncoding, OverQuota):  # or no room on a device
            return None
        except CodecError as error:  # uncounted as a miss: nobody asked
            log.warning("entry cannot be decoded key=%s error=%s", key.hex(), printable(error))
            with r.lock:
                gone = None if flight.called_off or r.lookup(key) != place else r.forget(key, "corrupt")
            if r.cold is not None:
                r.cold.wait(gone)
            return None

    def trim(self, tier: MemoryTier) -> int:
        """Sink what a memory tier holds over its budget, least recently used first. Returns how many left it."""
        r = self._r
        moved = 0
        with self._moving:
            while True:
                with r.lock:
                    try:
                        victim = tier.displace(0, NO_KEY)
                    except OverQuota:
                        return moved  # the rest is pinned
                    if victim is None:
                        return moved
                    moved += 1
                    stays = self._set_out(tier.name, victim)
                if stays:
                    self._sink(tier.name, victim)
                elif not moved % SLICE:
                    pause()

    def displace_until(self, enough: Callable[[], bool], nbytes: int, owner: Owner) -> bool:
        """Sink entries of hot, least recently used first, until it is enough; False: those left are pinned.

        For room that no budget counts, on a device. nbytes, owner: of what is to come. enough: asked without the lock.
        """
        r = self._r
        with self._moving:
            while not enough():
                with r.lock:
                    try:
                        victim = r.hot.take_next(nbytes, owner)
                    except OverQuota:
                        return False
                    stays = self._set_out("hot", victim)
                if stays:
                    self._sink("hot", victim)
                del victim  # its room is free when nobody refers to it
        return True

    def demote(self, key: Key) -> int:
        """Move a key one tier down, after the chunks that continue it in its tier. Returns how many moved.

        A key stays that is pinned, in the last tier, or that nothing below could hold, and so does what it continues.
        """
        r = self._r
        moved = 0
        with self._moving:
            with r.lock:
                tier = next((t for t in (r.hot, r.warm) if key in t), None)
            at = None if tier is None else key
            while tier is not None and at is not None:
                with r.lock:
                    leaf = tier.leaf(at if at in tier else key)
                    meta = r.index.get(leaf)
                if not self._demote_one(tier, leaf):
                    break
                moved += 1
                at = None if leaf == key or meta is None else meta.parent
        return moved

    def _demote_one(self, tier: MemoryTier, key: Key) -> bool:
        r = self._r
        with r.lock:
            meta, entry = r.live(key), tier.get(key)
            if meta is None or entry is None or meta.pinned or not leaving.has_below(r, tier.name, key, meta):
                return False
            tier.remove(key)
            if leaving.left_at_once(r, tier.name, entry):
                return True
            r.transit[key] = (tier.name, entry)
        self._sink(tier.name, entry)
        return True

    def drain(self) -> int:
        """Write to cold whatever is only in memory, least recently used first. Returns entries written."""
        r = self._r
        if r.cold is None:
            return 0
        written = 0
        with self._moving:
            warm, hot = r.warm.keys_now(), r.hot.keys_now()
            for tier, keys in ((r.warm, warm), (r.hot, hot)):
                written += sum(self._copy_to_cold(tier, key) for key in keys)
            for part in slices(hot):
                with r.lock:
                    r.cold.touch(part)
        r.cold.flush()
        return written

    def _read_cold(self, key: Key) -> Entry | None:
        return self._r.cold.get(key) if self._r.cold is not None else None

    def _place(
        self, tier: MemoryTier, entry: Entry, wanted: Callable[[], bool], meta: Meta, *, soon: bool = False
    ) -> bool:
        """Make room, one displaced entry at a time, and put. `wanted` is asked under the lock just before the put."""
        r = self._r
        while True:
            with r.lock:
                victim, fits = self._displaced(tier, entry, meta)
                if fits:
                    # Asking may take out an older value of the key, so only now: until here that value is still served.
                    if not wanted():
                        return False
                    tier.put(entry, soon=soon, meta=meta)
                    return True
                if victim is not None:
                    r.transit[victim.key] = (tier.name, victim)
            if victim is None:
                pause()
            else:
                self._sink(tier.name, victim)

    def _displaced(self, tier: MemoryTier, entry: Entry, meta: Meta) -> tuple[Entry | None, bool]:
        """Have entries leave at once until one must sink, which is returned, or the entry fits: (None, True).

        (None, False): enough left in this hold of the lock. One large entry may take the place of a million small ones.
        """
        lock = self._r.lock
        while lock.steps > 0:
            lock.steps -= EVICTION_STEPS
            victim = tier.displace(entry.nbytes, entry.key, meta.owner)
            if victim is None or not leaving.left_at_once(self._r, tier.name, victim):
                return victim, victim is None
        return None, False

    def _set_out(self, left: TierName, entry: Entry) -> bool:
        """Under the lock: an entry that left a tier is in transit now, and is to be sunk. False: it left at once."""
        if leaving.left_at_once(self._r, left, entry):
            return False
        self._r.transit[entry.key] = (left, entry)
        return True

    def _sink(self, left: TierName, entry: Entry) -> None:
        """Bring an entry in transit, which left the tier `left`, to the first tier below that takes it."""
        try:
            self._sink_or_raise(left, entry)
        except BaseException:
            # Whatever went wrong (memory ran out while encoding, say), nothing may stay in transit for ever.
            self._forget_in_transit((left, entry))
            raise

    def _sink_or_raise(self, left: TierName, entry: Entry) -> None:
        r = self._r
        item = (left, entry)
        with r.lock:
            meta = r.index.get(entry.key)
            if meta is None or r.transit.get(entry.key) != item:
                return
        below = self._form_below(entry, meta)
        if left == "hot" and below.lossy and r.warm.admits(below.nbytes, entry.key, meta.owner):

            def wanted() -> bool:
                if r.transit.get(entry.key) != item:
                    return False
                leaving.arrived(r, left, below, "warm")
                return True

            self._place(r.warm, below, wanted, meta)
            return
        self._sink_to_cold(item, below)

    def _sink_to_cold(self, item: tuple[TierName, Entry], below: Entry) -> None:
        r = self._r
        left, entry = item
        deserves = r.cold is not None and leaving.deserves_cold(r, entry.key)
        below = self._transcoder.coarser(below, namespace=r.owner_of(entry.key).namespace) if deserves else below
        if r.cold is not None and deserves and self._cold_has_room(r.cold, below):
            with r.lock:
                if r.transit.get(entry.key) == item:
                    leaving.arrived(r, left, below, "cold")
                    r.cold.put(below)
            return
        self._forget_in_transit(item)

    def _forget_in_transit(self, item: tuple[TierName, Entry]) -> None:
        """No tier below takes the entry: it leaves the store, unless it was replaced or deleted meanwhile."""
        r = self._r
        left, entry = item
        with r.lock:
            if r.transit.get(entry.key) == item:
                del r.transit[entry.key]
                leaving.evicted(r, left, entry)

    def _cold_has_room(self, cold: LastTier, entry: Entry) -> bool:
        """Make room on disk, before the lock is taken. False: too large, or it fails: then as without a disk."""
        try:
            cold.displace(entry)
        except (OverQuota, TierUnavailable) as error:
            log.debug("cold takes nothing key=%s reason=%s", entry.key.hex(), error)
            return False
        return True

    def _copy_to_cold(self, tier: MemoryTier, key: Key) -> bool:
        r = self._r
        assert r.cold is not None
        with r.lock:
            meta, entry = r.live(key), tier.get(key)
            if meta is None or entry is None or r.in_cold(key) or (tier is r.hot and key in r.warm):
                return False
        # Not asked whether it deserves a write: admission guards the disk from churn, a drain keeps what there is.
        below = self._transcoder.coarser(self._form_below(entry, meta), namespace=meta.owner.namespace)
        if not self._cold_has_room(r.cold, below):
            return False
        with r.lock:
            if r.index.get(key) is not meta:  # put again: with this Meta an entry moves only under `_moving`
                return False
            meta.lossy, meta.encoding = meta.lossy or below.lossy, below.encoding
            r.cold.put(below)
            r.counters.tiers["cold"].puts += 1
            return True

    def _form_below(self, entry: Entry, meta: Meta) -> Entry:
        """What an entry looks like under hot: encoded unless it must stay exact or is encoded already."""
        keep = meta.exact or entry.encoding != "raw"
        return (
            self._transcoder.exact(entry)
            if keep
            else self._transcoder.encode(entry, prefix_start=meta.prefix_start, namespace=meta.owner.namespace)
        )

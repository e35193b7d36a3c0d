"""Pins: keys that neither capacity nor time removes, until they are unpinned or the pin lapses.

A chunk is of no use without those before it, so a pin on a chunk holds the whole prefix it ends, and an unpinned chunk
stays pinned while a chunk that continues it is. A pin is a flag with an end, not a count: the later end wins, and one
unpin takes it off whoever set it. How many bytes pins may take is the tier's own limit (`pin_max_fraction`).
Thread rule: without the lock, which is taken for one slice of the keys, or of a long prefix, at a time.
"""

from collections.abc import Sequence
from math import inf

from kvstore.errors import OverQuota
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.metadata.slices import SLICE, STEPS, pause, slices
from kvstore.residency.state import Residency


def pin(r: Residency, keys: Sequence[Key], ttl_s: float | None) -> int:
    """Pin keys and the chunks before them, for `ttl_s` seconds, None: until unpinned. Returns how many keys are held.

    Raises OverQuota, with nothing newly pinned.
    """
    pinning = _Pinning(r, inf if ttl_s is None else r.clock.now() + ttl_s)
    changed = 0
    try:
        for part in slices(tuple(dict.fromkeys(keys))):
            with r.lock:
                alive = [key for key in part if r.live(key) is not None]
                # An expired key that was met later may have taken one of them along.
                held = [key for key in alive if key in r.index and r.in_a_tier(key)]
                changed += len(held)
                long = [key for key in held if not pinning.at_once(key)]
            for key in long:
                pinning.in_slices(key)
    except OverQuota:
        pinning.undo()
        raise
    return changed


class _Pinning:
    """The pins of one call. fresh: keys that were not pinned before."""

    def __init__(self, r: Residency, until: float) -> None:
        self._r = r
        self._until = until
        self._fresh: list[Key] = []

    def at_once(self, key: Key) -> bool:
        """Pin a key and the chunks before it; False, with nothing done, where they are too many for this hold."""
        path = [key]
        whole = self._climb(path)
        if whole:
            for at in path:
                self._pin_one(at)
        return whole

    def in_slices(self, key: Key) -> None:
        """Pin a key and the chunks before it, root first: no chunk is pinned before the one that it continues."""
        r, path, whole = self._r, [key], False
        while path:
            with r.lock:
                if r.peek(key) is None:
                    return
                whole = self._pin_some(path) if whole else self._climb(path)
                if path and path[-1] not in r.index:
                    path, whole = [key], False  # the chunk we stood on left: look again
            pause()

    def undo(self) -> None:
        """Unpin what was not pinned before, the deepest first."""
        for part in slices(self._fresh[::-1]):
            with self._r.lock:
                for key in part:
                    if key in self._r.index:
                        self._r.unpin(key)

    def _holds(self, meta: Meta) -> bool:
        return meta.pinned and meta.pinned_until >= self._until

    def _climb(self, path: list[Key]) -> bool:
        """Extend a path upwards, up to the first chunk that is pinned long enough. False: no steps are left."""
        r = self._r
        while r.lock.steps > 0:
            r.lock.steps -= 1
            meta = r.index.get(path[-1])
            if meta is None and len(path) > 1:
                # A chain is put deepest first: the chunk before is not here yet, and is pinned when it comes.
                path.pop()
                if path[-1] in r.leaving:  # or it has left, and what continues it is about to
                    path.clear()
                return True
            if meta is None:
                return False
            if path[-1] in r.leaving or not r.in_a_tier(path[-1]):
                path.clear()  # and so is what continues it
                return True
            if self._holds(meta):
                path.pop()  # so are those before it
                return True
            if meta.parent is None:
                return True
            path.append(meta.parent)
        return False

    def _pin_some(self, path: list[Key]) -> bool:
        """Pin the upper end of a path. False: what comes before it is not pinned any more."""
        r = self._r
        for _ in range(min(STEPS, len(path))):
            meta = r.index.get(path[-1])
            before = None if meta is None or meta.parent is None else r.index.get(meta.parent)
            if meta is None or (before is not None and not self._holds(before)):
                return False
            self._pin_one(path.pop())
        return True

    def _pin_one(self, key: Key) -> None:
        r = self._r
        meta = r.index[key]
        if not meta.pinned:
            if not self._pin_the_lowest(key):
                return
            r.chains.set_pinned(meta, pinned=True)
            meta.pinned_until = self._until
            self._fresh.append(key)
        meta.pinned_until = max(meta.pinned_until, self._until)
        r.deadlines.watch(key, meta)

    def _pin_the_lowest(self, key: Key) -> bool:
        """Pin the form that would leave the store last; copies above it may come and go. False: none is left.

        Cold evicts under its own lock alone, so it may let go of the key between the look and the pin.
        """
        r = self._r
        while tiers := r.tiers_of(key):
            r.tier(tiers[-1]).pin(key)
            if tiers[-1] != "cold" or r.in_cold(key):
                return True
        return False


def unpin(r: Residency, keys: Sequence[Key]) -> int:
    """Unpin keys, the deepest first. Returns how many of them are held and not pinned any more."""
    changed = 0
    for part in slices(tuple(dict.fromkeys(reversed(keys)))):
        with r.lock:
            for key in part:
                if r.live(key) is None or continued_by_a_pin(r, key):
                    continue
                r.unpin(key)
                changed += 1
    return changed


def unpin_below(r: Residency, key: Key) -> None:
    """Unpin the chunks that continue a key, directly or not, the deepest first; the key itself stays as it is."""
    at, meta, done = key, None, False
    while True:
        with r.lock:
            if r.index.get(at) is not meta:
                at, done = key, False  # it left, or this is the start
            for _ in range(SLICE):
                meta = r.index.get(at)
                if meta is not None and meta.pinned_children and meta.first_child is not None and not done:
                    at = meta.first_child
                    continue
                if meta is None or at == key:
                    return
                if meta.pinned:
                    r.unpin(at)
                done = meta.next is None  # then all that continue the parent are
                following = meta.parent if meta.next is None else meta.next
                assert following is not None
                at = following
            meta = r.index.get(at)
        pause()


def continued_by_a_pin(r: Residency, key: Key) -> bool:
    """Whether a chunk that continues this one is pinned."""
    meta = r.index.get(key)
    return meta is not None and meta.pinned_children > 0

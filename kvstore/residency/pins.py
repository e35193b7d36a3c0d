"""Pins: keys that neither capacity nor time removes, until they are unpinned or the pin lapses.

A chunk is of no use without those before it, so a pin on a chunk holds the whole prefix it ends, and an unpinned chunk
stays pinned while a chunk that continues it is. A pin is a flag with an end, not a count: the later end wins, and one
unpin takes it off whoever set it. How many bytes pins may take is the tier's own limit (`pin_max_fraction`).
"""

from collections.abc import Sequence
from math import inf

from kvstore.errors import OverQuota
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.residency.state import Residency


def pin(r: Residency, keys: Sequence[Key], ttl_s: float | None) -> int:
    """Pin keys and the chunks before them, for `ttl_s` seconds, None: until unpinned. Returns how many keys are held.

    Raises OverQuota, with nothing newly pinned.
    """
    until = inf if ttl_s is None else r.clock.now() + ttl_s
    fresh: list[Key] = []
    changed = 0
    with r.lock:
        for key in keys:
            if r.live(key) is None:
                continue
            changed += 1
            for at in (key, *r.chains.ancestors(key)):
                meta = r.index[at]
                if meta.pinned and meta.pinned_until >= until:
                    break  # so are those before it
                try:
                    _pin_one(r, at, meta, until, fresh)
                except OverQuota:
                    for done in fresh:
                        r.unpin(done)
                    raise
    return changed


def _pin_one(r: Residency, key: Key, meta: Meta, until: float, fresh: list[Key]) -> None:
    if not meta.pinned:
        # The lowest form is the one that would leave the store; copies above it may come and go.
        r.tier(r.tiers_of(key)[-1]).pin(key)
        meta.pinned = True
        meta.pinned_until = until
        fresh.append(key)
    meta.pinned_until = max(meta.pinned_until, until)
    r.deadlines.watch(key, meta)


def unpin(r: Residency, keys: Sequence[Key]) -> int:
    """Unpin keys, the deepest first. Returns how many of them are held and not pinned any more."""
    changed = 0
    with r.lock:
        for key in reversed(keys):
            if r.live(key) is None or continued_by_a_pin(r, key):
                continue
            r.unpin(key)
            changed += 1
    return changed


def continued_by_a_pin(r: Residency, key: Key) -> bool:
    """Whether a chunk that continues this one is pinned."""
    meta = r.index.get(key)
    child = None if meta is None else meta.first_child
    while child is not None:
        meta = r.index[child]
        if meta.pinned:
            return True
        child = meta.next
    return False

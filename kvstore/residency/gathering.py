"""What lies in nearly empty segments of shared memory is moved together, so that they run empty and are given back.

A smaller budget leaves holes everywhere: what was used least recently lies anywhere. The pages of a hole cannot be
given back, because segments are sealed against their clients; whole segments can. And what warm holds in ordinary
memory moves to shared memory when clients ask for it as it is held: the next one needs no copy.
Thread rule: no lock is held while bytes are copied. Whoever reads the old copy keeps it until done.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from kvstore.entries.entry import Entry
from kvstore.keys import Key
from kvstore.metadata.slices import slices
from kvstore.residency.placing import copied, place_of
from kvstore.residency.state import Residency
from kvstore.shm.arena import Arena, Owner, Segment
from kvstore.tiers.memory import MemoryTier


def gather(r: Residency, arena: Arena) -> int:
    """Returns the bytes of the segments given back. What is leased or on its way stays, and so does its segment."""
    before = arena.nbytes
    with arena.thinning() as leaving:
        for tier in (r.hot, r.warm) if leaving else ():
            for keys in slices(tier.keys_now()):
                _move(r, tier, keys, leaving, arena)
    return max(0, before - arena.nbytes)


def move(r: Residency, entry: Entry, arena: Arena, owner: Owner) -> Entry | None:
    """What warm holds encoded in ordinary memory is held in a user's shared memory from now on. Returns it there.

    The copy is good for reading whether or not it was still held. None: no room.
    """
    copy = copied(entry, arena, owner)
    if copy is not None:
        with r.lock:
            r.warm.replace(entry, copy)
    return copy


def _move(r: Residency, tier: MemoryTier, keys: Sequence[Key], leaving: AbstractSet[Segment], arena: Arena) -> None:
    with r.lock:
        found = [entry for entry in tier.get_all(keys) if entry is not None and _lies_in(entry, leaving)]
    moved = [(entry, copy) for entry in found if (copy := _beside(entry, arena)) is not None]
    with r.lock:
        for entry, copy in moved:
            tier.replace(entry, copy)


def _lies_in(entry: Entry, segments: AbstractSet[Segment]) -> bool:
    place = place_of(entry)
    return place is not None and place.segment in segments


def _beside(entry: Entry, arena: Arena) -> Entry | None:
    place = place_of(entry)
    assert place is not None
    return copied(entry, arena, place.segment.owner, grow=False)

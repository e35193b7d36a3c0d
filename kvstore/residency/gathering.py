"""What lies in nearly empty segments of shared memory is moved together, so that they run empty and are given back.

A smaller budget leaves holes everywhere: what was used least recently lies anywhere. The pages of a hole cannot be
given back, because segments are sealed against their clients; whole segments can. And what warm holds in ordinary
memory moves to shared memory when a client asks for it as it is held: the next one needs no copy.
Thread rule: no lock is held while bytes are copied. Whoever reads the old copy keeps it until done.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.keys import Key
from kvstore.metadata.slices import slices
from kvstore.residency.state import Residency
from kvstore.shm.arena import Arena, Place, Segment
from kvstore.shm.arena import Owner as SegmentOwner
from kvstore.tiers.memory import MemoryTier


def gather(r: Residency, arena: Arena) -> int:
    """Returns the bytes of the segments given back. What is leased or on its way stays, and so does its segment."""
    before = arena.nbytes
    with arena.thinning() as leaving:
        for tier in (r.hot, r.warm) if leaving else ():
            for keys in slices(tier.keys_now()):
                _move(r, tier, keys, leaving, arena)
    return max(0, before - arena.nbytes)


def move(r: Residency, entry: Entry, arena: Arena, owner: SegmentOwner) -> Entry | None:
    """What warm holds encoded in ordinary memory is held in a user's shared memory from now on. Returns it there.

    The copy is good for reading whether or not it was still held. None: no room.
    """
    copy = _copy(entry, arena, owner)
    if copy is not None:
        with r.lock:
            r.warm.replace(entry, copy)
    return copy


def _move(r: Residency, tier: MemoryTier, keys: Sequence[Key], leaving: AbstractSet[Segment], arena: Arena) -> None:
    with r.lock:
        found = [entry for entry in tier.held(keys) if entry is not None and _lies_in(entry, leaving)]
    moved = [(entry, copy) for entry in found if (copy := _beside(entry, arena)) is not None]
    with r.lock:
        for entry, copy in moved:
            tier.replace(entry, copy)


def _place(entry: Entry) -> Place | None:
    found = entry.block or getattr(entry.tensors, "place", None)
    return found if isinstance(found, Place) else None


def _lies_in(entry: Entry, segments: AbstractSet[Segment]) -> bool:
    place = _place(entry)
    return place is not None and place.segment in segments


def _beside(entry: Entry, arena: Arena) -> Entry | None:
    place = _place(entry)
    assert place is not None
    return _copy(entry, arena, place.segment.owner, grow=False)


def _copy(entry: Entry, arena: Arena, owner: SegmentOwner, *, grow: bool = True) -> Entry | None:
    """The same entry in a block of a user's. None: no room."""
    parts = [part for tensor in entry.tensors.values() for part in tensor.parts.values()]
    specs = {
        str(i): TensorSpec(str(part.dtype).removeprefix("torch."), tuple(part.shape)) for i, part in enumerate(parts)
    }
    room = arena.empty(specs, owner, grow=grow)
    if room is None:
        return None
    for target, source in zip(room.values(), parts, strict=True):
        target.copy_(source)
    made = iter(room.values())
    tensors = {
        name: EncodedTensor(t.spec, t.encoding, {suffix: next(made) for suffix in t.parts}, t.attrs)
        for name, t in entry.tensors.items()
    }
    return Entry(entry.key, tensors, lossy=entry.lossy, block=room.place)

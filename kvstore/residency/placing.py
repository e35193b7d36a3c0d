"""Entries in shared memory: where one lies, and a copy of one in another block. Pure, any thread, without locks."""

import os

from kvstore.dtypes import TensorSpec
from kvstore.entries.compact import PackedTensors
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.shm.arena import Arena, Owner, Place


def place_of(entry: Entry) -> Place | None:
    """Where in shared memory an entry lies; None: in ordinary memory, or its bytes are still on their way."""
    found = entry.block or getattr(entry.tensors, "place_now", None)
    return found if isinstance(found, Place) else None


def copied(entry: Entry, arena: Arena, owner: Owner, *, grow: bool = True) -> Entry | None:
    """The same entry in a block of a user's, its parts one behind the other as they stand in it. None: no room."""
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


def beside(below: Entry, entry: Entry, arena: Arena) -> Entry:
    """The form below hot of an entry, in its user's shared memory; as it is if it is small or there is no room.

    Whoever asks for it as it is held then needs no copy of it.
    """
    if below.encoding == "raw" or isinstance(below.tensors, PackedTensors):
        return below
    place = place_of(entry)
    return copied(below, arena, os.geteuid() if place is None else place.segment.owner) or below

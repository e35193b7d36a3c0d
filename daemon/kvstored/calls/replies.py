"""What is answered for an entry found: what is said of it, and its frames or its place. Any thread.

Over the stream it goes in frames, decoded or as it is held (`EncodedReply`); in shared memory it is said where it lies,
and copied only where it lies in none of the user's segments (`SharedReplies`). What is the same each time is made once:
for all entries of one shape, or kept on the entry.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import xxhash

from kvstore import arrays
from kvstore.dtypes import TensorSpec
from kvstore.entries.compact import PACK_MAX_NBYTES, Layout, PackedTensors, layout_of, payload_of
from kvstore.entries.entry import Entry
from kvstore.hit import Hit, TensorInfo
from kvstore.residency.read_path import Found
from kvstore.shm.arena import Arena, Handed, Owner, Place
from kvstore.shm.layout import layout
from kvstore.store import Store
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import Bytes, Gather, build_miss, cut_frames, submessage
from kvstored_client.wire.messages import TIERS, tensor_specs


@dataclass(frozen=True, eq=False)
class Contents:
    """serialized: the fields of a GetHeader that are the same each time. payload: the bytes behind it, by part.

    ends: where each tensor's bytes end: one that is there whole can be decoded. value_nbytes: once decoded.
    """

    serialized: bytes
    payload: Sequence[Bytes]
    nbytes: int
    ends: frozenset[int]
    value_nbytes: int

    @cached_property
    def xxh3(self) -> int:
        """The checksum of the bytes, as they were when it was first asked for."""
        checksum = xxhash.xxh3_64()
        for part in self.payload:
            checksum.update(part.data)
        return int(checksum.intdigest())


class EncodedReply(NamedTuple):
    """An entry found, to be sent as it is held. again: it was before."""

    tier: str
    age_s: float
    contents: Contents
    entry: Entry
    again: bool


def encoded_reply(found: Found) -> EncodedReply:
    """The reply for an entry found. A large entry keeps it; for a small one it would cost a third of its size."""
    entry, kept = found.entry, found.entry.kept_reply
    if isinstance(kept, Contents):
        return EncodedReply(found.tier, found.age_s, kept, entry, again=True)
    return EncodedReply(found.tier, found.age_s, _contents(entry), entry, again=False)


def _contents(entry: Entry) -> Contents:
    tensors = entry.tensors
    head, packed, counts = _alike(layout_of(entry))
    payload = payload_of(entry)
    own = pb.GetHeader(
        nbytes=entry.value_nbytes,
        encoding=entry.encoding,
        lossy=entry.lossy,
        relative_errors=entry.receipt.values() if entry.lossy else (),
    )
    all_attrs = tensors.attrs if isinstance(tensors, PackedTensors) else [dict(held.attrs) for held in tensors.values()]
    for described, attrs in zip(packed, all_attrs, strict=True):
        one = own.packed.add()
        one.MergeFromString(described)
        if attrs:
            one.attrs = json.dumps(attrs, allow_nan=False)
    ends = [0, *accumulate(part.size for part in payload)]
    nbytes, ends_of_tensors = ends[-1], frozenset(ends[n] for n in counts)
    # Messages one behind the other are one message.
    contents = Contents(head + own.SerializeToString(), payload, nbytes, ends_of_tensors, own.nbytes)
    if not isinstance(tensors, PackedTensors):
        entry.keep_reply(contents)
    return contents


@lru_cache(maxsize=1024)
def _alike(layout: Layout) -> tuple[bytes, tuple[bytes, ...], tuple[int, ...]]:
    """What all entries of one shape share: header bytes, bytes a tensor, the running count of parts."""
    specs = {name: TensorInfo(spec.dtype, spec.shape) for name, spec in zip(layout.names, layout.specs, strict=True)}
    head = pb.GetHeader(tensors=tensor_specs(specs))
    packed: list[bytes] = []
    counts: list[int] = []
    for at, encoding in enumerate(layout.encodings):
        parts = {
            part.suffix: TensorInfo(str(part.dtype).removeprefix("torch."), part.shape)
            for part in layout.parts
            if part.tensor == at
        }
        packed.append(pb.PackedTensor(encoding=encoding, parts=tensor_specs(parts)).SerializeToString())
        counts.append(len(parts) + (counts[-1] if counts else 0))
    return head.SerializeToString(), tuple(packed), tuple(counts)


def hit_header(index: int, hit: Hit | EncodedReply, boot_epoch: int = 0) -> bytes:
    """What is said of a hit before its bytes: a GetHeader, serialized."""
    if isinstance(hit, EncodedReply):
        own = pb.GetHeader(index=index, tier=TIERS[hit.tier], age_s=hit.age_s, boot_epoch=boot_epoch)
        return hit.contents.serialized + own.SerializeToString()
    own = pb.GetHeader(
        index=index,
        tier=TIERS[hit.tier],
        encoding=hit.encoding,
        lossy=hit.lossy,
        age_s=hit.age_s,
        boot_epoch=boot_epoch,
        relative_errors=hit.receipt.values() if hit.lossy else (),
    )
    shapes = tuple([(name, x.dtype, x.shape) for name, x in hit.tensors.items()])
    return _decoded_header(shapes) + own.SerializeToString()  # what is said last counts


def hit_frames(index: int, hit: Hit | EncodedReply | Found | None, boot_epoch: int) -> Iterable[bytes]:
    """The frames that answer one key of a Get. hit: None for a miss."""
    if hit is None:
        return (build_miss(pb.GetMiss(index=index, boot_epoch=boot_epoch)),)
    assert not isinstance(hit, Found)  # nobody reads in place through a stream
    header = hit_header(index, hit, boot_epoch)
    if isinstance(hit, EncodedReply):
        contents = hit.contents
        return cut_frames(header, Gather(contents.payload, contents.ends), contents.xxh3)
    return cut_frames(header, Gather([arrays.as_bytes(x) for x in hit.tensors.values()]))


@dataclass(frozen=True, slots=True, eq=False)
class SharedMemoryReply:
    """The segment an entry lies in, and a serialized LeaseReply with this one block."""

    segment: Handed
    serialized: bytes


@dataclass(frozen=True, slots=True)
class RawShape:
    """What all raw entries of one shape have in common: a namespace's chunks are alike.

    places, nbytes: as `shm.layout.layout`. serialized: the fields of a GetHeader that depend on nothing else.
    """

    places: Mapping[str, tuple[int, int]]
    nbytes: int
    serialized: bytes


@lru_cache(maxsize=1024)
def _raw_shape(specs: tuple[tuple[str, TensorSpec], ...]) -> RawShape:
    infos = {name: TensorInfo(spec.dtype, spec.shape) for name, spec in specs}
    header = pb.GetHeader(
        tensors=tensor_specs(infos), nbytes=sum(spec.nbytes for _, spec in specs), tier=pb.TIER_HOT, encoding="raw"
    )
    return RawShape(*layout(infos), header.SerializeToString())


@lru_cache(maxsize=1024)
def _decoded_header(shapes: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> bytes:
    """`RawShape.serialized` of tensors out of the store, by name, dtype and shape."""
    infos = ((name, TensorInfo(str(dtype).removeprefix("torch."), tuple(shape))) for name, dtype, shape in shapes)
    return _raw_shape(tuple(infos)).serialized


def new_reply(entry: Entry, put_at: float) -> SharedMemoryReply | None:
    """The reply for an entry held raw; None where it lies in no segment. put_at: store's clock."""
    place = entry.block or getattr(entry.tensors, "place", None)
    if not isinstance(place, Place):
        return None
    header = raw_header(entry, pb.GetHeader(put_at=put_at))
    return SharedMemoryReply(place.segment, submessage(pb.LeaseReply.LEASED_FIELD_NUMBER, leased(header, place)))


def raw_header(entry: Entry, own: pb.GetHeader) -> bytes:
    """What is said of an entry held raw in hot, serialized. own: what is said of it alone."""
    shape = _raw_shape(tuple(entry.specs.items()))
    if entry.lossy:
        own.lossy = True
        own.relative_errors.extend(entry.receipt.values())
    return shape.serialized + own.SerializeToString()  # messages one behind the other are one message


def leased(header: bytes, place: Place) -> bytes:
    """A serialized Leased, which describes one block. header: a GetHeader, serialized."""
    rest = pb.Leased(segment=place.segment.number, start=place.start, generation=place.generation)
    return submessage(pb.Leased.HEADER_FIELD_NUMBER, header) + rest.SerializeToString()


@dataclass(frozen=True, slots=True)
class SharedReplies:
    """What is answered in shared memory that a user maps. arena: of what is copied; encoded: of warm's entries."""

    store: Store
    arena: Arena
    encoded: Arena

    def of(self, index: int, hit: Hit | EncodedReply | Found, owner: Owner) -> tuple[object, Handed, bytes] | None:
        """What is to be held of a hit, the segment it lies in, and a Leased; None: there is no room, or no bytes."""
        if isinstance(hit, Found):  # on a device, in a segment that this client maps
            place: Place = hit.entry.tensors.place  # type: ignore[attr-defined]  # else it was not left there
            header = raw_header(hit.entry, pb.GetHeader(index=index, age_s=hit.age_s))
            return hit.entry, place.segment, leased(header, place)
        found = self._lying(hit, owner) or self._copied(hit, owner)
        if found is None:
            return None
        held, place = found
        return held, place.segment, leased(hit_header(index, hit), place)

    def _lying(self, hit: Hit | EncodedReply, owner: Owner) -> tuple[object, Place] | None:
        """As it is, where a user may read it: what was decoded into its room, or is held in its segments.

        What warm holds in ordinary memory moves when it is asked for again: room that was used before is copied to in
        a third of the time, but each time.
        """
        if isinstance(hit, Hit):
            held, place = hit.tensors, getattr(hit.tensors, "place", None)
        else:
            entry = hit.entry
            if hit.again and hit.tier == "warm" and entry.block is None and hit.contents.nbytes > PACK_MAX_NBYTES:
                entry = self.store.move_encoded(entry, self.encoded, owner) or entry
            held, place = entry.tensors, entry.block
        return (held, place) if isinstance(place, Place) and place.segment.owner == owner else None

    def _copied(self, hit: Hit | EncodedReply, owner: Owner) -> tuple[object, Place] | None:
        """Copied to a segment of the user's, unless the tensors lie in one, as a client finds an entry in it."""
        if isinstance(hit, Hit):
            sources: Mapping[str, torch.Tensor] = hit.tensors
            specs = {name: arrays.describe(name, x) for name, x in sources.items()}
        else:
            sources = {str(i): torch.from_numpy(part) for i, part in enumerate(hit.contents.payload)}
            specs = {name: TensorSpec("uint8", (x.numel(),)) for name, x in sources.items()}
        place = self.arena.place_in(sources, *layout(specs), owner)
        if place is not None:
            return sources, place
        room = self.arena.empty(specs, owner)
        if room is None or room.place is None:
            return None
        for name, x in sources.items():
            room[name].copy_(x)
        return room, room.place

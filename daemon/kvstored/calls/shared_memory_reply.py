"""The serialized reply for an entry in shared memory, built once and reused by every get. No state."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import Entry
from kvstore.hit import TensorInfo
from kvstore.shm.arena import Handed, Place
from kvstore.shm.layout import layout
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import submessage
from kvstored_client.wire.messages import relative_errors, tensor_specs


@dataclass(frozen=True, slots=True, eq=False)
class SharedMemoryReply:
    """The segment an entry lies in, and a serialized LeaseReply with this one block."""

    segment: Handed
    serialized: bytes


@dataclass(frozen=True, slots=True)
class Shape:
    """What all raw entries of one shape have in common: a namespace's chunks are alike.

    places, nbytes: as `shm.layout.layout`. serialized: the fields of a GetHeader that depend on nothing else.
    """

    places: Mapping[str, tuple[int, int]]
    nbytes: int
    serialized: bytes


@lru_cache(maxsize=1024)
def _shape_of(specs: tuple[tuple[str, TensorSpec], ...]) -> Shape:
    infos = {name: TensorInfo(spec.dtype, spec.shape) for name, spec in specs}
    header = pb.GetHeader(
        tensors=tensor_specs(infos), nbytes=sum(spec.nbytes for _, spec in specs), tier=pb.TIER_HOT, encoding="raw"
    )
    return Shape(*layout(infos), header.SerializeToString())


def new_reply(entry: Entry, put_at: float) -> SharedMemoryReply | None:
    """The reply for an entry held raw; None where it lies in no segment. put_at: store's clock."""
    place = entry.block or getattr(entry.tensors, "place", None)
    if not isinstance(place, Place):
        return None
    header = raw_header(entry, pb.GetHeader(put_at=put_at))
    return SharedMemoryReply(place.segment, submessage(pb.LeaseReply.LEASED_FIELD_NUMBER, leased(header, place)))


def raw_header(entry: Entry, own: pb.GetHeader) -> bytes:
    """What is said of an entry held raw in hot, serialized. own: what is said of it alone."""
    shape = _shape_of(tuple(entry.specs.items()))
    if entry.lossy:
        own.lossy = True
        own.relative_errors.extend(relative_errors(entry.receipt, lossy=True))
    return shape.serialized + own.SerializeToString()  # messages one behind the other are one message


def leased(header: bytes, place: Place) -> bytes:
    """A serialized Leased, which describes one block. header: a GetHeader, serialized."""
    rest = pb.Leased(segment=place.segment.number, start=place.start, generation=place.generation)
    return submessage(pb.Leased.HEADER_FIELD_NUMBER, header) + rest.SerializeToString()

"""What the answer to a get says of entries' bytes in the daemon's segments, checked. No I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from kvstore.errors import KvstoreError
from kvstore.hit import Hit, TensorInfo
from kvstore.shm.layout import ALIGN
from kvstored_client.decoding import Packed, shape_of
from kvstored_client.interrupts import damage
from kvstored_client.shm.mapped_device import MappedDevice
from kvstored_client.shm.segments import Mapped, Segments, UseStream
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import Bytes
from kvstored_client.wire.messages import TIER_NAMES, read_receipt

_NO_BYTES = np.empty(0, dtype=np.uint8)
BLOCKS_MAX = 4096
"""Blocks whose layout is remembered: about 2 MB for entries of two tensors."""


def found_in(
    reply: pb.LeaseReply, keys: int, segments: Segments, start: int = 0, stop: int | None = None
) -> list[tuple[int, "pb.Leased | bytes", "Block"]]:
    """(position, what is said of it, block) of each entry in the answer to so many keys. Raises UseStream.

    start, stop: only of those entries of the answer.
    """
    check_count(reply, keys)
    leased = reply.leased if stop is None else reply.leased[start:stop]
    if reply.complete:
        return [(at, item, block_of(segments, item)) for at, item in enumerate(leased, start)]
    items = [taken_apart(serialized) for serialized in leased]
    return [(index_of(item.header.index, keys), item, block_of(segments, item)) for item in items]


def items_of(reply: pb.LeaseReply, keys: int, *, leading: bool) -> "Sequence[pb.Leased | bytes | None]":
    """What is said of each key, by position; leading: up to the first miss. Raises UseStream."""
    check_count(reply, keys)
    if reply.complete:
        return reply.leased
    items: list[pb.Leased | None] = [None] * keys
    for item in map(taken_apart, reply.leased):
        items[index_of(item.header.index, keys)] = item
    return items[: items.index(None)] if leading and None in items else items


def check_count(reply: pb.LeaseReply, keys: int) -> None:
    """Raise UseStream for more answers than keys, or fewer where every key has one."""
    found = len(reply.leased)
    if found > keys or (reply.complete and found != keys):
        raise UseStream(f"{found} answers to {keys} keys")


def index_of(serialized: int, keys: int) -> int:
    """The position that an answer names. Raises UseStream for none of so many keys."""
    if serialized >= keys:
        raise UseStream(f"an answer to key {serialized} of {keys}")
    return serialized


@dataclass(frozen=True, slots=True)
class Block:
    """An entry's bytes in a segment, and what its header says of it each time.

    data: all of it. specs, sizes: of the tensors. tensors: (spec, start, nbytes) of what lies there, by name: of those,
    or of packed's parts. put_at: seconds of the daemon's clock, where its reply said that. on_device: it lies in a
    GPU's memory, and has no bytes here.
    """

    mapping: Mapped
    start: int
    nbytes: int
    generation: int
    data: Bytes
    specs: Mapping[str, TensorInfo]
    sizes: tuple[int, ...]
    tensors: Mapping[str, tuple[TensorInfo, int, int]]
    packed: Packed | None
    encoding: str
    lossy: bool
    receipt: dict[str, float]
    put_at: float
    on_device: bool

    def is_gone(self) -> bool:
        """Whether the daemon has used the block again, or is about to."""
        return self.mapping.words[self.start >> self.mapping.shift] != self.generation

    def hit(self, reply: pb.LeaseReply, item: pb.Leased | bytes, key: bytes, tensors: Mapping[str, Any]) -> Hit:
        """The entry as a hit of this reply."""
        if isinstance(item, bytes):  # of a complete reply: all of it out of hot
            tier, age_s = "hot", reply.now - self.put_at
        else:
            tier, age_s = TIER_NAMES.get(item.header.tier, "unknown"), item.header.age_s
        return Hit(key, tensors, tier, self.encoding, self.lossy, age_s, self.receipt.copy())


def taken_apart(serialized: bytes) -> pb.Leased:
    """What is said of one entry. Raises UseStream."""
    try:
        return pb.Leased.FromString(serialized)
    except DecodeError as error:
        raise UseStream(str(error)) from None


def block_of(segments: Segments, item: pb.Leased | bytes) -> Block:
    """The block of an entry. Raises UseStream for what cannot be."""
    # A generation is one block in the daemon's life: the same entry a second time need not have its specs read again,
    # and of a complete reply, which says the same of it each time, not even that.
    known = segments.blocks
    key = item if isinstance(item, bytes) else (item.segment, item.start, item.generation)
    block = known.get(key)
    if block is None:
        if len(known) >= BLOCKS_MAX:
            known.clear()
        try:
            block = known[key] = _new_block(segments, taken_apart(item) if isinstance(item, bytes) else item)
        except Exception as error:
            damaged = damage(error, "a block")
            if damaged is error and not isinstance(error, KvstoreError):
                raise  # UseStream, or an interrupt
            raise UseStream(str(damaged)) from None
    return block


def _new_block(segments: Segments, item: pb.Leased) -> Block:
    head = item.header
    shape = shape_of(head)
    packed = Packed(head, shape) if head.packed else None
    nbytes = shape.block_nbytes
    mapping = segments.get(item.segment)
    if item.start + nbytes > mapping.nbytes or item.start % ALIGN:
        raise UseStream(f"a block from {item.start} to {item.start + nbytes} in a segment of {mapping.nbytes}")
    if isinstance(mapping, MappedDevice):
        if packed is not None:
            raise UseStream("an encoded entry in a GPU's memory")
        data = _NO_BYTES
    elif packed is None:
        data = mapping.bytes[item.start : item.start + nbytes]
    else:  # decoding goes through torch, which warns of an array that it may not write to
        data = mapping.window(item.start, nbytes, None, writable=True).array
    return Block(
        mapping,
        item.start,
        nbytes,
        item.generation,
        data,
        shape.specs,
        shape.sizes,
        shape.lying,
        packed,
        head.encoding,
        head.lossy,
        read_receipt(head),
        head.put_at,
        mapping.device is not None,
    )

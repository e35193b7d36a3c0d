"""Get through shared memory: what an answer says of entries' bytes in the daemon's segments, checked, and copied out.

A get copies out of a segment and checks afterwards that the block was not used again meanwhile. A call takes its
connections into a hand, which its caller puts back whatever happens: what is left unsettled then was interrupted, and
is abandoned.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from kvstore import arrays
from kvstore.device import DriverError
from kvstore.device.copies import Batch
from kvstore.errors import CodecError, KvstoreError
from kvstore.hit import Hit, TensorInfo
from kvstore.packed import PackedTensor
from kvstore.shm.layout import ALIGN
from kvstored_client.buffers import Out, Target
from kvstored_client.decoding import Packed, Parts, shape_of, unpacked
from kvstored_client.interrupts import damage
from kvstored_client.shm.connection import KEYS_PER_PACKET
from kvstored_client.shm.mapped_device import MappedDevice
from kvstored_client.shm.mapping import PARALLEL_NBYTES, Copy, MappedSegment
from kvstored_client.shm.pool import Connection, ConnectionPool, UseStream
from kvstored_client.shm.segments import Mapped, Segments
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import Bytes, get_call
from kvstored_client.wire.messages import TIER_NAMES, GetOptions, read_receipt

_NO_BYTES = np.empty(0, dtype=np.uint8)
BLOCKS_MAX = 4096
"""Blocks whose layout is remembered: about 2 MB for entries of two tensors."""


def get(
    pool: ConnectionPool,
    hand: list[Connection],
    keys: Sequence[bytes],
    how: GetOptions,
    framework: str,
    out: Out = None,
    packed: bool = False,  # noqa: FBT001, FBT002 - handed on by position
    on_gpu: bool = False,  # noqa: FBT001, FBT002 - as above
) -> tuple[list[Hit | None], int, int]:
    """(hits by position, stale blocks, boot epoch). Raises UseStream, Silent, OutMismatch or the daemon's error.

    out: for each key tensors to fill, or None; on_gpu: some of them are on a GPU that a driver serves. packed: what is
    held encoded comes as it is held.
    """
    hits: list[Hit | None] = [None] * len(keys)
    stale = epoch = 0
    connection = pool.take(hand)
    for start in range(0, len(keys), KEYS_PER_PACKET):
        part = keys[start : start + KEYS_PER_PACKET]
        reply = connection.exchange(get_call(part, how.rest), pool.timeout_s)
        epoch = reply.boot_epoch
        if how.device:
            connection.segments.let_go()  # memory of a GPU that the daemon has given back
        batch = pool.transfers.batch_for(out) if on_gpu and out is not None else None
        late = []
        try:
            for at, item, block in found_in(reply, len(part), connection.segments):
                index = start + at
                into = out[index] if out is not None else None
                target = target_for(block, framework, into, batch, packed=packed)
                # What the copier would do, without a call of its own for each small tensor.
                copy = np.copyto if block.nbytes < PARALLEL_NBYTES else pool.copier.copy
                if not filled(copy, block, target):
                    stale += 1
                elif target.direct:
                    late.append((index, item, block, target))
                else:
                    hits[index] = block.hit(reply, item, keys[index], target.tensors)
            if batch is not None:
                for ok, (index, item, block, target) in zip(loaded(pool, batch, late), late, strict=True):
                    stale += not ok
                    hits[index] = block.hit(reply, item, keys[index], target.tensors) if ok else None
        finally:
            connection.give_back(reply.lease)
        if how.leading and len(reply.leased) < len(part):
            break
        if start + KEYS_PER_PACKET < len(keys):
            how = how.continued()
    return hits, stale, epoch


def target_for(
    block: "Block", framework: str, out: Mapping[str, Any] | None, batch: Batch | None = None, *, packed: bool = False
) -> Target:
    """Where a block's tensors go. batch: takes those on a GPU, unless they have to be decoded here. Raises OutMismatch.

    packed: what lies there encoded goes as it lies.
    """
    try:
        if packed and block.packed is not None:
            return Parts(block.packed, framework)
        if block.packed is not None and not (batch and batch.decodes):
            batch = None
        return Target(block.specs, block.sizes, framework, out, batch)
    except Exception as error:  # noqa: BLE001 - the boundary; interrupts pass it
        raise damage(error, "a block") from None


def filled(copy: Copy, block: "Block", target: Target) -> bool:
    """Copy or decode a block, but for what is `direct`; False if it was used again meanwhile. Raises UseStream."""
    if block.on_device and target.bytes:
        raise UseStream("what lies in a GPU's memory is no answer for tensors that do not")
    if block.packed is not None and not isinstance(target, Parts):
        parts = [block.data[at : at + nbytes] for _, at, nbytes in block.tensors.values()]
        try:
            block.packed.decode(parts, target.bytes)
        except CodecError:
            return False
    else:
        for name, (_, at, nbytes) in block.tensors.items():
            if name in target.bytes:
                copy(target.bytes[name], block.data[at : at + nbytes])
    if target.unfinished:
        try:
            target.finish()
        except CodecError:
            return False
    # After the copy: the daemon overwrites the generation before it uses a block again.
    return not block.is_gone()


def loaded(pool: ConnectionPool, batch: Batch, late: Sequence[tuple[int, Any, "Block", Target]]) -> list[bool]:
    """Copy blocks to the GPU, all at once; for each whether it was there to the end. Nothing is copied afterwards.

    Raises UseStream where a copy within the GPU fails: what the host has no bytes of comes another way.
    """
    packed: list[tuple[Any, Any]] = []
    for _, _, block, target in late:
        if target.direct and isinstance(block.mapping, MappedSegment):
            pool.transfers.uses(block.mapping)
        held = _held_packed(block) if target.direct else {}
        for name, x in target.direct.items():
            if isinstance(held.get(name), PackedTensor):
                packed.append((x, held[name]))
            else:
                at = block.tensors[name][1] if block.packed is None else held[name].data_ptr() - block.data.ctypes.data
                batch.load(x, block.mapping.address + block.start + at)
    try:
        left = pool.transfers.run(batch, packed)
    except DriverError as error:
        if any(block.on_device for _, _, block, _ in late):
            pool.transfers.map_no_more(str(error))
            raise UseStream(str(error)) from None
        left = [pair for _, _, block, target in late for pair in _from_host(block, target)]
    damaged = {id(x) for x, source in left if not _decoded_into(x, source)}
    # After the copies: see `filled`.
    return [not block.is_gone() and damaged.isdisjoint(map(id, target.direct.values())) for _, _, block, target in late]


def _held_packed(block: "Block") -> dict[str, Any]:
    """The tensors of a packed block over its memory; of another one: none."""
    if block.packed is None:
        return {}
    lying = block.tensors.values()
    return block.packed.given_out(arrays.from_bytes(spec, block.data[at : at + n], "torch") for spec, at, n in lying)


def _from_host(block: "Block", target: Target) -> Iterator[tuple[Any, Any]]:
    held = _held_packed(block)
    for name, x in target.direct.items():
        if block.packed is None:
            spec, at, nbytes = block.tensors[name]
            yield x, arrays.from_bytes(spec, block.data[at : at + nbytes].copy(), "torch")
        else:
            yield x, held[name]


def _decoded_into(x: Any, source: Any) -> bool:
    """Fill a tensor through torch; False: the source is damaged."""
    try:
        x.copy_(unpacked(source))
    except CodecError:
        return False
    return True


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

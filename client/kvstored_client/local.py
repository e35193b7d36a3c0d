"""Get, lease and put through shared memory: what `Client` does when daemon and worker share a host.

A get copies out of the daemon's segment and checks afterwards that the block was not used again meanwhile; a lease
hands out the bytes themselves; a put fills the connection's own ingest segment and the daemon copies from there.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import numpy as np

from kvstore import arrays
from kvstore.errors import CodecError, KvstoreError, RecordCorrupt
from kvstore.hit import Hit, TensorInfo
from kvstore.region import layout
from kvstored_client._pb import cache_pb2 as pb
from kvstored_client.decoding import Packed
from kvstored_client.frames import Bytes
from kvstored_client.mapping import Copier, Window
from kvstored_client.messages import PAYLOAD_BYTES_PER_S, TIER_NAMES, read_receipt, read_specs
from kvstored_client.near import Connection, Near, UseStream
from kvstored_client.receive import Out, Target
from kvstored_client.send import Outgoing

KEYS_PER_PACKET = 512
BLOCKS_MAX = 4096
"""Blocks whose layout is remembered: about 2 MB for entries of two tensors."""
COMMIT_NBYTES = 64 << 20
"""Payload of one commit: what a connection's ingest segments need to hold for a batch of any length."""


class LeaseKept(KvstoreError):
    """A tensor of a lease is still referred to after its block: copy what is needed inside."""


class LeasedTensors(Mapping[str, Any]):
    """The tensors of a leased hit, made when first looked at, until the lease ends."""

    def __init__(self, lease: "Lease", item: pb.Leased) -> None:
        self._lease: Lease | None = lease
        self._item = item
        self._made: dict[str, Any] | None = None

    def _held(self) -> dict[str, Any]:
        if self._lease is None:
            raise LeaseKept("this lease has ended: its tensors are only there inside the block")
        if self._made is None:
            self._made = self._lease.view(self._item)
        return self._made

    def __getitem__(self, name: str) -> Any:
        return self._held()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held())

    def __len__(self) -> int:
        return len(self._held())

    def end(self) -> None:
        """Let go of the tensors; torch tensors handed out become empty, whoever holds them."""
        for x in (self._made or {}).values():
            if arrays.is_torch(x):
                x.set_()
        self._lease = self._made = None


class Lease:
    """What one reply holds. Given back with the last reference to this: the block's, or a window's over its bytes."""

    def __init__(self, connection: Connection, number: int, framework: str) -> None:
        self._connection = connection
        self._number = number
        self._framework = framework
        self._windows: list[weakref.ref[Window]] = []
        self._viewed: list[tuple[Block, int]] = []

    def view(self, item: pb.Leased) -> dict[str, Any]:
        """Tensors over a leased block. Raises UseStream for one that cannot be."""
        block = _block(self._connection, item)
        self._viewed.append((block, item.generation))
        segment = self._connection.segments.get(item.segment)
        window = Window(segment, item.start, block.bytes.size, self._outlived)
        self._windows.append(weakref.ref(window))
        data = window.array(writable=self._framework == "torch")
        tensors = {
            name: arrays.from_bytes(spec, data[at : at + nbytes], self._framework)
            for name, (spec, at, nbytes) in block.tensors.items()
        }
        if self._framework == "torch":
            # A view remembers what it is a view of, and would keep the memory after `end` has emptied it.
            tensors = {name: x.new_empty(0).set_(x) for name, x in tensors.items()}
        return tensors

    def _outlived(self) -> None:
        """Nothing to do: a window refers to this method, and with it to the lease, for as long as it is."""

    def is_lost(self) -> bool:
        """Whether a block was used again while it was read: the lease had reached its maximum age."""
        return any(block.generation() != generation for block, generation in self._viewed)

    def is_kept(self) -> bool:
        """Whether a tensor is still referred to."""
        return any(window() is not None for window in self._windows)

    def __del__(self) -> None:
        self._connection.release(self._number)


class LeasedHits(Sequence[Hit | None]):
    """The hits of a lease, by position, each made when it is looked at: who reads one of a hundred pays for one."""

    def __init__(self, lease: Lease, reply: pb.LeaseReply, keys: list[bytes], *, leading: bool) -> None:
        self._lease: Lease | None = lease
        self._reply = reply
        self._keys = keys
        self._made: dict[int, Hit] = {}
        self._items: Sequence[pb.Leased | None] = reply.leased
        if not reply.complete:
            items: list[pb.Leased | None] = [None] * len(keys)
            for item in reply.leased:
                items[item.header.index] = item
            self._items = items[: items.index(None)] if leading and None in items else items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, at: int) -> Hit | None: ...

    @overload
    def __getitem__(self, at: slice) -> list[Hit | None]: ...

    def __getitem__(self, at: int | slice) -> Hit | list[Hit | None] | None:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        item = self._items[at]
        if item is None:
            return None
        at %= len(self)
        hit = self._made.get(at)
        if hit is None:
            if self._lease is None:
                raise LeaseKept("this lease has ended: its hits are only there inside the block")
            hit = self._made[at] = _hit(self._reply, item, self._keys[at], LeasedTensors(self._lease, item))
        return hit

    def end(self) -> None:
        """Let go of everything handed out."""
        self._lease = None
        for hit in self._made.values():
            cast("LeasedTensors", hit.tensors).end()


def get(near: Near, asked: pb.GetRequest, framework: str, out: Out = None) -> tuple[list[Hit | None], int, int]:
    """(hits by position, stale blocks, boot epoch). Raises UseStream, Silent, OutMismatch or the daemon's error.

    out: for each key tensors to fill, or None.
    """
    keys = list(asked.keys)
    hits: list[Hit | None] = [None] * len(keys)
    stale = epoch = 0
    with near.connection() as connection:
        for start in range(0, len(keys), KEYS_PER_PACKET):
            part = keys[start : start + KEYS_PER_PACKET]
            request = asked
            if len(part) < len(keys):
                request = pb.GetRequest()
                request.CopyFrom(asked)
                request.keys[:] = part
            reply = connection.call(pb.LeaseCall(get=request), near.timeout_s)
            epoch = reply.boot_epoch
            try:
                for at, item in enumerate(reply.leased):
                    index = start + (at if reply.complete else item.header.index)
                    target = out[index] if out is not None else None
                    tensors = _copied(near.copier, connection, item, framework, target)
                    if tensors is None:
                        stale += 1
                    else:
                        hits[index] = _hit(reply, item, keys[index], tensors)
            finally:
                connection.release(reply.lease)
            if asked.leading and len(reply.leased) < len(part):
                break
    return hits, stale, epoch


def _copied(
    copier: Copier, connection: Connection, item: pb.Leased, framework: str, out: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The tensors of a block, copied or decoded; None if the block was used again meanwhile."""
    block = _block(connection, item)
    target = Target(block.specs, framework, out)
    if block.packed is not None:
        parts = [block.bytes[at : at + nbytes] for _, at, nbytes in block.tensors.values()]
        try:
            block.packed.decode(parts, target.bytes)
        except CodecError:
            return None
    else:
        for name, (_, at, nbytes) in block.tensors.items():
            copier.copy(target.bytes[name], block.bytes[at : at + nbytes])
    target.finish()
    # After the copy: the daemon overwrites the generation before it uses a block again.
    return target.tensors if block.generation() == item.generation else None


@dataclass(frozen=True, slots=True)
class Block:
    """An entry's bytes in a segment.

    specs: of its tensors. tensors: (spec, start, nbytes) of what lies there, by name: of those, or of packed's parts.
    """

    bytes: Bytes
    specs: Mapping[str, TensorInfo]
    tensors: Mapping[str, tuple[TensorInfo, int, int]]
    packed: Packed | None

    def generation(self) -> int:
        """The number that stands there now."""
        return int(self.bytes[:8].view(np.uint64)[0])


def _block(connection: Connection, item: pb.Leased) -> Block:
    # A generation is one block in the daemon's life: the same entry a second time need not have its specs read again.
    known = connection.segments.blocks
    key = (item.segment, item.start, item.generation)
    block = known.get(key)
    if block is None:
        specs = read_specs(item.header.tensors)
        arrays.check_specs(specs)
        packed = Packed(item.header, specs) if item.header.packed else None
        lying = specs if packed is None else packed.parts
        places, nbytes = layout(lying)
        segment = connection.segments.get(item.segment)
        if item.start + nbytes > segment.nbytes:
            raise UseStream(f"a block that ends at {item.start + nbytes} in a segment of {segment.nbytes}")
        tensors = {name: (spec, *places[name]) for name, spec in lying.items()}
        # Decoding goes through torch, which warns of an array that it may not write to.
        window = Window(segment, item.start, nbytes, _nothing)
        block = Block(window.array(writable=packed is not None), specs, tensors, packed)
        if len(known) >= BLOCKS_MAX:
            known.clear()
        known[key] = block
    return block


def _nothing() -> None:
    pass


def _hit(reply: pb.LeaseReply, item: pb.Leased, key: bytes, tensors: Mapping[str, Any]) -> Hit:
    head = item.header
    age_s = reply.now - head.put_at if head.put_at else head.age_s
    return Hit(key, tensors, TIER_NAMES.get(head.tier, "unknown"), head.encoding, head.lossy, age_s, read_receipt(head))


class LeasedBlock:
    """`lease` as a context: the hits inside it, LeaseKept at its end if a tensor is still referred to."""

    def __init__(self, lease: Lease, hits: LeasedHits) -> None:
        self._lease: Lease | None = lease
        self._hits = hits

    def __enter__(self) -> LeasedHits:
        return self._hits

    def __exit__(self, kind: object, *_: object) -> None:
        self._hits.end()
        lease, self._lease = self._lease, None
        if kind is not None or lease is None:
            return
        if lease.is_lost():
            raise RecordCorrupt(
                "this lease ended before its block did (server.lease_max_s): what was read may be wrong"
            )
        if lease.is_kept():
            raise LeaseKept("a tensor of this lease is still referred to: copy it inside the block")


def lease(near: Near, keys: list[bytes], framework: str, *, leading: bool) -> LeasedBlock:
    """The bytes themselves, for the length of a block. Raises as `get`."""
    with near.connection() as connection:
        reply = connection.call(pb.LeaseCall(get=pb.GetRequest(keys=keys, leading=leading)), near.timeout_s)
    held = Lease(connection, reply.lease, framework)
    return LeasedBlock(held, LeasedHits(held, reply, keys, leading=leading))


def put(near: Near, batch: Sequence[Outgoing]) -> tuple[int, int, int]:
    """(entries stored, boot epoch, commits). A long batch goes in several commits, root first: a chain has no holes."""
    stored = epoch = commits = start = 0
    while start < len(batch):
        stop, nbytes = start + 1, batch[start].nbytes
        while stop < len(batch) and stop - start < KEYS_PER_PACKET and nbytes + batch[stop].nbytes <= COMMIT_NBYTES:
            nbytes += batch[stop].nbytes
            stop += 1
        reply = _commit(near, batch[start:stop])
        stored, epoch, commits, start = stored + reply.stored, reply.boot_epoch, commits + 1, stop
    return stored, epoch, commits


def _commit(near: Near, entries: Sequence[Outgoing]) -> pb.PutReply:
    nbytes = sum(entry.nbytes for entry in entries)
    timeout_s = near.timeout_s + nbytes / PAYLOAD_BYTES_PER_S
    with near.connection(_owner(near, entries)) as connection:
        windows: list[Window] = []  # kept until the daemon has copied
        call = pb.LeaseCall()
        for entry in entries:
            item = call.put.entries.add(header=entry.header)
            for x in entry.tensors.values():
                segment, start = _ingested(near, connection, x, windows, timeout_s)
                item.places.add(segment=segment, start=start)
        return connection.call(call, timeout_s).put


def _owner(near: Near, entries: Sequence[Outgoing]) -> Connection | None:
    """The connection whose ingest segment the first tensor already lies in."""
    x = next(iter(entries[0].tensors.values()))
    found = _lies_in(near, x)
    return found[0] if found is not None else None


def _lies_in(near: Near, x: Any) -> tuple[Connection, int, int] | None:
    if arrays.is_torch(x):
        if x.device.type != "cpu" or not x.is_contiguous() or x.is_conj() or x.is_neg():
            return None
        address, nbytes = x.data_ptr(), x.nbytes
    else:
        if not (x.flags.c_contiguous and x.dtype.isnative):
            return None
        address, nbytes = x.ctypes.data, x.nbytes
    return near.owner_of(address, nbytes) if nbytes else None


def _ingested(near: Near, connection: Connection, x: Any, windows: list[Window], timeout_s: float) -> tuple[int, int]:
    found = _lies_in(near, x)
    if found is not None and found[0] is connection:
        return found[1], found[2]
    data = arrays.as_bytes(x)
    if not data.size:
        return 0, 0
    window, segment, start = connection.room(data.size, timeout_s)
    windows.append(window)
    near.copier.copy(window.array(writable=True), data)
    return segment, start


def empty(near: Near, spec: TensorInfo, framework: str) -> Any:
    """A tensor in this client's own shared memory, not cleared: filling it is all a put has to copy."""
    nbytes = arrays.check_specs({"x": spec})
    with near.connection() as connection:
        window, _, _ = connection.room(max(nbytes, 1), near.timeout_s)
        return arrays.from_bytes(spec, window.array(writable=True)[:nbytes], framework)

"""Get, lease and put through shared memory: what `Client` does when daemon and worker share a host.

A get copies out of the daemon's segment and checks afterwards that the block was not used again meanwhile; a lease
hands out the bytes themselves; a put fills the connection's own ingest segment and the daemon copies from there.
A call takes its connections through a Turn, which its caller puts back whatever happens: what is left unsettled then
was interrupted, and is abandoned.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast, overload

from google.protobuf.message import DecodeError

from kvstore import arrays
from kvstore.errors import CodecError, KvstoreError, LeaseKept, RecordCorrupt
from kvstore.hit import Hit, TensorInfo
from kvstore.shm.layout import ALIGN
from kvstored_client.buffers import Out, Target, Window
from kvstored_client.decoding import Packed, shape_of
from kvstored_client.interrupts import damage
from kvstored_client.puts import Outgoing
from kvstored_client.shm.mapping import Copier, MappedSegment
from kvstored_client.shm.pool import Connection, ConnectionPool, Segments, Turn, UseStream
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import Bytes, get_request, submessage
from kvstored_client.wire.messages import PAYLOAD_BYTES_PER_S, TIER_NAMES, GetOptions, read_receipt

KEYS_PER_PACKET = 512
BLOCKS_MAX = 4096
"""Blocks whose layout is remembered: about 2 MB for entries of two tensors."""
COMMIT_NBYTES = 64 << 20
"""Payload of one commit: what a connection's ingest segments need to hold for a batch of any length."""


class LeasedTensors(Mapping[str, Any]):
    """The tensors of a leased hit, made when first looked at, until the lease ends."""

    def __init__(self, lease: "Lease", block: "Block") -> None:
        self._lease: Lease | None = lease
        self._block = block
        self._made: dict[str, Any] | None = None

    def _held(self) -> dict[str, Any]:
        if self._lease is None:
            raise LeaseKept("this lease has ended: its tensors are only there inside the block")
        if self._made is None:
            try:
                self._made = self._lease.view(self._block)
            except Exception as error:  # noqa: BLE001 - the boundary; interrupts pass it
                raise damage(error, "a block") from None
        return self._made

    def __getitem__(self, name: str) -> Any:
        return self._held()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held())

    def __len__(self) -> int:
        return len(self._held())

    def end(self) -> None:
        """Let go of the tensors; torch tensors handed out become empty, whoever holds them."""
        if self._made is not None and self._lease is not None and self._lease.framework == "torch":
            for x in self._made.values():
                x.set_()
        self._lease = self._made = None


class Lease:
    """What one reply holds. Given back with the last reference to this: the block's, or a window's over its bytes."""

    __slots__ = ("__weakref__", "_connection", "_viewed", "framework")

    def __init__(self, connection: Connection, framework: str) -> None:
        self._connection = connection
        self.framework = framework
        self._viewed: list[tuple[Block, weakref.ref[Window]]] = []

    def view(self, block: "Block") -> dict[str, Any]:
        """Tensors over a leased block."""
        framework = self.framework
        window = block.mapping.window(block.start, block.nbytes, self, writable=framework == "torch")
        self._viewed.append((block, weakref.ref(window)))
        data = window.array
        tensors = {
            name: arrays.from_bytes(spec, data[at : at + nbytes], framework)
            for name, (spec, at, nbytes) in block.tensors.items()
        }
        if framework == "torch":
            # A view remembers what it is a view of, and would keep the memory after `end` has emptied it.
            tensors = {name: x.new_empty(0).set_(x) for name, x in tensors.items()}
        return tensors

    def end(self) -> None:
        """Raise RecordCorrupt where a block was used again while it was read, LeaseKept where one still is."""
        for block, _ in self._viewed:
            if block.is_gone():
                raise RecordCorrupt(
                    "this lease ended before its block did (server.lease_max_s): what was read may be wrong"
                )
        for _, window in self._viewed:
            if window() is not None:
                raise LeaseKept("a tensor of this lease is still referred to: copy it inside the block")

    def __del__(self) -> None:
        # Only so that it is soon: that it ended is known to the connection already.
        self._connection.wake()


class LeasedHits(Sequence[Hit | None]):
    """The hits of a lease, by position, each made when it is looked at: who reads one of a hundred pays for one."""

    def __init__(
        self, lease: Lease, segments: Segments, reply: pb.LeaseReply, keys: list[bytes], *, leading: bool
    ) -> None:
        self._lease: Lease | None = lease
        self._segments = segments
        self._reply = reply
        self._keys = keys
        self._made: dict[int, Hit] = {}
        _check_count(reply, len(keys))
        self._items: Sequence[pb.Leased | bytes | None] = reply.leased
        if not reply.complete:
            items: list[pb.Leased | None] = [None] * len(keys)
            for item in map(_taken_apart, reply.leased):
                items[_index(item.header.index, len(keys))] = item
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
        if at < 0:
            at += len(self._items)
        hit = self._made.get(at)
        if hit is None:
            if self._lease is None:
                raise LeaseKept("this lease has ended: its hits are only there inside the block")
            try:
                block = _block(self._segments, item)
            except UseStream as error:
                raise RecordCorrupt(f"what the daemon says of a block cannot be: {error}") from None
            hit = self._made[at] = block.hit(self._reply, item, self._keys[at], LeasedTensors(self._lease, block))
        return hit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        lease, self._lease = self._lease, None
        for hit in self._made.values():
            cast("LeasedTensors", hit.tensors).end()
        if kind is None and lease is not None:
            lease.end()


def ask(turn: Turn, call: pb.LeaseCall) -> pb.LeaseReply:
    """One small call and its answer."""
    connection = turn.take()
    reply = connection.call(call, turn.pool.timeout_s)
    connection.give_back(reply.lease)
    return reply


def get(
    turn: Turn, keys: list[bytes], how: GetOptions, framework: str, out: Out = None
) -> tuple[list[Hit | None], int, int]:
    """(hits by position, stale blocks, boot epoch). Raises UseStream, Silent, OutMismatch or the daemon's error.

    out: for each key tensors to fill, or None.
    """
    hits: list[Hit | None] = [None] * len(keys)
    stale = epoch = 0
    connection = turn.take()
    for start in range(0, len(keys), KEYS_PER_PACKET):
        part = keys[start : start + KEYS_PER_PACKET]
        reply = connection.exchange(_get_call(part, how), turn.pool.timeout_s)
        epoch = reply.boot_epoch
        try:
            _check_count(reply, len(part))
            for at, serialized in enumerate(reply.leased):
                item = serialized if reply.complete else _taken_apart(serialized)
                index = start + _index(at if isinstance(item, bytes) else item.header.index, len(part))
                target = out[index] if out is not None else None
                block = _block(connection.segments, item)
                tensors = _copied(turn.pool.copier, block, framework, target)
                if tensors is None:
                    stale += 1
                else:
                    hits[index] = block.hit(reply, item, keys[index], tensors)
        finally:
            connection.give_back(reply.lease)
        if how.leading and len(reply.leased) < len(part):
            break
    return hits, stale, epoch


def _check_count(reply: pb.LeaseReply, keys: int) -> None:
    found = len(reply.leased)
    if found > keys or (reply.complete and found != keys):
        raise UseStream(f"{found} answers to {keys} keys")


def _index(serialized: int, keys: int) -> int:
    if serialized >= keys:
        raise UseStream(f"an answer to key {serialized} of {keys}")
    return serialized


def _get_call(keys: Sequence[bytes], how: GetOptions) -> bytes:
    return submessage(pb.LeaseCall.GET_FIELD_NUMBER, get_request(keys, how.rest))


def _copied(copier: Copier, block: "Block", framework: str, out: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The tensors of a block, copied or decoded; None if the block was used again meanwhile."""
    try:
        target = Target(block.specs, framework, out)
    except Exception as error:  # noqa: BLE001 - the boundary; interrupts pass it
        raise damage(error, "a block") from None
    if block.packed is not None:
        parts = [block.data[at : at + nbytes] for _, at, nbytes in block.tensors.values()]
        try:
            block.packed.decode(parts, target.bytes)
        except CodecError:
            return None
    else:
        for name, (_, at, nbytes) in block.tensors.items():
            copier.copy(target.bytes[name], block.data[at : at + nbytes])
    target.finish()
    # After the copy: the daemon overwrites the generation before it uses a block again.
    return None if block.is_gone() else target.tensors


@dataclass(frozen=True, slots=True)
class Block:
    """An entry's bytes in a segment, and what its header says of it each time.

    data: all of it. specs: of the tensors. tensors: (spec, start, nbytes) of what lies there, by name: of those, or of
    packed's parts. put_at: seconds of the daemon's clock, where its reply said that.
    """

    mapping: MappedSegment
    start: int
    nbytes: int
    generation: int
    data: Bytes
    specs: Mapping[str, TensorInfo]
    tensors: Mapping[str, tuple[TensorInfo, int, int]]
    packed: Packed | None
    encoding: str
    lossy: bool
    receipt: dict[str, float]
    put_at: float

    def is_gone(self) -> bool:
        """Whether the daemon has used the block again, or is about to."""
        return self.mapping.words[self.start >> 3] != self.generation

    def hit(self, reply: pb.LeaseReply, item: pb.Leased | bytes, key: bytes, tensors: Mapping[str, Any]) -> Hit:
        """The entry as a hit of this reply."""
        if isinstance(item, bytes):  # of a complete reply: all of it out of hot
            tier, age_s = "hot", reply.now - self.put_at
        else:
            tier, age_s = TIER_NAMES.get(item.header.tier, "unknown"), item.header.age_s
        return Hit(key, tensors, tier, self.encoding, self.lossy, age_s, self.receipt.copy())


def _taken_apart(serialized: bytes) -> pb.Leased:
    try:
        return pb.Leased.FromString(serialized)
    except DecodeError as error:
        raise UseStream(str(error)) from None


def _block(segments: Segments, item: pb.Leased | bytes) -> Block:
    # A generation is one block in the daemon's life: the same entry a second time need not have its specs read again,
    # and of a complete reply, which says the same of it each time, not even that.
    known = segments.blocks
    key = item if isinstance(item, bytes) else (item.segment, item.start, item.generation)
    block = known.get(key)
    if block is None:
        if len(known) >= BLOCKS_MAX:
            known.clear()
        try:
            block = known[key] = _new_block(segments, _taken_apart(item) if isinstance(item, bytes) else item)
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
    # Decoding goes through torch, which warns of an array that it may not write to.
    window = mapping.window(item.start, nbytes, None, writable=packed is not None)
    return Block(
        mapping,
        item.start,
        nbytes,
        item.generation,
        window.array,
        shape.specs,
        shape.lying,
        packed,
        head.encoding,
        head.lossy,
        read_receipt(head),
        head.put_at,
    )


def lease(turn: Turn, keys: list[bytes], how: GetOptions, framework: str) -> LeasedHits:
    """The bytes themselves, until the hits' context ends. Raises as `get`."""
    connection = turn.take()
    reply = connection.exchange(_get_call(keys, how), turn.pool.timeout_s)
    owner = Lease(connection, framework)
    connection.hold(owner, reply.lease)
    return LeasedHits(owner, connection.segments, reply, keys, leading=how.leading)


def put(turn: Turn, batch: Sequence[Outgoing]) -> tuple[int, int, int]:
    """(entries stored, boot epoch, commits). A long batch goes in several commits, root first: a chain has no holes."""
    stored = epoch = commits = start = 0
    while start < len(batch):
        stop, nbytes = start + 1, batch[start].nbytes
        while stop < len(batch) and stop - start < KEYS_PER_PACKET and nbytes + batch[stop].nbytes <= COMMIT_NBYTES:
            nbytes += batch[stop].nbytes
            stop += 1
        reply = _commit(turn, batch[start:stop])
        stored, epoch, commits, start = stored + reply.stored, reply.boot_epoch, commits + 1, stop
    return stored, epoch, commits


def _commit(turn: Turn, entries: Sequence[Outgoing]) -> pb.PutReply:
    nbytes = sum(entry.nbytes for entry in entries)
    timeout_s = turn.pool.timeout_s + nbytes / PAYLOAD_BYTES_PER_S
    connection = turn.take(_owner(turn.pool, entries))
    connection.settled = False  # its room is in use
    windows: list[Window] = []  # kept until the daemon has copied
    call = pb.LeaseCall()
    for entry in entries:
        item = call.put.entries.add(header=entry.header)
        for x in entry.tensors.values():
            segment, start = _ingested(turn.pool, connection, x, windows, timeout_s)
            item.places.add(segment=segment, start=start)
    reply = connection.call(call, timeout_s)
    connection.give_back(reply.lease)
    turn.put_back()
    return reply.put


def _owner(pool: ConnectionPool, entries: Sequence[Outgoing]) -> Connection | None:
    """The connection whose ingest segment the first tensor already lies in."""
    x = next(iter(entries[0].tensors.values()))
    found = _lies_in(pool, x)
    return found[0] if found is not None else None


def _lies_in(pool: ConnectionPool, x: Any) -> tuple[Connection, int, int] | None:
    if arrays.is_torch(x):
        if x.device.type != "cpu" or not x.is_contiguous() or x.is_conj() or x.is_neg():
            return None
        address, nbytes = x.data_ptr(), x.nbytes
    else:
        if not (x.flags.c_contiguous and x.dtype.isnative):
            return None
        address, nbytes = x.ctypes.data, x.nbytes
    return pool.owner_of(address, nbytes) if nbytes else None


def _ingested(
    pool: ConnectionPool, connection: Connection, x: Any, windows: list[Window], timeout_s: float
) -> tuple[int, int]:
    found = _lies_in(pool, x)
    if found is not None and found[0] is connection:
        return found[1], found[2]
    data = arrays.as_bytes(x)
    if not data.size:
        return 0, 0
    window, segment, start = connection.room(data.size, timeout_s)
    windows.append(window)
    pool.copier.copy(window.array, data)
    return segment, start


def empty(turn: Turn, spec: TensorInfo, framework: str) -> Any:
    """A tensor in this client's own shared memory, not cleared: filling it is all a put has to copy."""
    nbytes = arrays.check_specs({"x": spec})
    connection = turn.take()
    connection.settled = False
    window, _, _ = connection.room(max(nbytes, 1), turn.pool.timeout_s)
    connection.settled = True
    return arrays.from_bytes(spec, window.array[:nbytes], framework)

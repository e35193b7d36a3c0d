"""Put through shared memory: a connection's own ingest segment is filled, and the daemon copies from there.

A call takes its connections into a hand, as in `shm.gets`.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from kvstore import arrays
from kvstore.device import DriverError
from kvstore.device.copies import Batch
from kvstore.hit import TensorInfo
from kvstored_client.puts import Outgoing
from kvstored_client.shm.connection import KEYS_PER_PACKET
from kvstored_client.shm.mapping import PARALLEL_NBYTES, Copy
from kvstored_client.shm.pool import Connection, ConnectionPool
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import Bytes, Placed, put_call
from kvstored_client.wire.messages import PAYLOAD_BYTES_PER_S

NOWHERE: Mapping[int, tuple[int, int]] = MappingProxyType({})
COMMIT_NBYTES = 64 << 20
"""Payload of one commit: what a connection's ingest segments need to hold for a batch of any length."""


def put(pool: ConnectionPool, hand: list[Connection], batch: Sequence[Outgoing]) -> tuple[int, int, int]:
    """(entries stored, boot epoch, commits). A long batch goes in several commits, root first: a chain has no holes."""
    stored = epoch = 0
    commits = commits_of(batch)
    for entries in commits:
        reply = _commit(pool, hand, entries)
        stored, epoch = stored + reply.stored, reply.boot_epoch
    return stored, epoch, len(commits)


def commits_of(batch: Sequence[Outgoing]) -> list[Sequence[Outgoing]]:
    """The entries of each commit."""
    found, start = [], 0
    while start < len(batch):
        stop, nbytes = start + 1, batch[start].nbytes
        while stop < len(batch) and stop - start < KEYS_PER_PACKET and nbytes + batch[stop].nbytes <= COMMIT_NBYTES:
            nbytes += batch[stop].nbytes
            stop += 1
        found.append(batch[start:stop])
        start = stop
    return found


def _commit(pool: ConnectionPool, hand: list[Connection], entries: Sequence[Outgoing]) -> pb.PutReply:
    connection = pool.take(hand, wanted_by(pool, entries) if pool.lent else None)
    connection.settled = False  # its room is in use
    commit = Commit(entries, pool.timeout_s, lying(connection, entries) if pool.lent else NOWHERE)
    room = connection.room(commit.room_nbytes, commit.timeout_s)
    batch = pool.transfers.batch_for([entry.tensors for entry in entries]) if commit.on_gpu else None
    if batch is None:
        # As in `gets.get`.
        copy_in(np.copyto if commit.room_nbytes < PARALLEL_NBYTES else pool.copier.copy, room.data, commit.copies)
    else:
        store_in(pool, connection, batch, room.data, commit.copies)
    call = put_call(commit.placed, room.segment, room.start, copy_later=commit.copy_later)
    reply = connection.exchange(call, commit.timeout_s)
    connection.uncopied = room
    connection.give_back(reply.lease)
    pool.put_back(hand)
    return reply.put


Copies = list[tuple[Any, int, int]]
"""(tensor, start in the room, bytes) of what is to be copied there."""


class Commit:
    """One commit of a put: what lies in shared memory already, and what has to be copied there.

    timeout_s: for each of its calls. room_nbytes: what it needs of a connection. copies: for each entry what goes
    there. placed: where each entry is once that is done. on_gpu: some of it is on a GPU. copy_later: the daemon may
    copy it after its answer.
    """

    def __init__(
        self, entries: Sequence[Outgoing], timeout_s: float, there: Mapping[int, tuple[int, int]] = NOWHERE
    ) -> None:
        """timeout_s: of a call that moves nothing. there: (segment, start) of tensors, by their identity."""
        # What the caller made with `empty` it may write to once the put returns; the rooms here nobody writes to.
        self.copy_later = not there
        self.on_gpu = False
        self.placed: list[Placed] = []
        self.copies: list[Copies] = []
        nbytes = at = 0
        for entry in entries:
            places: list[tuple[int | None, int]] = []
            copies: Copies = []
            for x, (offset, x_nbytes) in zip(entry.tensors.values(), entry.places, strict=True):
                place = there.get(id(x)) if there else None
                if place is None:
                    copies.append((x, at + offset, x_nbytes))
                    self.on_gpu = self.on_gpu or getattr(x, "is_cuda", False)
                places.append(place or (None, at + offset))
            self.placed.append((entry.key, entry.parent, entry.described, places))
            self.copies.append(copies)
            at += entry.block_nbytes if copies or not there else 0
            nbytes += entry.nbytes
        self.room_nbytes = at
        self.timeout_s = timeout_s + nbytes / PAYLOAD_BYTES_PER_S


def copy_in(copy: Copy, data: Bytes, entries: Sequence[Copies]) -> None:
    """Copy tensors to their (start, nbytes)."""
    for copies in entries:
        for x, start, nbytes in copies:
            arrays.write_bytes(x, data[start : start + nbytes], copy)


def store_in(
    pool: ConnectionPool,
    connection: Connection,
    batch: Batch,
    data: Bytes,
    entries: Sequence[Copies],
    copy: Copy | None = None,
) -> None:
    """`copy_in` of several entries with tensors on a GPU: those in one batch. Nothing is copied afterwards."""
    for segment in connection.ingest:
        if segment.mapping.address <= data.ctypes.data < segment.mapping.address + segment.mapping.nbytes:
            pool.transfers.uses(segment.mapping)
    direct: Copies = []
    for copies in entries:
        for x, start, nbytes in copies:
            if x.nbytes != nbytes or not batch.store(x, data.ctypes.data + start):
                copy_in(copy or pool.copier.copy, data, [[(x, start, nbytes)]])
            else:
                direct.append((x, start, nbytes))
    try:
        batch.run()
    except DriverError:
        copy_in(copy or pool.copier.copy, data, [direct])


def lying(connection: Connection, entries: Sequence[Outgoing]) -> dict[int, tuple[int, int]]:
    """(segment, start) of the tensors that lie in this connection's ingest segments, by their identity."""
    there: dict[int, tuple[int, int]] = {}
    for x in (x for entry in entries for x in entry.tensors.values()):
        address = _address_of(x)
        found = connection.ingest_at(*address) if address is not None else None
        if found is not None:
            there[id(x)] = found
    return there


def wanted_by(pool: ConnectionPool, entries: Sequence[Outgoing]) -> Connection | None:
    """The connection whose ingest segment holds the first tensor: `empty` made it. None: no open one does."""
    address = _address_of(next(iter(entries[0].tensors.values())))
    found = None if address is None else pool.owner_of(*address)
    return None if found is None else found[0]


def _address_of(x: Any) -> tuple[int, int] | None:
    """(address, nbytes) of a tensor that can be read as it lies."""
    if arrays.is_torch(x):
        if x.device.type != "cpu" or not x.is_contiguous() or x.is_conj() or x.is_neg():
            return None
        address, nbytes = x.data_ptr(), x.nbytes
    else:
        if not (x.flags.c_contiguous and x.dtype.isnative):
            return None
        address, nbytes = x.ctypes.data, x.nbytes
    return (address, nbytes) if nbytes else None


def empty(pool: ConnectionPool, hand: list[Connection], spec: TensorInfo, framework: str) -> Any:
    """A tensor in this client's own shared memory, not cleared: filling it is all a put has to copy."""
    nbytes = arrays.check_specs({"x": spec})
    connection = pool.take(hand)
    connection.settled = False
    pool.lent = True
    room = connection.room(max(nbytes, 1), pool.timeout_s)
    connection.settled = True
    return arrays.from_bytes(spec, room.data[:nbytes], framework)

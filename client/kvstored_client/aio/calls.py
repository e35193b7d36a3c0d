"""Get, lease and put through shared memory: `shm` with an event loop that waits, and copies beside it."""

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from kvstore import arrays
from kvstore.device.copies import Batch
from kvstore.hit import Hit, TensorInfo
from kvstored_client.aio.lease import LoopPool
from kvstored_client.aio.worker import INLINE_NBYTES, Slices
from kvstored_client.buffers import Out, Target
from kvstored_client.puts import Outgoing
from kvstored_client.shm.connection import KEYS_PER_PACKET
from kvstored_client.shm.gets import Block, filled, found_in, items_of, loaded, target_for
from kvstored_client.shm.leases import Lease, LeasedHits
from kvstored_client.shm.pool import Connection
from kvstored_client.shm.puts import NOWHERE, Commit, commits_of, copy_in, lying, store_in, wanted_by
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import get_call, put_call
from kvstored_client.wire.messages import GetOptions

BREATH_BLOCKS = 4
"""Entries looked at between two looks at the clock."""
BREATH_S = 0.0005
"""How long entries are looked at before the loop has its turn: an entry costs 0.05 ms when it is met first."""


async def ask(pool: LoopPool, hand: list[Connection], call: pb.LeaseCall) -> pb.LeaseReply:
    """One small call and its answer."""
    connection = await pool.get(hand)
    reply = await connection.ask(call.SerializeToString(), pool.timeout_s)
    connection.give_back(reply.lease)
    return reply


async def get(
    pool: LoopPool,
    hand: list[Connection],
    keys: Sequence[bytes],
    how: GetOptions,
    framework: str,
    out: Out = None,
    packed: bool = False,  # noqa: FBT001, FBT002 - as there
) -> tuple[list[Hit | None], int, int]:
    """As `shm.gets.get`."""
    hits: list[Hit | None] = [None] * len(keys)
    stale = epoch = 0
    connection = await pool.get(hand)
    for start in range(0, len(keys), KEYS_PER_PACKET):
        part = keys[start : start + KEYS_PER_PACKET]
        reply = await connection.ask(get_call(part, how.rest), pool.timeout_s)
        epoch = reply.boot_epoch
        connection.segments.look(time.perf_counter(), at_once=bool(how.device))
        try:
            found = []
            batch = None if out is None else pool.transfers.batch_for(out)
            began = time.perf_counter()
            for first in range(0, max(len(reply.leased), 1), BREATH_BLOCKS):
                blocks = found_in(reply, len(part), connection.segments, first, first + BREATH_BLOCKS)
                for at, item, block in blocks:
                    into = out[start + at] if out is not None else None
                    target = target_for(block, framework, into, batch, packed=packed)
                    found.append((start + at, item, block, target))
                if time.perf_counter() - began > BREATH_S:
                    await asyncio.sleep(0)
                    began = time.perf_counter()
            sound = await _fill(pool, found, batch)
            for (index, item, block, target), is_sound in zip(found, sound, strict=True):
                if is_sound:
                    hits[index] = block.hit(reply, item, keys[index], target.tensors)
                else:
                    stale += 1
        finally:
            connection.give_back(reply.lease)
        if how.leading and len(reply.leased) < len(part):
            break
        how = how.continued()
    return hits, stale, epoch


async def _fill(pool: LoopPool, found: list[tuple[int, Any, Block, Target]], batch: Batch | None) -> list[bool]:
    """Fill all targets; for each whether its block was there to the end."""

    def fill(slices: Slices) -> list[bool]:
        sound = [filled(slices.copy, block, target) for _, _, block, target in found]
        if batch is None:
            return sound
        return [one and other for one, other in zip(sound, loaded(pool, batch, found), strict=True)]

    small = batch is None and sum(block.nbytes for _, _, block, _ in found) <= INLINE_NBYTES
    small = small and not any(block.packed for _, _, block, _ in found)
    return fill(Slices()) if small else await pool.worker.sliced(fill)


async def lease(
    pool: LoopPool,
    hand: list[Connection],
    keys: Sequence[bytes],
    how: GetOptions,
    framework: str,
    tails: Sequence[bytes],
) -> LeasedHits:
    """As `shm.leases.lease`."""
    connection = await pool.get(hand)
    reply = await connection.ask(get_call(keys, how.asking_for(tails)), pool.timeout_s)
    connection.segments.look(time.perf_counter(), at_once=bool(how.device))
    items = items_of(reply, len(keys), leading=how.leading)
    owner = Lease(connection, framework)
    hits = LeasedHits(owner, connection.segments, reply, items, keys)
    connection.hold(owner, reply.lease)
    return hits


async def put(pool: LoopPool, hand: list[Connection], batch: Sequence[Outgoing]) -> tuple[int, int, int]:
    """As `shm.puts.put`."""
    stored = epoch = 0
    commits = commits_of(batch)
    for entries in commits:
        reply = await _commit(pool, hand, entries)
        stored, epoch = stored + reply.stored, reply.boot_epoch
    return stored, epoch, len(commits)


async def _commit(pool: LoopPool, hand: list[Connection], entries: Sequence[Outgoing]) -> pb.PutReply:
    connection = await pool.get(hand, wanted_by(pool, entries) if pool.lent else None)
    commit = Commit(entries, pool.timeout_s, lying(connection, entries) if pool.lent else NOWHERE)
    room = await connection.find(commit.room_nbytes, commit.timeout_s)
    connection.settled = True  # no answer is due, and the room is this call's
    batch = pool.transfers.batch_for([entry.tensors for entry in entries])
    if batch is not None:
        store = partial(store_in, pool, connection, batch, room.data, commit.copies)
        await pool.worker.sliced(store)
    elif (before := pool.transfers.before(entry.tensors for entry in entries)) is not None:

        def store_after(slices: Slices) -> None:
            before()
            copy_in(slices.copy, room.data, commit.copies)

        await pool.worker.sliced(store_after)
    elif sum(nbytes for copies in commit.copies for _, _, nbytes in copies) <= INLINE_NBYTES:
        copy_in(np.copyto, room.data, commit.copies)
    else:
        await pool.worker.sliced(lambda slices: copy_in(slices.copy, room.data, commit.copies))
    connection.sending = room
    call = put_call(commit.placed, room.segment, room.start, copy_later=commit.copy_later)
    reply = await connection.ask(call, commit.timeout_s)
    connection.give_back(reply.lease)
    pool.put_back(hand)
    return reply.put


async def empty(pool: LoopPool, hand: list[Connection], spec: TensorInfo, framework: str) -> Any:
    """As `shm.puts.empty`."""
    nbytes = arrays.check_specs({"x": spec})
    connection = await pool.get(hand)
    pool.lent = True
    room = await connection.find(max(nbytes, 1), pool.timeout_s)
    connection.settled = True
    return arrays.from_bytes(spec, room.data[:nbytes], framework)

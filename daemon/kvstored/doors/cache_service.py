"""The service Cache: what a call does, from the socket to the store and back.

    put: frames -> PutStream (checked, allocated, filled) -> Store.put_many on a worker thread -> reply
    get: request -> Reading (leases, on a worker thread) -> frames -> socket

Runs on the event loop; whatever may block runs on the worker threads.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from math import inf
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message

from kvstore.errors import InvalidEntry
from kvstore.hit import Hit
from kvstore.keys import CheckedKeys
from kvstore.lookup import check_saved
from kvstore.shm.arena import Room
from kvstore.view import StoreView
from kvstored.access.interceptor import answering
from kvstored.access.shares import Shares, charged
from kvstored.access.tenant_view import CALLER, TenantViews
from kvstored.calls.budget import Budget
from kvstored.calls.encoded_reply import EncodedReply
from kvstored.calls.gets import Reading, hit_frames, on_device
from kvstored.calls.puts import PutStream, put_ready
from kvstored.calls.shared_reads import SharedReads
from kvstored.calls.verbs import Verbs
from kvstored.doors.service import Context, Service
from kvstored.telemetry.metrics import Meter
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import build_miss, parse_frame
from kvstored_client.wire.messages import read_lookup
from kvstored_client.wire.requests import read_request

PUT_GROUP_NBYTES = 64 << 20
"""Whole entries collected before they go to the store together: one chain in one touch, without holding all of it."""
WAITING_MAX = 0.8
"""The share of a caller's time that may go by waiting for the shared store: what is there has to be sent, too."""
FIRST_MISSING_MAX = 512
"""Keys looked at on the event loop for one that is not here: 0.05 ms."""
LOOKED_UP_MAX = 64
"""Keys looked up on the event loop itself: some 0.1 ms."""
READ_AT_ONCE_NBYTES = 8 << 10
"""A larger request is read on a worker thread: to count the fields of a hostile one takes 2 ms."""

R = TypeVar("R")


def _answered(verb: Callable[[Any], Message], kind: type[Message], request: bytes) -> bytes:
    return verb(read_request(kind, request)).SerializeToString()


def _read(reading: Reading) -> list[tuple[int, Hit | EncodedReply | None]]:
    lot = reading.read()
    for _, hit in lot:
        if isinstance(hit, EncodedReply):
            _ = hit.contents.xxh3  # summed here: a large one would hold up the event loop
    return cast("list[tuple[int, Hit | EncodedReply | None]]", lot)  # nobody reads in place through a stream


class CacheService(Service):
    """Tensors under keys."""

    def __init__(
        self,
        views: TenantViews,
        threads: Executor,
        boot_epoch: int,
        budget: Budget,
        silence_s: float,
        meter: Meter,
        room: Room,
        shares: Shares,
    ) -> None:
        super().__init__(views, threads, boot_epoch)
        self._shares = shares
        self._outside = SharedReads()
        self._meter = meter
        self._budget = budget
        self._silence_s = silence_s
        self._room = room

    @answering
    async def put(self, _: bytes, context: Context) -> bytes:
        """Frames in, checked one by one; whole entries go to the store in groups."""
        store = self._store
        stream = PutStream(store.config.entry_max_nbytes, self._budget, self._room)
        stored = 0
        keys: list[bytes] = []
        try:
            while (message := await self._read(context, stream)) is not grpc.aio.EOF:
                stream.take(parse_frame(message, pb.PutFrame))
                if stream.ready_nbytes >= PUT_GROUP_NBYTES:
                    keys += [entry.key for entry in stream.ready]
                    stored += await self._store_ready(stream, store)
            stream.check_whole()
            stored += await self._store_ready(stream, store)
            if keys:
                await self._run(store.touch, keys)  # the last group is used already: root first, as one chain
        finally:
            stream.close()
        return pb.PutReply(stored=stored, boot_epoch=self._epoch).SerializeToString()

    async def _read(self, context: Context, stream: PutStream) -> Any:
        try:
            async with asyncio.timeout(self._silence_s):
                return await context.read()
        except TimeoutError:
            raise InvalidEntry(f"no frame for {self._silence_s} s (server.silence_s); {stream.progress}") from None

    async def _store_ready(self, stream: PutStream, store: StoreView) -> int:
        ready, stream.ready = stream.ready, []
        try:
            return await self._run(put_ready, store, ready) if ready else 0
        finally:
            stream.release(ready)

    @answering
    async def get(self, request: bytes, context: Context) -> None:
        """Leases out of the store, a lot at a time, cut into frames."""
        stalled = False
        try:
            await self._get(request, context)
        except TimeoutError:
            stalled = True
        # Not inside: what the call held is given back before the reader is told, who may never listen.
        if stalled:
            await self._cut_off(context)

    async def _get(self, request: bytes, context: Context) -> None:
        if len(request) <= READ_AT_ONCE_NBYTES:
            asked = read_request(pb.GetRequest, request)
        else:
            asked = await self._run_charged(read_request, pb.GetRequest, request)
        lookup, keys, store = read_lookup(asked), CheckedKeys(asked.keys), self._store
        if store.shares:
            await self._bring(store, asked, keys, context)
        # From a device bytes come faster to shared memory, which is registered with it.
        room = self._room if on_device(store) else None
        reading = Reading(
            store, self._budget, asked, keys, lookup=lookup, room=room,
            frames_nbytes=self._budget.call_nbytes,
        )  # fmt: skip
        # A look at few keys, and reading what hot holds, take microseconds: less than the way to another thread.
        few = len(keys) <= LOOKED_UP_MAX
        try:
            while not reading.done:
                if few:
                    reading.plan()
                else:
                    await self._run_charged(reading.plan)
                lot = _read(reading) if reading.at_hand else await self._run(_read, reading)
                await self._write_lot(context, lot)
        finally:
            reading.close()

    async def _bring(self, store: StoreView, asked: pb.GetRequest, keys: CheckedKeys, context: Context) -> None:
        """Have what other hosts have put here, where something is missing; as long as the caller has time."""
        ends = store.ends_here(keys) if len(keys) <= FIRST_MISSING_MAX else await self._run(store.ends_here, keys)
        if ends:
            left_s: Any = context.time_remaining()  # None, whatever its types say, where the caller set no deadline
            bring = partial(
                store.bring, keys, leading=asked.leading, lookup=read_lookup(asked),
                timeout_s=inf if left_s is None else WAITING_MAX * left_s,
            )  # fmt: skip
            await self._outside.run(bring)

    async def _write_lot(self, context: Context, lot: Sequence[tuple[int, Hit | EncodedReply | None]]) -> None:
        for index, hit in lot:
            if hit is None:
                await self._write(context, build_miss(pb.GetMiss(index=index, boot_epoch=self._epoch)))
                continue
            for frame in hit_frames(index, hit, self._epoch):
                await self._write(context, frame)

    async def _write(self, context: Context, frame: bytes) -> None:
        async with asyncio.timeout(self._silence_s):
            await context.write(frame)

    async def _cut_off(self, context: Context) -> None:
        """Say so to a reader that took no frame. Until it takes that, or is gone, its call counts as stalled."""
        await context.abort(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"the reader took no frame for {self._silence_s} s (server.silence_s)"
        )

    @answering
    async def match(self, request: bytes, _: Context) -> bytes:
        """Leading keys held, or each key's place."""
        verbs = self._verbs()
        if self._store.shares:
            # The answer may wait for the shared store: on a thread that no local call waits for, if there is one.
            found: bytes | None = await self._outside.run(partial(_answered, verbs.match, pb.MatchRequest, request))
            if found is not None:
                return found
            verbs = Verbs(self._store, self._epoch, local=True)
        return await self._answer(verbs.match, pb.MatchRequest, request)

    @answering
    async def touch(self, request: bytes, _: Context) -> bytes:
        """Count as use."""
        return await self._answer(self._verbs().touch, pb.TouchRequest, request)

    @answering
    async def delete(self, request: bytes, _: Context) -> bytes:
        """Forget keys."""
        return await self._answer(self._verbs().delete, pb.DeleteRequest, request)

    @answering
    async def pin(self, request: bytes, _: Context) -> bytes:
        """Pin or let go."""
        return await self._answer(self._verbs().pin, pb.PinRequest, request)

    def _verbs(self) -> Verbs:
        return Verbs(self._store, self._epoch)

    async def _answer(self, verb: Callable[[Any], Message], kind: type[Message], request: bytes) -> bytes:
        return await self._run_charged(_answered, verb, kind, request)

    async def _run_charged(self, work: Callable[..., R], *args: Any) -> R:
        """As `_run`, for work in Python: what it takes is the caller's (`access.shares`)."""
        return await self._run(charged, partial(self._shares.charge, CALLER.get().account), work, *args)

    @answering
    async def report(self, request: bytes, _: Context) -> bytes:
        """What a client says the cache was worth."""
        self._meter.saved(check_saved(read_request(pb.ReportRequest, request).prefill_saved_s))
        return pb.ReportReply(boot_epoch=self._epoch).SerializeToString()

    def close(self) -> None:
        """End the threads that wait for the shared store. Blocks."""
        self._outside.close()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service, by the names of the proto. No serializers: messages are bytes until they are checked."""
        unary = grpc.unary_unary_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            "kvstored.v1.Cache",
            {
                "Put": grpc.stream_unary_rpc_method_handler(self.put),
                "Get": grpc.unary_stream_rpc_method_handler(self.get),
                "Match": unary(self.match),
                "Touch": unary(self.touch),
                "Delete": unary(self.delete),
                "Pin": unary(self.pin),
                "Report": unary(self.report),
            },
        )

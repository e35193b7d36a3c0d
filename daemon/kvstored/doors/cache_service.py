"""The service Cache: what a call does, from the socket to the store and back.

    put: frames -> PutStream (checked, allocated, filled) -> Store.put_many on a worker thread -> reply
    get: request -> Reading (leases, on a worker thread) -> frames -> socket

Runs on the event loop; whatever may block runs on the worker threads.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from kvstore.errors import InvalidEntry
from kvstore.keys import CheckedKeys
from kvstore.lookup import check_saved
from kvstore.shm.arena import Room
from kvstore.view import StoreView
from kvstored.access.interceptor import OpenCall, Silent
from kvstored.access.shares import Shares, charged
from kvstored.access.tenant_view import TenantViews
from kvstored.calls.budget import Budget
from kvstored.calls.fair_threads import FairThreads
from kvstored.calls.gets import Reading, on_device
from kvstored.calls.puts import PutStream, put_ready
from kvstored.calls.replies import hit_frames
from kvstored.calls.shared_reads import SharedReads
from kvstored.calls.verbs import Verbs
from kvstored.telemetry.metrics import Meter
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import parse_frame
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


class CacheService:
    """Tensors under keys."""

    def __init__(
        self,
        views: TenantViews,
        threads: FairThreads,
        boot_epoch: int,
        budget: Budget,
        silence_s: float,
        meter: Meter,
        room: Room,
        shares: Shares,
    ) -> None:
        self._views = views
        self._sharing, self._on_device = views[None].shares, on_device(views[None])
        self._threads = threads
        self._epoch = boot_epoch
        self._shares = shares
        self._outside = SharedReads()
        self._meter = meter
        self._budget = budget
        self._silence_s = silence_s
        self._room = room

    async def put(self, _: bytes, call: OpenCall) -> bytes:
        """Frames in, checked one by one; whole entries go to the store in groups."""
        store, caller = self._views[call.identity.tenant], call.identity.account
        stream = PutStream(store.config.entry_max_nbytes, self._budget, self._room)
        stored = 0
        keys: list[bytes] = []
        try:
            while (message := await call.read(self._silence_s)) is not grpc.aio.EOF:
                stream.take(parse_frame(message, pb.PutFrame))
                if stream.ready_nbytes >= PUT_GROUP_NBYTES:
                    keys += [entry.key for entry in stream.ready]
                    stored += await self._threads.run(caller, put_ready, store, stream.ready)
                    stream.release()
            stream.end()
            if stream.ready:
                stored += await self._threads.run(caller, put_ready, store, stream.ready)
            if keys:
                await self._threads.run(caller, store.touch, keys)  # the last group is used: root first, as one chain
        except Silent:
            raise InvalidEntry(f"no frame for {self._silence_s} s (server.silence_s); {stream.progress}") from None
        finally:
            stream.close()
        return pb.PutReply(stored=stored, boot_epoch=self._epoch).SerializeToString()

    async def get(self, request: bytes, call: OpenCall) -> None:
        """Leases out of the store, a lot at a time, cut into frames."""
        if not await self._get(request, call):
            # Not inside: what the call held is given back before the reader is told, who may never listen. Until it
            # takes that, or is gone, its call counts as stalled.
            await call.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"the reader took no frame for {self._silence_s} s (server.silence_s)",
            )

    async def _get(self, request: bytes, call: OpenCall) -> bool:
        """False: the reader took no frame for too long."""
        if len(request) <= READ_AT_ONCE_NBYTES:
            asked = read_request(pb.GetRequest, request)
        else:
            asked = await self._run_charged(call, read_request, pb.GetRequest, request)
        lookup, keys = read_lookup(asked), CheckedKeys(asked.keys)
        store, caller = self._views[call.identity.tenant], call.identity.account
        if self._sharing:
            await self._bring(store, asked, keys, call)
        # From a device bytes come faster to shared memory, which is registered with it.
        room = self._room if self._on_device else None
        reading = Reading(store, self._budget, asked, keys, lookup=lookup, room=room, streamed=True)
        # A look at few keys, and reading what hot holds, take microseconds: less than the way to another thread.
        few = len(keys) <= LOOKED_UP_MAX
        try:
            while not reading.done:
                if few:
                    reading.plan()
                else:
                    await self._run_charged(call, reading.plan)
                lot = reading.read() if reading.at_hand else await self._threads.run(caller, reading.read)
                for index, hit in lot:
                    for frame in hit_frames(index, hit, self._epoch):
                        await call.write(frame, self._silence_s)
        except Silent:
            return False
        finally:
            reading.close()
        return True

    async def _bring(self, store: StoreView, asked: pb.GetRequest, keys: CheckedKeys, call: OpenCall) -> None:
        """Have what other hosts have put here, where something is missing; as long as the caller has time."""
        if len(keys) <= FIRST_MISSING_MAX:
            ends = store.ends_here(keys)
        else:
            ends = await self._threads.run(call.identity.account, store.ends_here, keys)
        if ends:
            left_s: Any = call.time_remaining()  # None, whatever its types say, where the caller set no deadline
            bring = partial(
                store.bring, keys, leading=asked.leading, lookup=read_lookup(asked),
                timeout_s=inf if left_s is None else WAITING_MAX * left_s,
            )  # fmt: skip
            await self._outside.run(bring)

    async def match(self, request: bytes, call: OpenCall) -> bytes:
        """Leading keys held, or each key's place."""
        store = self._views[call.identity.tenant]
        verbs = Verbs(store, self._epoch)
        if self._sharing:
            # The answer may wait for the shared store: on a thread that no local call waits for, if there is one.
            found: bytes | None = await self._outside.run(partial(_answered, verbs.match, pb.MatchRequest, request))
            if found is not None:
                return found
            verbs = Verbs(store, self._epoch, local=True)
        return await self._run_charged(call, _answered, verbs.match, pb.MatchRequest, request)

    async def touch(self, request: bytes, call: OpenCall) -> bytes:
        """Count as use."""
        return await self._run_charged(call, _answered, self._verbs(call).touch, pb.TouchRequest, request)

    async def delete(self, request: bytes, call: OpenCall) -> bytes:
        """Forget keys."""
        return await self._run_charged(call, _answered, self._verbs(call).delete, pb.DeleteRequest, request)

    async def pin(self, request: bytes, call: OpenCall) -> bytes:
        """Pin or let go."""
        return await self._run_charged(call, _answered, self._verbs(call).pin, pb.PinRequest, request)

    def _verbs(self, call: OpenCall) -> Verbs:
        return Verbs(self._views[call.identity.tenant], self._epoch)

    def _run_charged(self, call: OpenCall, work: Callable[..., R], *args: Any) -> Awaitable[R]:
        """Work in Python, on a worker thread: what it takes is the caller's (`access.shares`)."""
        caller = call.identity.account
        return self._threads.run(caller, charged, partial(self._shares.charge, caller), work, *args)

    async def report(self, request: bytes, _: OpenCall) -> bytes:
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

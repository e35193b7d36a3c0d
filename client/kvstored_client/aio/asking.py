"""What a verb asks the daemon, for an event loop: each question of `kvstored_client.asking` as a coroutine.

So a verb of `Client` that is called with this as its `self` answers with an awaitable. One event loop at a time.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from kvstore import arrays
from kvstore.errors import TierUnavailable
from kvstore.hit import Hit, TensorInfo
from kvstore.lookup import Lookup
from kvstored_client.aio import calls
from kvstored_client.aio.lease import LoopPool
from kvstored_client.aio.stream import LoopTransport
from kvstored_client.aio.worker import INLINE_NBYTES, Worker
from kvstored_client.asking import SOFT, Wanted, leading_hits
from kvstored_client.buffers import Out
from kvstored_client.client import Client
from kvstored_client.puts import Outgoing
from kvstored_client.shm.pool import Connection, Silent, UseStream
from kvstored_client.stream.receiver import Receiver
from kvstored_client.stream.transport import ADMIN, CACHE, ReplyType, Request, Transport, log_change
from kvstored_client.wire._pb import cache_pb2 as pb

logger = logging.getLogger(__name__)
R = TypeVar("R")
T = TypeVar("T")


class LoopAsking(Client):
    """A `Client` whose questions are awaited. Its verbs return awaitables, whatever their annotations say."""

    _transport: LoopTransport

    def _transport_to(self, address: str, timeout_s: float) -> Transport:
        return LoopTransport(address, timeout_s, log_change)

    def _pool_at(self, path: Path, timeout_s: float) -> LoopPool:
        return LoopPool(path, timeout_s)

    @property
    def worker(self) -> Worker:
        """The thread beside the loop."""
        if isinstance(self._pool, LoopPool):
            return self._pool.worker
        if self._far_worker is None:
            self._transport.on_fork = self._forget_worker
            self._far_worker = Worker()
        return self._far_worker

    _far_worker: Worker | None = None

    def _forget_worker(self) -> None:
        self._far_worker = None
        self.transfers.forget()

    async def end(self) -> None:
        """End the connections, and all calls."""
        self.worker.close()
        if isinstance(self._pool, LoopPool):
            self._pool.close()
            await self._pool.ended()
        await self._transport.end()

    async def _waited(self, call: Coroutine[Any, Any, T], otherwise: T) -> T:
        """As `_data`."""
        try:
            self._check_open()
        except TierUnavailable:
            call.close()
            raise
        try:
            return await call
        except SOFT as error:
            self.failures += 1
            if self._on_error == "raise":
                raise
            logger.debug("answered as a miss: %s", error)
            return otherwise

    async def _shared(self, call: Callable[..., Awaitable[T]], *args: Any) -> T:
        """As `_through_shared_memory`."""
        pool = self._pool
        if pool is None:
            raise UseStream("another host, or switched off")
        self._transport.allow()
        hand: list[Connection] = []
        try:
            result = await call(pool, hand, *args)
        except Silent as error:
            raise self._transport.silent(str(error)) from None
        finally:
            pool.put_back(hand)
        self._transport.answered()
        return result

    async def _ask(self, verb: str, request: Any, reply: ReplyType[R]) -> R:  # type: ignore[override]
        name = verb.lower()
        try:
            message = await self._shared(calls.ask, pb.LeaseCall(**{name: request}))
        except UseStream:
            return cast("R", self._noted(await self._transport.ask(CACHE + verb, request, reply)))
        return cast("R", self._noted(getattr(message, name)))

    async def _asked(  # type: ignore[override]
        self, verb: str, request: Any, reply: ReplyType[R], read: Callable[[R], T], otherwise: T, *, small: bool = True
    ) -> T:
        async def ask() -> T:
            if small:
                return read(await self._ask(verb, request, reply))
            return read(await self._transport.ask(CACHE + verb, request, reply))

        return await self._waited(ask(), otherwise)

    async def _operate(  # type: ignore[override]
        self, verb: str, request: Any, reply: ReplyType[R], read: Callable[[R], T]
    ) -> T:
        self._check_open()
        try:
            answer = await self._transport.ask(ADMIN + verb, request, reply)
        except SOFT:
            self.failures += 1
            raise
        return read(answer)

    async def _health(self) -> bool:  # type: ignore[override]
        return await self._transport.serves()

    async def _streamed(  # type: ignore[override]
        self, verb: str, request: Request | None, read: Callable[[bytes], Sequence[T]]
    ) -> AsyncIterator[T]:
        if request is not None:
            async with aclosing(self._transport.stream(ADMIN + verb, request)) as messages:
                async for message in messages:
                    for found in read(message):
                        yield found

    async def _sent(self, batch: list[Outgoing], read: Callable[[int], T]) -> T:  # type: ignore[override]
        return read(await self._waited(self._send(batch), 0) if batch else 0)

    async def _send(self, batch: list[Outgoing]) -> int:  # type: ignore[override]
        try:
            stored, epoch, commits = await self._shared(calls.put, batch)
        except UseStream:
            await self._wait_for_caller(entry.tensors for entry in batch)
            return self._stored(len(batch), await self._transport.send_batch(batch, self.worker))
        if commits > 1:
            await cast("Awaitable[int]", self._touch([entry.key for entry in batch]))
        if epoch != self._epoch:
            self._saw_epoch(epoch)
        return self._at_most(len(batch), stored)

    async def _received(  # type: ignore[override]
        self, keys: Sequence[bytes], read: Callable[[list[Hit | None]], T], *, leading: bool = False, out: Out = None,
        lookup: Lookup | None = None, packed: bool = False,
    ) -> T:  # fmt: skip
        hits: list[Hit | None] = [None] * len(keys)
        if keys:
            await self._waited(self._read(hits, keys, leading=leading, out=out, lookup=lookup, packed=packed), None)
        return read(hits)

    async def _read(  # type: ignore[override]
        self,
        hits: list[Hit | None],
        keys: Sequence[bytes],
        *,
        leading: bool,
        out: Out,
        lookup: Lookup | None,
        packed: bool,
    ) -> None:
        there = self._unpacks(out)
        how, framework = self._how_to_read(
            keys, leading=leading, lookup=lookup, packed=packed or there, device=self._there(out)
        )
        if out is not None and self.transfers.batch_for(out) is None:
            await self._wait_for_caller(out)
        try:
            hits[:], stale, epoch = await self._shared(calls.get, keys, how, framework, out, packed)
        except UseStream:
            await self._wait_for_caller(out)
            await self._receive(
                Receiver(keys, framework, out, hits, packed=packed, fill=self._fill_now if there else None),
                how.request(keys),
            )
            return
        if epoch != self._epoch:
            self._saw_epoch(epoch)
        self.failures += stale

    async def _wait_for_caller(self, entries: Iterable[Mapping[str, Any] | None] | None) -> None:
        """The worker's copies by torch come after what the caller's streams are to do with tensors on a GPU."""
        before = None if entries is None else self.transfers.before(entries)
        if before is not None:
            await self.worker.run(before)

    async def _receive(self, receiver: Receiver, request: pb.GetRequest) -> None:
        with receiver.reading(self._transport):
            async with aclosing(self._transport.stream(CACHE + "Get", request)) as messages:
                async for message in messages:
                    if len(message) <= INLINE_NBYTES:
                        receiver.take(message)
                    else:
                        await self.worker.run(receiver.take, message)

    async def _emptied(self, spec: TensorInfo, framework: str) -> Any:
        try:
            return await self._shared(calls.empty, spec, framework)
        except (UseStream, *SOFT):
            return arrays.from_bytes(spec, np.empty(arrays.check_specs({"x": spec}), dtype=np.uint8), framework)

    async def _lease(  # type: ignore[override]
        self, keys: Sequence[bytes], asked: Wanted
    ) -> Sequence[Hit | None]:
        return await self._waited(self._leased(keys, asked), ())

    async def _leased(  # type: ignore[override]
        self, keys: Sequence[bytes], asked: Wanted
    ) -> Sequence[Hit | None]:
        how, framework = self._how_leased(asked)
        try:
            return await self._shared(calls.lease, keys, how, framework, asked.tails)
        except UseStream:
            receiver = Receiver(keys, framework, packed=asked.packed)
            await self._receive(receiver, self._how_streamed(asked).request(keys))
            return leading_hits(receiver.hits) if asked.leading else receiver.hits

    async def fill(self, pairs: list[tuple[Any, Any]]) -> None:  # type: ignore[override]
        """Copy (target, source) pairs beside the loop."""
        batch = self._fill_batch(pairs)
        if batch is None:
            await self._wait_for_caller([{"": target} for target, _ in pairs])
        await self.worker.run(self._fill_now, pairs, batch)

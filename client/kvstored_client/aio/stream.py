"""The stream under an event loop: `stream.transport` over grpc.aio. One event loop at a time."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from kvstore.errors import TierUnavailable
from kvstored_client.aio.worker import INLINE_NBYTES, Worker
from kvstored_client.interrupts import damage
from kvstored_client.puts import Outgoing
from kvstored_client.stream.credentials import shown_to, token_pair
from kvstored_client.stream.transport import (
    CACHE,
    HEALTH,
    OPTIONS,
    SERVING,
    Line,
    Reply,
    ReplyType,
    Request,
    Transport,
    inherited,
)
from kvstored_client.wire.address import parse_address


class LoopLine(Line):
    """One channel, for the event loop that runs when it is opened. shown: what each call shows the daemon."""

    def _open(self, address: str) -> None:
        token, tls, options = shown_to(address, OPTIONS)
        target = parse_address(address)
        self.shown = [] if token is None else [token_pair(token)]
        self.loop = asyncio.get_running_loop()
        self._channel: Any = (
            grpc.aio.insecure_channel(target, options) if tls is None else grpc.aio.secure_channel(target, tls, options)
        )
        self._ending: asyncio.Task[None] | None = None

    def close(self) -> None:
        """End it soon."""
        if self.loop.is_running():
            self._ending = self.loop.create_task(self._channel.close())

    async def end(self) -> None:
        """End it, and all calls."""
        await self._channel.close()


class LoopTransport(Transport):
    """The way to one daemon."""

    new_line = LoopLine

    def _line_here(self) -> LoopLine:
        """The channel of the running loop. One of a loop that has ended is left to it."""
        line = self._line.get("now")
        if isinstance(line, LoopLine) and line.loop is not asyncio.get_running_loop():
            self._line.pop("now", None)
            inherited.append(line)
        found = self.open_line()
        assert isinstance(found, LoopLine)
        return found

    async def ask(self, path: str, request: Request, reply: ReplyType[Reply]) -> Reply:
        """As `unary`."""
        data = await self._call("unary_unary", path, request.SerializeToString(), self.timeout_s)
        try:
            return reply.FromString(data)
        except Exception as error:  # noqa: BLE001 - the boundary
            raise damage(error, f"what {self.address} answered") from None

    async def serves(self) -> bool:
        """As `health`."""
        return await self._call("unary_unary", HEALTH, b"", self.timeout_s) == SERVING

    async def send_batch(self, batch: Sequence[Outgoing], worker: Worker) -> bytes:
        """As `put`. Large entries are packed by the worker."""
        nbytes = sum(entry.nbytes for entry in batch)
        timeout_s = self.deadline_s(nbytes)
        if len(batch) == 1 and nbytes <= INLINE_NBYTES:
            single = batch[0].single_frame()
            if single is not None:
                return await self._call("unary_unary", CACHE + "Put", single, timeout_s)
        return await self._call("stream_unary", CACHE + "Put", _frames(batch, worker), timeout_s)

    async def _call(self, kind: str, path: str, asked: Any, timeout_s: float) -> bytes:
        self.allow()
        line = self._line_here()
        try:
            answer = await line.methods[kind, path](asked, timeout=timeout_s, metadata=line.shown)
        except grpc.RpcError as error:
            raise self.failed(error) from None
        except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            raise TierUnavailable(f"this client is closed: {error}") from None
        except asyncio.CancelledError:
            self._raise_if_closed()
            raise
        self.answered()
        return bytes(answer)

    def _raise_if_closed(self) -> None:
        """A channel that is closed cancels its calls: that is nobody's wish to cancel the task that waits."""
        task = asyncio.current_task()
        if self.closed and task is not None and not task.cancelling():
            raise TierUnavailable("this client is closed") from None

    async def stream(self, path: str, request: Request) -> AsyncGenerator[bytes, None]:
        """As `stream_in`."""
        self.allow()
        line = self._line_here()
        call: Any = None
        late = ""
        try:
            call = line.methods["unary_stream", path](request.SerializeToString(), metadata=line.shown)
            while True:
                try:
                    message = await asyncio.wait_for(call.read(), self.timeout_s)
                except TimeoutError:
                    late = f"no answer within {self.timeout_s} s"
                    raise self.silent(late) from None
                if message is grpc.aio.EOF:
                    break
                yield message
        except grpc.RpcError as error:
            raise self.failed(error) from None
        except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            raise TierUnavailable(f"{self.address}: {error}") from None
        except asyncio.CancelledError:
            self._raise_if_closed()
            raise
        finally:
            if call is not None:
                call.cancel()
        self.answered()

    async def end(self) -> None:
        """As `close`."""
        self.closed = True
        lines = list(self._line.values())
        self._line.clear()
        for line in lines:
            if isinstance(line, LoopLine) and line.loop is asyncio.get_running_loop():
                await line.end()


async def _frames(batch: Sequence[Outgoing], worker: Worker) -> AsyncGenerator[bytes, None]:
    """The frames of a put, each packed while the last one is sent."""
    frames = (frame for entry in batch for frame in entry.frames())
    pack: Callable[[], bytes | None] = lambda: next(frames, None)  # noqa: E731 - one line, used once
    while (frame := await worker.run(pack)) is not None:
        yield frame

"""A gRPC call from its metadata to its end: what its handler sees of it, and how it is ended from outside.

Every method is served as a stream of requests, also those with one request. The wire is the same, but gRPC then starts
the handler before a message came, so that the caller is known, and counted, before anything of its is read. The event
loop's thread.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

import grpc

from kvstored.access.admission import Place, Refusal
from kvstored.access.tokens import Identity

_V6_GROUP_BLOCKS = 4
"""A network gives a host 64 bits of IPv6 addresses to choose from: a peer is the other 64."""


class OpenCall:
    """gRPC's context of a call; its place is told what the call waits for."""

    def __init__(self, context: Any, method: str) -> None:
        self._context = context
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self.method = method
        self.identity: Identity | None = None
        self.place: Place | None = None
        self.refusal: Refusal | None = None
        """Why it was ended from outside."""
        self._first: asyncio.Future[None] | None = None
        """The first message's way out."""
        self.peer_name = str(context.peer())
        self.group = peer_group(self.peer_name)
        context.add_done_callback(self.left)

    async def read(self) -> Any:
        """The peer's next message, or grpc.aio.EOF. Raises CancelledError where the peer is gone."""
        return await self._waiting(self._context.read())

    async def write(self, message: Any) -> None:
        """Send a message: waits until the peer has room for it. Raises CancelledError where the peer is gone."""
        if self._first is not None:
            await self._waiting(self._context.write(message))
            return
        # The call's head goes out with the first message. If that were cancelled, gRPC would send the head once more
        # with the status, fail at it, and leave the peer to wait for its deadline.
        self._first = asyncio.ensure_future(self._context.write(message))
        self._first.add_done_callback(_looked_at)
        await self._waiting(asyncio.shield(self._first))

    async def _waiting(self, step: Awaitable[Any]) -> Any:
        """The result of a step that waits for the peer."""
        if self.place is not None:
            self.place.waits()
        try:
            result = await step
        except grpc.aio.InternalError:
            # A batch that failed: the connection broke under it, before gRPC has cancelled the call for that.
            raise asyncio.CancelledError from None
        if self.place is not None:
            self.place.works()
        return result

    async def abort(self, code: Any, details: str = "", trailing: tuple[tuple[str, str], ...] = ()) -> None:
        """End the call with a status. Raises. Waits until the peer has taken what was sent before, or is gone."""
        self.over()
        try:
            if self._first is not None:
                await self._first
            await self._context.abort(code, details, trailing)
        except grpc.aio.AbortError:
            raise
        except grpc.aio.UsageError:
            raise
        except Exception:  # noqa: BLE001 - gRPC's private one: the peer was gone before the status
            raise asyncio.CancelledError from None

    async def only_message(self, silence_s: float) -> Any:
        """The request of a method that has one. Raises Refusal."""
        try:
            async with asyncio.timeout(silence_s):
                message = await self.read()
        except TimeoutError:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT, f"no message for {silence_s} s (server.silence_s)", "InvalidEntry"
            ) from None
        if message is grpc.aio.EOF:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "the call ended without its message", "InvalidEntry")
        return message

    def end(self, refusal: Refusal) -> None:
        """End the call from outside, unless only its reply is left. Its handler is cancelled wherever it waits."""
        if self._task is not None and self.refusal is None:
            self.refusal = refusal
            self._task.cancel()

    def over(self) -> None:
        """Only the reply is left to be taken."""
        self._task = None
        if self.place is not None:
            self.place.ends()

    def left(self, _: object = None) -> None:
        """The peer has taken the reply, or is gone."""
        self._task = None
        if self.place is not None:
            self.place.leave()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _looked_at(step: "asyncio.Future[Any]") -> None:
    """Its call may be gone: then nobody else looks at how it ended, and asyncio would complain in the log."""
    if not step.cancelled():
        step.exception()


def peer_group(peer: str) -> str:
    """Whose calls count together where nobody has said who it is: an address, without its port.

    peer: gRPC's name for it. A whole loopback network is one peer, as is an IPv6 network of 64 bits.
    """
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    if kind == "ipv6" and host.startswith("::ffff:") and "." in host:
        kind, host = "ipv4", host.removeprefix("::ffff:")
    if kind == "ipv4":
        return "ipv4:127" if host.startswith("127.") else f"ipv4:{host}"
    if kind == "ipv6":
        return "ipv6:" + ":".join(_blocks(host)[:_V6_GROUP_BLOCKS])
    return kind


def _blocks(host: str) -> list[str]:
    """The eight blocks of an IPv6 address."""
    head, gap, tail = host.partition("%")[0].partition("::")
    first, last = head.split(":") if head else [], tail.split(":") if tail else []
    return [*first, *["0"] * (8 - len(first) - len(last)), *last] if gap else first

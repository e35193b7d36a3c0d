"""The interceptor of every gRPC call, and the call as its handler sees it, from its metadata to its end.

It identifies the caller, checks its rights, gives the call a place, and sees that it is recorded (`records`). It
decides on the metadata, before the request is read: who is not known costs no place and no memory. So every method is
served as a stream of requests, also those with one request: the wire is the same, but gRPC then starts the handler
before a message came. Health checking stays open, with places of its own. A refusal says what to do, and nothing about
the entries held. An error of the engine becomes a call's status here, once. The event loop's thread.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from kvstore import errors
from kvstore.errors import InvalidEntry, KvstoreError
from kvstore.ownership import overflow_uid
from kvstored.access.admission import Admission, Place, Refusal, peer_group
from kvstored.access.records import Records, audit
from kvstored.access.refusals import Lines, Pace
from kvstored.access.shares import Shares
from kvstored.access.tokens import LOCAL, NOBODY, RIGHTS, Identity, Tokens
from kvstored.telemetry.metrics import Meter
from kvstored_client.wire.frames import BadFrame

logger = logging.getLogger(__name__)

PREFIX = "/kvstored.v1."
HEALTH_PREFIX = "/grpc.health.v1."
STRANGER_SILENCE_S = 2.0
"""How long a caller that need not say who it is may leave a call without its message."""
RIGHT_OF = {
    "Cache/Get": "read",
    "Cache/Match": "read",
    "Cache/Touch": "read",
    "Cache/Report": "read",
    "Cache/Put": "write",
    "Cache/Delete": "write",
    "Cache/Pin": "write",
}
"""The right that a method needs; any other method, known or not, needs admin."""
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Behavior = Callable[[Any, Any], Awaitable[Any]]


class Access:
    """Identifies callers and checks their rights. A reload replaces `tokens`."""

    def __init__(self, tokens: Tokens | None, *, token_on_unix: bool) -> None:
        self.tokens = tokens
        self._token_on_unix = token_on_unix
        self._nobody = overflow_uid()
        self.user_lines = Lines(1)

    def identify(self, context: Any) -> Identity:
        """The caller. Raises Refusal."""
        tokens = self.tokens
        if tokens is None:
            return LOCAL
        given = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
        if given:
            kind, _, token = str(given[0]).partition(" ")
            found = tokens.of_token(token.strip()) if kind.lower() == "bearer" and len(given) == 1 else None
            if found is None:
                raise Refusal(
                    grpc.StatusCode.UNAUTHENTICATED,
                    "this token is not in the daemon's tokens file: use another, or have its entry added and reloaded",
                )
            return found
        names = context.auth_context().get("x509_common_name", ())
        for name in names:
            found = tokens.of_certificate(bytes(name).decode(errors="replace"))
            if found is not None:
                return found
        if str(context.peer()).startswith("unix:") and not self._token_on_unix:
            return LOCAL
        raise Refusal(
            grpc.StatusCode.UNAUTHENTICATED,
            "a token is needed here: set KVSTORED_TOKEN_FILE to a file that holds one (`kvstored token` makes them)",
        )

    def of_user(self, uid: int) -> Identity | None:
        """The caller for a user id that the kernel has verified. None: it needs a token."""
        if uid == self._nobody:
            # Any user that this namespace has no number for: to share memory among them would be to mix them up.
            return None
        return LOCAL if self.tokens is None else self.tokens.by_uid.get(uid)

    def refuse_user(self, uid: int) -> None:
        """Write down that the lease socket refused a user: its clients try again each second."""
        left_out = self.user_lines.left_out(uid)
        if left_out is not None:
            why = "the kernel's overflow user" if uid == self._nobody else "no entry"
            form = "lease verb=connect who=nobody peer=lease:%d result=UNAUTHENTICATED left_out=%d reason=%s"
            audit.info(form, uid, left_out, why)

    @staticmethod
    def check(identity: Identity, method: str) -> None:
        """Raise Refusal unless the caller may use the method."""
        needed = RIGHT_OF.get(method, "admin")
        if needed not in identity.rights:
            held = ", ".join(right for right in RIGHTS if right in identity.rights)
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                f"{identity.name} has the rights {held}; {method} needs {needed}: add it in the daemon's tokens file",
            )


class Silent(Exception):
    """The peer has sent, or taken, nothing for as long as it may."""


class OpenCall(Place):
    """gRPC's context of a call, and the call's place, which is told when it waits for its peer."""

    def __init__(self, context: Any, method: str) -> None:
        self._context = context
        self._task = asyncio.current_task()
        self.began = time.perf_counter()
        self.method = method
        self.identity = NOBODY
        self.request: Any = b""
        """The message of a method that has one."""
        self.status = "UNKNOWN"
        """How it ended, by gRPC's name."""
        self.refusal: Refusal | None = None
        """Why it was ended from outside."""
        self._first: asyncio.Future[None] | None = None
        """The first message's way out."""
        self.peer_name = str(context.peer())
        self.group = peer_group(self.peer_name)
        context.add_done_callback(self.left)

    def read(self, within_s: float | None = None) -> Awaitable[Any]:
        """The peer's next message, or grpc.aio.EOF. Raises Silent, CancelledError where the peer is gone."""
        return self._waiting(self._context.read(), within_s)

    def write(self, message: Any, within_s: float | None = None) -> Awaitable[Any]:
        """Send a message: waits until the peer has room for it. Raises as `read`."""
        step = self._context.write(message)
        if self._first is None:
            # The call's head goes out with the first message. If that were cancelled, gRPC would send the head once
            # more with the status, fail at it, and leave the peer to wait for its deadline.
            self._first = asyncio.ensure_future(step)
            self._first.add_done_callback(_looked_at)
            step = asyncio.shield(self._first)
        return self._waiting(step, within_s)

    async def _waiting(self, step: Awaitable[Any], within_s: float | None) -> Any:
        """The result of a step that waits for the peer."""
        self.quiet_since = self.now()
        try:
            async with asyncio.timeout(within_s):
                result = await step
        except TimeoutError:
            raise Silent from None
        except grpc.aio.InternalError:
            # A batch that failed: the connection broke under it, before gRPC has cancelled the call for that.
            raise asyncio.CancelledError from None
        self.quiet_since = None
        self.spoken = True
        return result

    async def abort(self, code: Any, details: str = "", trailing: tuple[tuple[str, str], ...] = ()) -> NoReturn:
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
        raise AssertionError("gRPC's abort raises")

    def give_way(self, refusal: Refusal) -> None:
        """End the call from outside, unless only its reply is left. Its handler is cancelled wherever it waits."""
        if self._task is not None and self.working and self.refusal is None:
            self.refusal = refusal
            self._task.cancel()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps every method: a caller is identified and gets a place before its message is read."""

    def __init__(
        self,
        access: Access,
        meter: Meter,
        records: Records,
        admission: Admission,
        silence_s: float,
        shares: Shares,
    ) -> None:
        self._shares = shares
        self._access = access
        self._meter = meter
        self._records = records
        self._admission = admission
        self._silence_s = silence_s
        self._pace = Pace()
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._open: set[OpenCall] = set()

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Any:
        """The method's handler, behind the interceptor."""
        path = str(details.method)
        found = self._wrapped.get(path)
        if found is not None:
            return found
        handler: Any = await continuation(details)
        # Cached by path, only for methods that exist: a flood of invented paths takes no memory.
        if handler is not None:
            method = path.removeprefix(PREFIX).removeprefix(HEALTH_PREFIX)
            inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
            served = self._served(method, inner, one_message=not handler.request_streaming)
            streams = handler.response_streaming
            make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
            handler = make(served, handler.request_deserializer, handler.response_serializer)
            self._wrapped[path] = handler
        return handler

    def recheck(self) -> None:
        """The tokens were replaced: end the open calls whose callers are no longer who they were, or may no longer."""
        for call in list(self._open):
            if call.method.startswith("Health/"):
                continue
            try:
                identity = self._access.identify(call)
                self._access.check(identity, call.method)
                if identity != call.identity:
                    raise Refusal(
                        grpc.StatusCode.UNAUTHENTICATED,
                        "this caller's entry in the tokens file was changed while the call ran: call again",
                    )
            except Refusal as refusal:
                self._admission.count(call.method, "revoked")
                call.give_way(refusal)

    def _served(self, method: str, inner: Behavior, *, one_message: bool) -> Behavior:
        running = self._meter.running(method)
        counts = not method.startswith(("Admin/", "Health/"))  # who looks slows nobody down

        async def served(_: Any, context: Any) -> Any:
            call = OpenCall(context, method)
            running.inc()
            try:
                silence_s = self._admit(call)
                if one_message:
                    try:
                        message = await call.read(silence_s)
                    except Silent:
                        raise self._without_message(call, f"no message for {silence_s} s (server.silence_s)") from None
                    if message is grpc.aio.EOF:
                        raise self._without_message(call, "the call ended without its message")
                    call.request = message
                if counts:
                    await self._shares.turn(call.identity.account, len(call.request))
                reply = await inner(call.request, call)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the boundary: each becomes a status
                return await self._end(call, error)
            else:
                call.status = "OK"
                return reply
            finally:
                self._leave(call)
                running.dec()

        return served

    def _admit(self, call: OpenCall) -> float:
        """Identify the caller and give the call a place. Returns for how long it may be silent. Raises Refusal."""
        if call.method.startswith("Health/"):
            silence_s = min(self._silence_s, STRANGER_SILENCE_S)
            call.caller = call.group
        else:
            silence_s = self._silence_s
            identity = call.identity = self._access.identify(call)
            self._access.check(identity, call.method)
            # Of one tenant all tokens together. Who needs none is an address: over a unix socket, all of its users.
            call.caller = f"local {call.group}" if identity is LOCAL else identity.account
        self._admission.enter(call.method, call)
        self._open.add(call)
        return silence_s

    def _without_message(self, call: OpenCall, why: str) -> Refusal:
        self._admission.count(call.method, "silent")
        return Refusal(grpc.StatusCode.INVALID_ARGUMENT, why, "InvalidEntry")

    async def _end(self, call: OpenCall, error: BaseException) -> NoReturn:
        """End a call that has not ended well, with the status of what it ended with. Raises."""
        try:
            if not isinstance(error, Refusal | asyncio.CancelledError | grpc.aio.AbortError):
                await refuse(call, _meant(error, call.method))
            raise error
        except Refusal as refusal:
            call.status = refusal.code.name
            await self._refuse(call, refusal)
        except asyncio.CancelledError:
            if call.refusal is None:
                call.status = "CANCELLED"
                raise
            call.status = call.refusal.code.name
            await self._refuse(call, call.refusal)
        except grpc.aio.AbortError:
            call.status = _name(call.code())
            raise

    async def _refuse(self, call: OpenCall, refusal: Refusal) -> NoReturn:
        """End a call, when its caller's refusals have their turn. Raises."""
        call.over()
        identity = call.identity
        delay_s = self._pace.delay_s(call.group if identity is NOBODY else identity.account)
        if delay_s:
            with self._pace:
                await asyncio.sleep(delay_s)
        await call.abort(refusal.code, str(refusal), refusal.metadata)

    def _leave(self, call: OpenCall) -> None:
        call.over()
        self._open.discard(call)
        method, records = call.method, self._records
        if method.startswith("Health/"):
            return  # a watch that ends after a day would be the slowest call of all
        observe = records.well.get(method) if call.status == "OK" else None
        if observe is not None:
            observe(time.perf_counter() - call.began)
        else:
            sent = (call.invocation_metadata() or ()) if records.traced else ()
            records.ended(method, call.status, call.began, call.identity, call.peer_name, call.request, sent)
        call.request = b""  # gRPC knows the call until its reply is taken


def _meant(error: BaseException, method: str) -> KvstoreError:
    """What an error is to a caller: one of the engine's is itself, any other one internal, with a line in the log."""
    if isinstance(error, KvstoreError):
        return error
    if isinstance(error, BadFrame | DecodeError):
        return InvalidEntry(str(error))
    logger.error("call failed method=%s", method, exc_info=error)
    return KvstoreError("internal error, see the daemon's log")


async def refuse(context: OpenCall, error: KvstoreError) -> NoReturn:
    """End a call with an error's status; its class travels in the trailing metadata."""
    name = next(kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    metadata = [("kvstored-error", name)]
    retry_after_ms = getattr(error, "retry_after_ms", None)
    if retry_after_ms is not None:
        metadata.append(("retry-after-ms", str(retry_after_ms)))
    await context.abort(grpc.StatusCode[error.grpc_code], str(error), tuple(metadata))


def _looked_at(step: "asyncio.Future[Any]") -> None:
    """Its call may be gone: then nobody else looks at how it ended, and asyncio would complain in the log."""
    if not step.cancelled():
        step.exception()


def _name(code: Any) -> str:
    return code.name if isinstance(code, grpc.StatusCode) else _CODES.get(code, "UNKNOWN")

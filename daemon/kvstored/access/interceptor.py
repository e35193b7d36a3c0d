"""The interceptor of every gRPC call: it identifies the caller, checks its rights, times the call and keeps the audit.

It decides on the metadata, before the request is read: who is not known costs no place and no memory. Health checking
stays open, with places of its own. A refusal says what to do, and nothing about the entries held. A verb that deletes,
pins or administers leaves a line in the audit log, and so does whatever is refused, through either door. An error of
the engine becomes a call's status here, once (`answering`).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from kvstore import errors
from kvstore.errors import InvalidEntry, KvstoreError
from kvstore.ownership import overflow_uid
from kvstored.access.admission import Admission, Refusal
from kvstored.access.open_call import OpenCall, peer_group
from kvstored.access.refusals import Lines, Pace
from kvstored.access.shares import Shares
from kvstored.access.tenant_view import CALLER
from kvstored.access.tokens import LOCAL, RIGHTS, Identity, Tokens
from kvstored.telemetry.metrics import Meter
from kvstored.telemetry.spans import Metadata, Spans
from kvstored_client.wire.frames import BadFrame
from kvstored_client.wire.requests import keys_named

audit = logging.getLogger("kvstored.audit")
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
_REFUSED = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED"})
_LOOKING = frozenset({"Admin/Stats", "Admin/List", "Admin/Inspect", "Admin/Settings"})
"""Admin verbs that change nothing: no audit line for each refresh of a screen."""
_KEYLESS = frozenset({"Admin/CheckShared", "Admin/Configure", "Admin/FlushShared", "Admin/Snapshot"})
"""Verbs that change something and name no keys: what they changed has a line of its own (`live`, `calls.snapshot`)."""
AUDITED = frozenset({"Cache/Delete", "Cache/Pin", "Lease/delete", "Lease/pin"})
"""Verbs beside the admin's that change what others see. Not Put: it is the data path, and each put has its counters."""
REFUSED_LINES = 16
"""Of a caller in a minute, by method and status: a line for each refusal would hide all others."""
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Behavior = Callable[[Any, Any], Awaitable[Any]]
Handler = Callable[[Any, bytes, Any], Awaitable[Any]]


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


class Records:
    """The records of a call, made when it ends, for both doors: its time, a refusal, a line in the audit log."""

    def __init__(self, meter: Meter, spans: Spans) -> None:
        self._meter = meter
        self._spans = spans
        self._lines = Lines(REFUSED_LINES)
        self.traced = spans.wanted

    def observer(self, method: str) -> Callable[[float], None]:
        """Takes the seconds of calls of a method that ended well, where nothing else is written down of them."""
        return self._meter.observer(method, "OK")

    def ended(
        self,
        method: str,
        code: str,
        began: float,
        identity: Identity | None,
        peer: str,
        request: bytes = b"",
        metadata: Metadata = (),
    ) -> None:
        """Record the end of a call. began: time.perf_counter() at its start. request: has the keys of an admin verb."""
        seconds = time.perf_counter() - began
        self._meter.end(method, code, seconds)
        if self._spans.wanted:
            self._spans.record(method, code, seconds, metadata, _about(method, identity, request))
        if code in _REFUSED:
            self._meter.refuse(code)
            caller = peer_group(peer) if identity is None else identity.account
            left_out = self._lines.left_out((caller, method, code))
            if left_out is not None:
                _audit(method, identity, peer, b"", code, f" left_out={left_out}" if left_out else "")
        elif method in AUDITED or (method.startswith("Admin/") and method not in _LOOKING):
            _audit(method, identity, peer, request, code)


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
        handler: Any = await continuation(details)
        path = str(details.method)
        if handler is None:
            return None
        # Cached by path, only for methods that exist: a flood of invented paths takes no memory.
        if path not in self._wrapped:
            method = path.removeprefix(PREFIX).removeprefix(HEALTH_PREFIX)
            inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
            served = self._served(method, inner, one_message=not handler.request_streaming)
            streams = handler.response_streaming
            make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
            self._wrapped[path] = make(served, handler.request_deserializer, handler.response_serializer)
        return self._wrapped[path]

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
                call.end(refusal)

    def _served(self, method: str, inner: Behavior, *, one_message: bool) -> Behavior:
        async def served(_: Any, context: Any) -> Any:
            began, code, request = time.perf_counter(), "UNKNOWN", b""
            call = OpenCall(context, method)
            self._meter.begin(method)
            try:
                silence_s = self._admit(call)
                if one_message:
                    request = await self._message(call, silence_s)
                if call.identity is not None and not method.startswith("Admin/"):  # who looks slows nobody down
                    await self._shares.turn(call.identity.account, len(request))
                reply = await inner(request, call)
            except Refusal as refusal:
                code = refusal.code.name
                await self._refuse(call, refusal)
            except asyncio.CancelledError:
                if call.refusal is None:
                    code = "CANCELLED"
                    raise
                code = call.refusal.code.name
                await self._refuse(call, call.refusal)
            except grpc.aio.AbortError:
                code = _name(context.code())
                raise
            else:
                code = "OK"
                return reply
            finally:
                self._leave(call, code, began, request)

        return served

    def _admit(self, call: OpenCall) -> float:
        """Identify the caller and give the call a place. Returns for how long it may be silent. Raises Refusal."""
        call.place = None
        if call.method.startswith("Health/"):
            silence_s = min(self._silence_s, STRANGER_SILENCE_S)
            caller = call.group
        else:
            identity = call.identity = self._access.identify(call)
            self._access.check(identity, call.method)
            CALLER.set(identity)  # a variable of the call's task: it ends with the call
            silence_s = self._silence_s
            # Of one tenant all tokens together. Who needs none is an address: over a unix socket, all of its users.
            caller = f"local {call.group}" if identity is LOCAL else identity.account
        call.place = self._admission.enter(call.method, caller, call.end)
        self._open.add(call)
        return silence_s

    async def _refuse(self, call: OpenCall, refusal: Refusal) -> None:
        """End a call, when its caller's refusals have their turn. Raises."""
        call.over()
        identity = call.identity
        delay_s = self._pace.delay_s(call.group if identity is None else identity.account)
        if delay_s:
            with self._pace:
                await asyncio.sleep(delay_s)
        await call.abort(refusal.code, str(refusal), refusal.metadata)

    async def _message(self, call: OpenCall, silence_s: float) -> Any:
        try:
            return await call.only_message(silence_s)
        except Refusal:
            self._admission.count(call.method, "silent")
            raise

    def _leave(self, call: OpenCall, code: str, began: float, request: Any) -> None:
        call.over()
        self._open.discard(call)
        if not call.method.startswith("Health/"):  # a watch that ends after a day would be the slowest call of all
            asked = request if isinstance(request, bytes) else b""
            sent = (call.invocation_metadata() or ()) if self._records.traced else ()
            self._records.ended(call.method, code, began, call.identity, call.peer_name, asked, sent)
        self._meter.leave(call.method)


def answering(handler: Handler) -> Handler:
    """The boundary: an error of the engine becomes its status, any other one INTERNAL with a line in the log."""

    @wraps(handler)
    async def answer(self: Any, request: bytes, context: Any) -> Any:
        try:
            return await handler(self, request, context)
        except KvstoreError as error:
            refusal = error
        except (BadFrame, DecodeError) as error:
            refusal = InvalidEntry(str(error))
        except grpc.aio.AbortError:
            raise
        except Exception:
            logger.exception("call failed method=%s", handler.__name__)
            refusal = KvstoreError("internal error, see the daemon's log")
        return await refuse(context, refusal)

    return answer


async def refuse(context: grpc.aio.ServicerContext[Any, Any], error: KvstoreError) -> NoReturn:
    """End a call with an error's status; its class travels in the trailing metadata."""
    name = next(kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    metadata = [("kvstored-error", name)]
    retry_after_ms = getattr(error, "retry_after_ms", None)
    if retry_after_ms is not None:
        metadata.append(("retry-after-ms", str(retry_after_ms)))
    await context.abort(grpc.StatusCode[error.grpc_code], str(error), tuple(metadata))


def _name(code: Any) -> str:
    return code.name if isinstance(code, grpc.StatusCode) else _CODES.get(code, "UNKNOWN")


def _about(method: str, identity: Identity | None, request: bytes) -> dict[str, str | int]:
    """The attributes of a call's span: the caller and the number of keys, never the keys."""
    said: dict[str, str | int] = {"keys": _keys(method, request)[0]} if request else {}
    if identity is not None:
        said["caller"] = identity.name
        if identity.tenant is not None:
            said["tenant"] = identity.tenant
    return said


def _keys(method: str, request: bytes) -> tuple[int, bytes]:
    """How many keys, and the first."""
    if method in _KEYLESS:
        return 0, b""
    try:
        return keys_named(request)
    except (DecodeError, InvalidEntry):
        return 0, b""


def _audit(method: str, identity: Identity | None, peer: str, request: bytes, code: str, more: str = "") -> None:
    count, first = _keys(method, request)
    audit.info(
        "admin verb=%s who=%s peer=%s keys=%d first=%s result=%s%s",
        method, identity.name if identity else "nobody", peer, count,
        first.hex()[:64] or "-", code, more,
    )  # fmt: skip

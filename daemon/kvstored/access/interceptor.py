"""The interceptor of every gRPC call: it identifies the caller, checks its rights, times the call and keeps the audit.

It is around all methods of kvstored's services; health checking stays open. A refusal says what to do, and nothing
about the entries held. A verb that deletes, pins or administers leaves a line in the audit log, and so does whatever
is refused, through either door.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kvstore.ownership import overflow_uid
from kvstored.access.tenant_view import CALLER
from kvstored.access.tokens import LOCAL, RIGHTS, Identity, Tokens
from kvstored.telemetry.metrics import Meter
from kvstored.telemetry.spans import Metadata, Spans
from kvstored_client.wire._pb import cache_pb2 as pb

audit = logging.getLogger("kvstored.audit")

PREFIX = "/kvstored.v1."
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
_LOOKING = frozenset({"Admin/Stats", "Admin/List", "Admin/Inspect"})
"""Admin verbs that change nothing: no audit line for each refresh of a screen."""
AUDITED = frozenset({"Cache/Delete", "Cache/Pin", "Lease/delete", "Lease/pin"})
"""Verbs beside the admin's that change what others see. Not Put: it is the data path, and each put has its counters."""
REFUSED_LINE_S = 60.0
REFUSED_USERS_MAX = 1024
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Behavior = Callable[[Any, Any], Awaitable[Any]]


class Refusal(Exception):
    """A call that is refused: its status and a sentence."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class Access:
    """Identifies callers and checks their rights. A reload replaces `tokens`."""

    def __init__(self, tokens: Tokens | None, *, token_on_unix: bool) -> None:
        self.tokens = tokens
        self._token_on_unix = token_on_unix
        self._nobody = overflow_uid()
        self.refused = RefusedUsers()

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
        """The caller for a user id that the kernel has verified. None: it needs a token, and is written down."""
        found = LOCAL if self.tokens is None else self.tokens.by_uid.get(uid)
        if uid == self._nobody:
            # Any user that this namespace has no number for: to share memory among them would be to mix them up.
            found = None
        if found is None:
            self.refused.refuse(uid, "the kernel's overflow user" if uid == self._nobody else "no entry")
        return found

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


class RefusedUsers:
    """Users whom the lease socket refused: all are counted, and each has a line in the audit log once a minute.

    Their clients go on over the stream and try again each second: a line each time would hide all others.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told_at: dict[int, float] = {}
        self.total = 0

    def refuse(self, uid: int, why: str) -> None:
        """Count a refused connection of a user."""
        self.total += 1
        now = self._clock()
        if now - self._told_at.get(uid, -REFUSED_LINE_S) < REFUSED_LINE_S:
            return
        if len(self._told_at) >= REFUSED_USERS_MAX:
            self._told_at.clear()
        self._told_at[uid] = now
        audit.info("lease verb=connect who=nobody peer=lease:%d result=UNAUTHENTICATED reason=%s", uid, why)

    def gauges(self) -> dict[str, float]:
        """For the statistics."""
        return {"lease_users_refused": self.total}


class Records:
    """The records of a call, made when it ends, for both doors: its time, a refusal, a line in the audit log."""

    def __init__(self, meter: Meter, spans: Spans) -> None:
        self._meter = meter
        self._spans = spans
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
            self._spans.record(method, code, seconds, metadata, _about(identity, request))
        refused = code in _REFUSED
        if refused:
            self._meter.refuse(code)
        if refused or method in AUDITED or (method.startswith("Admin/") and method not in _LOOKING):
            _audit(method, identity, peer, b"" if refused else request, code)


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of kvstored's services."""

    def __init__(self, access: Access, meter: Meter, records: Records) -> None:
        self._access = access
        self._meter = meter
        self._records = records
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Any:
        """The method's handler, behind the interceptor."""
        handler = await continuation(details)
        path = str(details.method)
        if handler is None or not path.startswith(PREFIX):
            return handler
        # Cached by path, only for methods that exist: a flood of invented paths takes no memory.
        if path not in self._wrapped:
            self._wrapped[path] = self._wrap(path.removeprefix(PREFIX), handler)
        return self._wrapped[path]

    def _wrap(self, method: str, handler: Any) -> Any:
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._gated(method, handler.unary_unary))
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._gated(method, handler.unary_stream))
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._gated(method, handler.stream_unary))
        return grpc.stream_stream_rpc_method_handler(self._gated(method, handler.stream_stream))

    def _gated(self, method: str, inner: Behavior) -> Behavior:
        async def gated(request: Any, context: Any) -> Any:
            began = time.perf_counter()
            code = "UNKNOWN"
            identity = None
            self._meter.begin(method)
            try:
                identity = self._access.identify(context)
                self._access.check(identity, method)
                CALLER.set(identity)  # a variable of the call's task: it ends with the call
                reply = await inner(request, context)
            except Refusal as refusal:
                code = refusal.code.name
                await context.abort(refusal.code, str(refusal), (("kvstored-error", "PermissionDenied"),))
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except grpc.aio.AbortError:
                code = _name(context.code())
                raise
            else:
                code = "OK"
                return reply
            finally:
                self._meter.leave(method)
                asked = request if isinstance(request, bytes) else b""
                sent = (context.invocation_metadata() or ()) if self._records.traced else ()
                self._records.ended(method, code, began, identity, str(context.peer()), asked, sent)

        return gated


def _name(code: Any) -> str:
    return code.name if isinstance(code, grpc.StatusCode) else _CODES.get(code, "UNKNOWN")


def _about(identity: Identity | None, request: bytes) -> dict[str, str | int]:
    """The attributes of a call's span: the caller and the number of keys, never the keys."""
    said: dict[str, str | int] = {"keys": len(_keys(request))} if request else {}
    if identity is not None:
        said["caller"] = identity.name
        if identity.tenant is not None:
            said["tenant"] = identity.tenant
    return said


def _keys(request: bytes) -> list[bytes]:
    try:
        # Every request that names keys has them in field 1, as this one.
        return list(pb.EvictRequest.FromString(request).keys)
    except DecodeError:
        return []


def _audit(method: str, identity: Identity | None, peer: str, request: bytes, code: str) -> None:
    keys = _keys(request)
    audit.info(
        "admin verb=%s who=%s peer=%s keys=%d first=%s result=%s",
        method, identity.name if identity else "nobody", peer, len(keys),
        keys[0].hex()[:64] if keys else "-", code,
    )  # fmt: skip

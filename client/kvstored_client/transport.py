"""Calls to the daemon over gRPC: one channel, its limits, and what a failed call means.

Every call has a hard end: a deadline sized by the bytes it moves or, for a get, a watchdog over its silence. A channel
belongs to the process that made it: a forked child starts with a fresh one. Thread-safe.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import grpc

from kvstore import errors
from kvstore.errors import KvstoreError, OverQuota, TierUnavailable
from kvstored_client.address import parse_address
from kvstored_client.breaker import Breaker
from kvstored_client.credentials import check_credentials, open_channel
from kvstored_client.messages import PAYLOAD_BYTES_PER_S
from kvstored_client.watchdog import Watchdog

CACHE = "/kvstored.v1.Cache/"
ADMIN = "/kvstored.v1.Admin/"
ERROR_METADATA = "kvstored-error"

MESSAGE_MAX_NBYTES = 4 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_MAX_NBYTES),
    ("grpc.max_send_message_length", MESSAGE_MAX_NBYTES),
    # Without the ping timeout keepalive noticed a stopped peer after 61 s, with it after 3 (its default is 60 s).
    # Both together under ten seconds, in which a peer has to be noticed, with a few to spare on a busy machine.
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Also how long a connection may take to be made: at 100 ms a busy machine is taken for a dead one.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A connection of its own: channels of one process otherwise share one, and a fork would inherit it.
    ("grpc.use_local_subchannel_pool", 1),
    # A stream's frames are taken by the thread that asked, not by one made for each stream.
    ("SingleThreadedUnaryStream", 1),
    # The daemon is on this host or named by an operator: a proxy from the environment is never meant.
    ("grpc.enable_http_proxy", 0),
)

_DOWN = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
    }
)
"""Codes that count against the daemon's health when it did not name an error of its own."""

_BY_CODE: dict[grpc.StatusCode, type[KvstoreError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidEntry,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverQuota,
    grpc.StatusCode.FAILED_PRECONDITION: errors.CodecError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: errors.PermissionDenied,
    grpc.StatusCode.DATA_LOSS: errors.RecordCorrupt,
}

Reply = TypeVar("Reply")
Reply_co = TypeVar("Reply_co", covariant=True)


class Request(Protocol):
    """A protobuf message to send."""

    def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name
        """Its bytes."""
        ...


class ReplyType(Protocol[Reply_co]):
    """A protobuf message class to receive."""

    def FromString(self, data: bytes, /) -> Reply_co:  # noqa: N802 - protobuf's name
        """The message of these bytes."""
        ...


class Transport:
    """The way to one daemon. `boot_epoch` is the daemon's last one seen, `restarts` how often it changed."""

    def __init__(self, address: str, timeout_s: float, on_change: Callable[[str, str], None]) -> None:
        self.address = address
        self.target = parse_address(address)
        check_credentials(address)
        self.timeout_s = timeout_s
        self.boot_epoch = 0
        self.restarts = 0
        self._on_change = on_change
        self.on_fork: Callable[[], None] | None = None
        self._closed = False
        self._start_afresh()
        _alive.add(self)

    def _start_afresh(self) -> None:
        # Also in a forked child, where every lock may be held by a thread that exists no more.
        self._lock = threading.Lock()
        self._watchdog = Watchdog()
        self.breaker = Breaker()
        self._channel: grpc.Channel | None = None
        self._methods: dict[str, Any] = {}

    def after_fork(self) -> None:
        """Let go of the parent's channel without closing it: closing would speak on the parent's connection."""
        _inherited.append(self._channel)
        self._start_afresh()
        if self.on_fork is not None:
            self.on_fork()

    def _method(self, kind: str, path: str) -> Any:
        # Serializers are left out: requests and replies are bytes here, so bulk never becomes a protobuf object.
        found = self._methods.get(kind + path)
        if found is not None:
            return found
        with self._lock:
            if self._closed:
                raise TierUnavailable("this client is closed")
            if self._channel is None:
                self._channel = open_channel(self.address, _OPTIONS)
            method = getattr(self._channel, kind)(path)
            self._methods[kind + path] = method
            return method

    def unary(self, path: str, request: Request, reply: ReplyType[Reply]) -> Reply:
        """One message there, one back. Raises KvstoreError."""
        method = self._method("unary_unary", path)
        return reply.FromString(self._attempt(lambda: method(request.SerializeToString(), timeout=self.timeout_s)))

    def send(self, path: str, frame: bytes, nbytes: int) -> bytes:
        """A put of a single frame: on the wire the stream of one message, without gRPC's thread for sending."""
        method = self._method("unary_unary", path)
        return self._attempt(lambda: bytes(method(frame, timeout=self._deadline_s(nbytes))))

    def stream_out(self, path: str, frames: Iterable[bytes], nbytes: int) -> bytes:
        """A stream of frames there, one message back. Raises KvstoreError."""
        method = self._method("stream_unary", path)
        return self._attempt(lambda: bytes(method(iter(frames), timeout=self._deadline_s(nbytes))))

    def stream_in(self, path: str, request: Request) -> Iterator[bytes]:
        """One message there, a stream of messages back, each within `timeout_s`. Raises KvstoreError."""
        method = self._method("unary_stream", path)
        self.allow()
        call = method(request.SerializeToString())
        watch = self._watchdog.watch(call.cancel, self.timeout_s)
        try:
            for message in call:
                watch.progress()
                yield message
                watch.progress()  # the caller's own time between two frames is not the daemon's silence
        except grpc.RpcError as error:
            late = f"no answer within {self.timeout_s} s" if watch.expired else ""
            raise self._failed(error, late) from None
        else:
            self.answered()
        finally:
            self._watchdog.release(watch)
            call.cancel()

    def saw_epoch(self, epoch: int) -> None:
        """Note the boot epoch of a reply."""
        if epoch and epoch != self.boot_epoch:
            with self._lock:
                if self.boot_epoch and epoch != self.boot_epoch:
                    self.restarts += 1
                self.boot_epoch = epoch

    def close(self) -> None:
        """End all calls and the connection. Later calls raise TierUnavailable."""
        with self._lock:
            self._closed = True
            channel, self._channel = self._channel, None
            self._methods.clear()
        if channel is not None:
            channel.close()

    def _deadline_s(self, nbytes: int) -> float:
        return self.timeout_s + nbytes / PAYLOAD_BYTES_PER_S

    def _attempt(self, call: Callable[[], bytes]) -> bytes:
        self.allow()
        try:
            reply = call()
        except grpc.RpcError as error:
            raise self._failed(error) from None
        except ValueError as error:  # grpc's word for a channel closed by another thread
            raise TierUnavailable(f"this client is closed: {error}") from None
        self.answered()
        return reply

    def allow(self) -> None:
        """Whether to try at all. Raises TierUnavailable while the breaker is open."""
        if not self.breaker.allow(self.timeout_s):
            raise TierUnavailable(f"{self.address} failed repeatedly and is left alone for a moment")

    def answered(self) -> None:
        """The daemon answered, by whatever door."""
        if self.breaker.succeeded():
            self._on_change("up", self.address)

    def silent(self, text: str) -> KvstoreError:
        """The daemon did not answer in time, by whatever door."""
        if self.breaker.failed():
            self._on_change("down", f"{self.address}: {text}")
        return TierUnavailable(f"{self.address}: {text}")

    def _failed(self, rpc: Any, late: str = "") -> KvstoreError:
        code, text = rpc.code(), late or rpc.details() or ""
        named = dict(rpc.trailing_metadata() or ()).get(ERROR_METADATA)
        if named is not None:
            self.answered()
            kind = getattr(errors, str(named), None)
            return kind(text) if isinstance(kind, type) and issubclass(kind, KvstoreError) else KvstoreError(text)
        if code in _DOWN:
            return self.silent(f"{code.name}: {text}")
        return _BY_CODE.get(code, KvstoreError)(f"{code.name}: {text}")


_alive: "weakref.WeakSet[Transport]" = weakref.WeakSet()
_inherited: list[object] = []
"""Channels of a parent process, kept from the collector: collecting one would close the parent's connection."""


def _after_fork() -> None:
    for transport in list(_alive):
        transport.after_fork()


os.register_at_fork(after_in_child=_after_fork)

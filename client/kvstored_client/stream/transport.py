"""Calls to the daemon over gRPC: one channel, its limits, and what a failed call means.

Every call has a hard end: a deadline sized by the bytes it moves or, for a get, a watchdog over its silence. A channel
belongs to the process that made it: a forked child starts with a fresh one. Thread-safe, and without a lock of its own
(see `interrupts`); gRPC, which has many, is called in threads that nothing interrupts.
"""

import errno
import logging
import os
import resource
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from math import inf
from typing import Any, Protocol, TypeVar

import grpc

from kvstore import errors
from kvstore.errors import KvstoreError, OverQuota, TierUnavailable
from kvstored_client.aside import Aside, Job
from kvstored_client.breaker import Breaker
from kvstored_client.interrupts import damage, is_foreign
from kvstored_client.puts import Outgoing
from kvstored_client.stream.credentials import check_credentials, open_channel
from kvstored_client.stream.watchdog import Watchdog
from kvstored_client.wire.address import parse_address, socket_path
from kvstored_client.wire.messages import PAYLOAD_BYTES_PER_S
from kvstored_client.wire.trust import Place, named_users

logger = logging.getLogger(__name__)

CACHE = "/kvstored.v1.Cache/"
ADMIN = "/kvstored.v1.Admin/"
HEALTH = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"
"""A HealthCheckResponse of status SERVING; the base install has no generated messages for it."""
ERROR_METADATA = "kvstored-error"

MESSAGE_MAX_NBYTES = 4 << 20
DESCRIPTORS_MIN = 16
"""Free ones that a channel is not opened without. gRPC aborts the process when it starts with fewer than four."""
ASIDES_MAX = 4
"""Threads kept for the next call."""
OPTIONS = (
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


def _check_descriptors() -> None:
    """Raise OSError unless this process may open some more files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - one step, which leaves nothing open if it is interrupted
    if limit != resource.RLIM_INFINITY and opened + DESCRIPTORS_MIN > limit:
        raise OSError(errno.EMFILE, f"{opened} of {limit} descriptors are open, and gRPC needs up to {DESCRIPTORS_MIN}")


class _Methods(dict[tuple[str, str], Any]):
    """What calls a path of the daemon's, by kind and path. Raises ValueError for a channel that was closed."""

    def __init__(self, channel: grpc.Channel) -> None:
        super().__init__()
        self._channel = channel

    def __missing__(self, called: tuple[str, str]) -> Any:
        # Serializers are left out: requests and replies are bytes here, so bulk never becomes a protobuf object.
        kind, path = called
        return self.setdefault(called, getattr(self._channel, kind)(path))


class Line:
    """One channel and its methods. Raises TierUnavailable for a socket whose listener is not to be trusted."""

    def __init__(self, address: str) -> None:
        _check_descriptors()
        path = socket_path(parse_address(address))
        self._place = None if path is None else Place(path)
        if self._place is not None:
            self._place.check_listener()
        self._open(address)
        self.methods = _Methods(self._channel)

    def _open(self, address: str) -> None:
        self._channel = open_channel(address, OPTIONS)

    def is_current(self) -> bool:
        """Whether gRPC, which connects again by itself, can still reach only whom this line was opened to."""
        return self._place is None or self._place.is_current()

    def close(self) -> None:
        """End the connection and all calls."""
        self._channel.close()


class Transport:
    """The way to one daemon. `boot_epoch` is the daemon's last one seen, `restarts` how often it changed."""

    def __init__(self, address: str, timeout_s: float, on_change: Callable[[str, str], None]) -> None:
        self.address = address
        self.target = parse_address(address)
        check_credentials(address)
        named_users(os.environ)  # a mistake there is the caller's, and not a daemon that is down
        self.timeout_s = timeout_s
        self._lives = (0, 0)
        self._on_change = on_change
        self.on_fork: Callable[[], None] | None = None
        self.closed = False
        self._start_afresh()
        _alive.add(self)

    new_line: Callable[[str], Line] = Line

    def _start_afresh(self) -> None:
        self._watchdog = Watchdog()
        self.breaker = Breaker()
        self._line: dict[str, Line] = {}
        """At most one, under "now": a dictionary adds and removes in one step."""
        self._asides: deque[Aside] = deque(maxlen=ASIDES_MAX)

    def after_fork(self) -> None:
        """Let go of the parent's channel without closing it: closing would speak on the parent's connection."""
        inherited.append(self._line)
        self._start_afresh()
        if self.on_fork is not None:
            self.on_fork()

    @property
    def boot_epoch(self) -> int:
        """The daemon's last one seen."""
        return self._lives[0]

    @property
    def restarts(self) -> int:
        """How often it changed."""
        return self._lives[1]

    def open_line(self) -> Line:
        """The channel, opened if it is not. Raises TierUnavailable."""
        line = self._line.get("now")
        if line is not None and not line.is_current():
            self._line.pop("now", None)
            line.close()
            line = None
        if line is None:
            if self.closed:
                raise TierUnavailable("this client is closed")
            try:
                opened = self.new_line(self.address)
            except FileNotFoundError as error:
                raise self.silent(f"failed to connect: there is no {error.filename}") from None
            except TierUnavailable as error:
                raise self.silent(str(error)) from None
            except (OSError, ImportError, RuntimeError, MemoryError) as error:
                # Out of descriptors or threads: gRPC imports parts of itself only now.
                if is_foreign(error):
                    raise
                raise TierUnavailable(f"no channel to {self.address}: {error}") from None
            line = self._line.setdefault("now", opened)
            if line is not opened:
                opened.close()
        return line

    def unary(self, path: str, request: Request, reply: ReplyType[Reply]) -> Reply:
        """One message there, one back. Raises KvstoreError."""
        data = self._attempt("unary_unary", path, request.SerializeToString(), self.timeout_s)
        try:
            return reply.FromString(data)
        except Exception as error:  # noqa: BLE001 - the boundary; interrupts pass it
            raise damage(error, f"what {self.address} answered") from None

    def health(self) -> bool:
        """Whether the daemon says that it serves, by gRPC's health check: it needs no right. Raises KvstoreError."""
        return self._attempt("unary_unary", HEALTH, b"", self.timeout_s) == SERVING

    def put(self, batch: Sequence[Outgoing]) -> bytes:
        """Entries there, a PutReply back, serialized. Raises KvstoreError."""
        nbytes = sum(entry.nbytes for entry in batch)
        single = batch[0].single_frame() if len(batch) == 1 else None
        if single is not None:
            return self.send(CACHE + "Put", single, nbytes)
        return self.stream_out(CACHE + "Put", (frame for entry in batch for frame in entry.frames()), nbytes)

    def send(self, path: str, frame: bytes, nbytes: int) -> bytes:
        """A put of a single frame: on the wire the stream of one message, without gRPC's thread for sending."""
        return self._attempt("unary_unary", path, frame, self.deadline_s(nbytes))

    def stream_out(self, path: str, frames: Iterable[bytes], nbytes: int) -> bytes:
        """A stream of frames there, one message back. Raises KvstoreError."""
        wanted = _Wanted()
        try:
            return self._attempt("stream_unary", path, _while_wanted(frames, wanted), self.deadline_s(nbytes))
        finally:
            wanted.still = False

    def _aside(self) -> Aside:
        """A thread to call gRPC in.

        Never in the caller's own: an interrupt inside one of gRPC's conditions leaves it locked, and every other thread
        of the channel waits for it for ever. A call that was interrupted here ends there.
        """
        try:
            return self._asides.pop()
        except IndexError:
            return Aside()

    def _attempt(self, kind: str, path: str, asked: Any, timeout_s: float) -> bytes:
        self.allow()
        received: list[bytes] = []
        jobs: list[Job] = []
        aside, method = self._aside(), self.open_line().methods[kind, path]
        try:
            aside.start(jobs, lambda: received.append(bytes(method(asked, timeout=timeout_s))))
            jobs[0].wait()
        except grpc.RpcError as error:
            raise self.failed(error) from None
        except ValueError as error:  # grpc's word for a channel closed by another thread
            if is_foreign(error):
                raise
            raise TierUnavailable(f"this client is closed: {error}") from None
        self._asides.append(aside)
        self.answered()
        return received[0]

    def stream_in(self, path: str, request: Request) -> Generator[bytes]:
        """One message there, a stream of messages back, each within `timeout_s`. Raises KvstoreError.

        Whoever does not take all of them closes it.
        """
        self.allow()
        call = _Stream(self.open_line().methods["unary_stream", path], request.SerializeToString())
        aside = self._aside()
        jobs: list[Job] = []
        ended, watch = False, None
        try:
            watch = self._watchdog.watch(call.cancel, self.timeout_s)
            while True:
                aside.start(jobs, call.take)
                jobs.pop().wait()
                message = call.received.popleft()
                if message is None:
                    break
                watch.due = inf  # the caller's own time between two frames is not the daemon's silence
                yield message
                watch.due = time.monotonic() + self.timeout_s
            ended = True
        except grpc.RpcError as error:
            ended = True
            late = f"no answer within {self.timeout_s} s" if watch is not None and watch.expired else ""
            raise self.failed(error, late) from None
        except (ValueError, RuntimeError) as error:  # a channel closed by another thread; no thread for the watchdog
            if is_foreign(error):
                raise
            raise TierUnavailable(f"{self.address}: {error}") from None
        finally:
            if not ended:
                self._aside().start([], call.cancel)
        self._asides.append(aside)
        self.answered()

    def saw_epoch(self, epoch: int) -> None:
        """Note the boot epoch of a reply."""
        before, restarts = self._lives
        if epoch and epoch != before:
            self._lives = (epoch, restarts + (before != 0))

    def close(self) -> None:
        """End all calls and the connection. Later calls raise TierUnavailable."""
        self.closed = True
        for line in list(self._line.values()):
            line.close()
        self._line.clear()

    def deadline_s(self, nbytes: int) -> float:
        """How long a call that moves so many bytes may take."""
        return self.timeout_s + nbytes / PAYLOAD_BYTES_PER_S

    def allow(self) -> None:
        """Whether to try at all. Raises TierUnavailable while the breaker is open."""
        if self.breaker.openings and not self.breaker.allow(self.timeout_s):
            raise TierUnavailable(f"{self.address} failed repeatedly and is left alone for a moment")

    def answered(self) -> None:
        """The daemon answered, by whatever door."""
        if (self.breaker.failures or self.breaker.openings) and self.breaker.succeeded():
            self._on_change("up", self.address)

    def silent(self, text: str) -> KvstoreError:
        """The daemon did not answer in time, by whatever door."""
        if self.breaker.failed():
            self._on_change("down", f"{self.address}: {text}")
        return TierUnavailable(f"{self.address}: {text}")

    def failed(self, rpc: Any, late: str = "") -> KvstoreError:
        """What a failed call means."""
        code, text = rpc.code(), late or rpc.details() or ""
        named = dict(rpc.trailing_metadata() or ()).get(ERROR_METADATA)
        if named is not None:
            self.answered()
            kind = getattr(errors, str(named), None)
            return kind(text) if isinstance(kind, type) and issubclass(kind, KvstoreError) else KvstoreError(text)
        if code in _DOWN:
            return self.silent(f"{code.name}: {text}")
        return _BY_CODE.get(code, KvstoreError)(f"{code.name}: {text}")


class _Stream:
    """One call whose messages come one by one, as the thread that calls gRPC has it. received: the last message."""

    def __init__(self, method: Any, asked: bytes) -> None:
        """method: what calls gRPC."""
        self._method = method
        self._asked = asked
        self._call: Any = None
        self._over = False
        self.received: deque[Any] = deque()

    def take(self) -> None:
        """The next message, None at the end; the first time the call is made. Raises what gRPC does."""
        if self._call is None:
            self._call = self._method(self._asked)
            if self._over:
                self._call.cancel()
        self.received.append(next(self._call, None))

    def cancel(self) -> None:
        """End it: also one that is only being made, in another thread."""
        self._over = True
        if self._call is not None:
            self._call.cancel()


class _Wanted:
    """Whether the caller of a stream still waits for it: after an interrupt it may change what is being sent."""

    still = True


def _while_wanted(frames: Iterable[bytes], wanted: _Wanted) -> Iterator[bytes]:
    for frame in frames:
        if not wanted.still:
            return  # inside an entry, which the daemon then refuses, or between two
        yield frame


_alive: "weakref.WeakSet[Transport]" = weakref.WeakSet()
inherited: list[object] = []
"""Channels of a parent process, kept from the collector: collecting one would close the parent's connection."""


def _after_fork() -> None:
    for transport in list(_alive):
        transport.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def log_change(state: str, detail: str) -> None:
    """Tell of a breaker that opened or closed."""
    # Once for each change of state, whatever the number of calls that met it.
    if state == "down":
        logger.warning("cache down, answering misses until it is back: %s", detail)
    else:
        logger.info("cache up: %s", detail)

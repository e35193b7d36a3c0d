"""The same host: calls over the lease socket, tensors through shared memory. The proto describes the exchange.

A Near keeps a few connections; each serves one call at a time and has its own ingest segments. Whatever goes wrong with
a connection closes it; the call then goes over the stream, unless the daemon was silent too long already. Thread-safe.
"""

import array
import os
import socket
import struct
import threading
import time
from collections import deque
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from google.protobuf.message import DecodeError

from kvstore import errors
from kvstore.errors import KvstoreError
from kvstore.region import FreeList
from kvstored_client._pb import cache_pb2 as pb
from kvstored_client.frames import fixed64s
from kvstored_client.mapping import Copier, Mapping, Window

PACKET_MAX_NBYTES = 256 << 10
CONNECTIONS_MAX = 4
"""Calls under way at once; more wait. Two cores are busy with two copies."""
RETRY_S = 1.0
RELEASE_WITHIN_S = 0.01
"""A lease ends with the next call on its connection or this much later."""
RELEASES_MAX = 1024
RELEASES_NBYTES = 8 * RELEASES_MAX + 8
"""What they add to a call, at most."""
_RELEASE = 1  # LeaseCall's field
LOOK_S = 0.0001 if (os.cpu_count() or 1) > 1 else 0.0
"""How long to look for an answer before sleeping on it: a hot one comes by then, and waking an idle core takes as long
again. Not with sched_yield: on a busy machine it costs a whole slice."""
INGEST_MAX_NBYTES = 256 << 20
"""Shared memory of one connection for puts. A larger batch goes in several commits, a larger entry over the stream."""
_FDS_MAX = 64
_ANCILLARY_NBYTES = socket.CMSG_SPACE(4 * _FDS_MAX)


class UseStream(Exception):
    """This call cannot be served through shared memory."""


class Silent(Exception):
    """The daemon took the call and did not answer in time."""


class Room:
    """An ingest segment: room for puts, given back when the last tensor over it is gone."""

    def __init__(self, number: int, mapping: Mapping) -> None:
        self.number = number
        self.mapping = mapping
        self._free = FreeList(mapping.nbytes)
        # Windows end wherever their last reference dies, also inside `take`: they append, which needs no lock.
        self._dead: deque[int] = deque()

    def take(self, nbytes: int) -> tuple[Window, int, int] | None:
        """(window, segment, start) of so many bytes; None without room. Called under the connection's lock."""
        while self._dead:
            self._free.give(self._dead.popleft())
        start = self._free.take(nbytes)
        if start is None:
            return None
        return self.mapping.window(start, nbytes, Taken(self._dead, start), writable=True), self.number, start


class Taken:
    """Room in use: given back when the last reference to this is gone."""

    __slots__ = ("_dead", "_start")

    def __init__(self, dead: deque[int], start: int) -> None:
        self._dead = dead
        self._start = start

    def __del__(self) -> None:
        self._dead.append(self._start)


class Releases:
    """Sends the releases that no call took along: a packet of their own each would cost a get half as much again."""

    def __init__(self) -> None:
        # Of all queues the one that a finalizer may put into, whatever it interrupts.
        self._queue: SimpleQueue[Connection | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def wake(self, connection: "Connection") -> None:
        """This connection has releases to send, unless a call does it first."""
        self._queue.put(connection)

    def start(self) -> None:
        """Start the thread, if it does not run. Only from one thread at a time."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_send_releases, args=(self._queue,), name="kvstored-release", daemon=True
            )
            self._thread.start()

    def __del__(self) -> None:
        self._queue.put(None)


def _send_releases(queue: "SimpleQueue[Connection | None]") -> None:
    while (connection := queue.get()) is not None:
        time.sleep(RELEASE_WITHIN_S)
        connection.send_releases()


class Connection:
    """One lease socket. `lock` is held for a call and its answer."""

    def __init__(self, path: Path, timeout_s: float, releases: Releases) -> None:
        self.lock = threading.Lock()
        self._releases = releases
        self._released: deque[int] = deque()
        self._waiting = False
        releases.start()
        self.segments = Segments()
        self.ingest: list[Room] = []
        self.closed = False
        self._timeout_s = 0.0
        self._buffers = [memoryview(bytearray(PACKET_MAX_NBYTES))]
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_MAX_NBYTES)
            self._set_timeout(timeout_s)
            self._sock.connect(str(path))
        except OSError:
            self._sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def call(self, call: pb.LeaseCall, timeout_s: float) -> pb.LeaseReply:
        """Ask and wait. Raises UseStream, Silent, or the daemon's own error. The caller holds `lock`."""
        return self.exchange(call.SerializeToString(), timeout_s)

    def exchange(self, data: bytes, timeout_s: float) -> pb.LeaseReply:
        """As `call`, for the bytes of a LeaseCall."""
        if len(data) > PACKET_MAX_NBYTES - RELEASES_NBYTES:
            raise UseStream(f"a call of {len(data)} bytes")
        if self._released:
            data = fixed64s(_RELEASE, self._take_released()) + data
        try:
            if timeout_s != self._timeout_s:
                self._set_timeout(timeout_s)
            self._sock.send(data)
            nbytes, ancillary = self._receive()
        except BlockingIOError:
            self.close()
            raise Silent(f"no answer within {timeout_s} s") from None
        except OSError as error:
            self.close()
            raise UseStream(str(error)) from None
        if not nbytes:
            self.close()
            raise UseStream("the daemon hung up")
        reply = self._reply_of(nbytes)
        if ancillary:
            self._map(reply, ancillary)
        if reply.HasField("error"):
            kind = getattr(errors, reply.error.kind, None)
            if isinstance(kind, type) and issubclass(kind, KvstoreError):
                raise kind(reply.error.message)
            raise UseStream(reply.error.message)
        return reply

    def _reply_of(self, nbytes: int) -> pb.LeaseReply:
        try:
            return pb.LeaseReply.FromString(self._buffers[0][:nbytes].tobytes())
        except DecodeError as error:
            self.close()
            raise UseStream(str(error)) from None

    def _receive(self) -> tuple[int, list[tuple[int, int, bytes]]]:
        until = time.perf_counter() + LOOK_S
        while time.perf_counter() < until:
            try:
                nbytes, ancillary, _, _ = self._sock.recvmsg_into(self._buffers, _ANCILLARY_NBYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            return nbytes, ancillary
        nbytes, ancillary, _, _ = self._sock.recvmsg_into(self._buffers, _ANCILLARY_NBYTES)
        return nbytes, ancillary

    def room(self, nbytes: int, timeout_s: float) -> tuple[Window, int, int]:
        """Bytes in an ingest segment: (window, segment, start). The caller holds `lock`. Raises UseStream."""
        for room in self.ingest:
            found = room.take(nbytes)
            if found is not None:
                return found
        held = sum(room.mapping.nbytes for room in self.ingest)
        if held + nbytes > INGEST_MAX_NBYTES:
            raise UseStream(f"{nbytes} bytes beside {held} of {INGEST_MAX_NBYTES} in ingest segments")
        self.call(pb.LeaseCall(ingest_nbytes=nbytes), timeout_s)
        found = self.ingest[-1].take(nbytes)
        if found is None:
            raise UseStream("an ingest segment smaller than asked for")
        return found

    def release(self, lease: int) -> None:
        """Give a lease back: with the next call, or in a moment. Takes no lock: finalizers call it."""
        if lease and not self.closed:
            self._released.append(lease)
            if not self._waiting:
                self._waiting = True
                self._releases.wake(self)

    def send_releases(self) -> None:
        """Give back what no call has taken along. Needs no answer and no lock: a packet is sent whole."""
        self._waiting = False  # before they are taken: one that comes now is either taken or asks again
        numbers = self._take_released()
        if not numbers or self.closed:
            return
        try:
            self._sock.send(fixed64s(_RELEASE, numbers))
        except OSError:
            self.close()

    def _take_released(self) -> list[int]:
        numbers: list[int] = []
        try:
            while self._released and len(numbers) < RELEASES_MAX:
                numbers.append(self._released.popleft())
        except IndexError:
            pass  # a call and the thread may take at once
        return numbers

    def close(self) -> None:
        """End the connection: the daemon frees all that it held."""
        self.closed = True
        self._sock.close()

    def _set_timeout(self, timeout_s: float) -> None:
        # In the kernel: Python's own timeouts cost a poll before each call.
        spec = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, spec)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, spec)
        self._timeout_s = timeout_s

    def _map(self, reply: pb.LeaseReply, ancillary: list[tuple[int, int, bytes]]) -> None:
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) // fds.itemsize * fds.itemsize])
        for segment, fd in zip(reply.segments, fds, strict=False):
            if segment.writable:
                self.ingest.append(Room(segment.number, Mapping(fd, segment.nbytes, writable=True)))
            else:
                self.segments.add(segment.number, fd, segment.nbytes)
        for fd in fds[len(reply.segments) :]:
            os.close(fd)


class Segments:
    """The daemon's segments, mapped once for all connections of one daemon's life.

    blocks: what is known of blocks, by segment, start and generation, or by all that is said of one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mappings: dict[int, Mapping] = {}
        self.blocks: dict[tuple[int, int, int] | bytes, Any] = {}

    def add(self, number: int, fd: int, nbytes: int) -> None:
        """Map a segment, unless another connection was handed it before."""
        with self._lock:
            if number in self._mappings:
                os.close(fd)
                return
            mapping = self._mappings[number] = Mapping(fd, nbytes, writable=False)
        mapping.populate()

    def get(self, number: int) -> Mapping:
        """The mapping of a segment. Raises UseStream for one that was never handed over."""
        mapping = self._mappings.get(number)
        if mapping is None:
            raise UseStream(f"segment {number} was not handed over")
        return mapping


class Near:
    """Connections to one daemon's lease socket, made as needed."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self.timeout_s = timeout_s
        self.start_afresh()

    def start_afresh(self) -> None:
        """Forget all connections without closing them: in a forked child they are the parent's."""
        self._lock = threading.Lock()
        self._connections: list[Connection] = []
        self._turn = 0
        self._epoch = 0
        self._segments = Segments()
        self._releases = Releases()
        self._not_before = 0.0
        self._closed = False
        self.copier = Copier()

    def connection(self, wanted: Connection | None = None) -> Connection:
        """A connection, locked for one call: the wanted one, an idle one, a new one, or one to wait for.

        Leaving it as a context unlocks it. Raises UseStream when there is none, Silent when none became free in time.
        """
        chosen = self._locked(wanted)
        if chosen.closed:
            chosen.lock.release()
            raise UseStream("the connection ended")
        return chosen

    def _locked(self, wanted: Connection | None) -> Connection:
        if wanted is None:
            for connection in self._connections:
                if not connection.closed and connection.lock.acquire(blocking=False):
                    return connection
            with self._lock:
                self._connections = [c for c in self._connections if not c.closed]
                if len(self._connections) < CONNECTIONS_MAX:
                    return self._connect()
                self._turn += 1
                wanted = self._connections[self._turn % len(self._connections)]
        if not wanted.lock.acquire(timeout=self.timeout_s):
            raise Silent(f"no free connection within {self.timeout_s} s")
        return wanted

    def _connect(self) -> Connection:
        if self._closed or time.monotonic() < self._not_before:
            raise UseStream("there was no lease socket a moment ago")
        try:
            connection = Connection(self._path, self.timeout_s, self._releases)
            # Segments are numbered anew in each life of the daemon: whose they are must be known before one is mapped.
            epoch = connection.call(pb.LeaseCall(match=pb.MatchRequest()), self.timeout_s).match.boot_epoch
        except (OSError, UseStream, KvstoreError) as error:
            self._not_before = time.monotonic() + RETRY_S
            raise UseStream(str(error)) from None
        if epoch != self._epoch:
            for other in self._connections:
                other.close()
            self._connections, self._segments, self._epoch = [], Segments(), epoch
        connection.segments = self._segments
        connection.lock.acquire()
        self._connections.append(connection)
        return connection

    def ask(self, call: pb.LeaseCall) -> pb.LeaseReply:
        """One small call and its answer."""
        with self.connection() as connection:
            return connection.call(call, self.timeout_s)

    def owner_of(self, address: int, nbytes: int) -> tuple[Connection, int, int] | None:
        """Whose ingest segment holds these bytes: (connection, segment, start). None: nobody's that is open."""
        for connection in self._connections:
            for room in connection.ingest:
                start = address - room.mapping.address
                if not connection.closed and start >= 0 and start + nbytes <= room.mapping.nbytes:
                    return connection, room.number, start
        return None

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            self._closed = True
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()

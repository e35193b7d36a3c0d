"""The lease socket: tensors in shared memory for clients on this host. The proto describes the exchange.

One thread a connection: a call is answered in about 50 us, where a hop to another thread would double it. What a client
holds (leases, ingest segments) hangs on its connection and goes with it, however it ends; a lease also ends by age.
"""

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from google.protobuf.message import DecodeError

from kvstore import arrays, errors
from kvstore.arena import Arena, Place, Segment
from kvstore.errors import InvalidEntry, KvstoreError, PermissionDenied
from kvstore.hit import Hit, TensorInfo
from kvstore.keys import check_keys
from kvstore.store import Store
from kvstored.budget import Budget
from kvstored.gate import Access, Refusal, about
from kvstored.metrics import Meter
from kvstored.scope import Scopes
from kvstored.spans import Spans
from kvstored.tokens import LOCAL, Identity
from kvstored.verbs import Verbs
from kvstored.wire import Incoming, Reading, hit_header, put_ready
from kvstored_client._pb import cache_pb2 as pb

logger = logging.getLogger(__name__)

PACKET_MAX_NBYTES = 256 << 10
CONNECTIONS_MAX = 256
INGEST_MIN_NBYTES = 16 << 20
SMALL_VERBS: tuple[Literal["match", "touch", "delete", "pin"], ...] = ("match", "touch", "delete", "pin")
SEND_TIMEOUT_S = 5.0
JANITOR_INTERVAL_S = 0.5


class UseStream(Exception):
    """This call cannot be served here: the client asks again over gRPC."""


@dataclass
class Shared:
    """What every connection works on. budget: entries on their way; ingest: segments for puts, idle or not."""

    store: Store
    arena: Arena
    budget: Budget
    ingest: Budget
    verbs: Verbs
    lease_max_s: float
    meter: Meter | None = None
    scopes: Scopes | None = None
    spans: Spans = field(default_factory=Spans)
    identify: Callable[[int], Identity | None] = lambda _uid: LOCAL
    reads: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(8))
    """Gets at once, as many as the stream's: one from disk is in memory before its bytes can be counted."""
    gauges: dict[str, int] = field(default_factory=lambda: {"leases": 0, "lease_connections": 0, "leases_aged": 0})
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, change: int) -> None:
        """Move a gauge."""
        with self.lock:
            self.gauges[name] += change


class Connection:
    """One client: its leases, its ingest segments, and which segments it was handed."""

    def __init__(self, sock: socket.socket, shared: Shared) -> None:
        self._sock = sock
        self._shared = shared
        _, self.uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        identity = shared.identify(self.uid)
        if identity is None:
            raise PermissionError(f"user {self.uid} has no entry in the tokens file")
        self._identity = identity
        self._store = shared.store if shared.scopes is None else shared.scopes.of(identity)
        self._verbs = Verbs(self._store, shared.verbs.epoch)
        self._leases: dict[int, tuple[float, list[Any]]] = {}
        self._lock = threading.Lock()
        self._next = 1
        self._handed: set[int] = set()
        self._ingest: dict[int, Segment] = {}
        self._fds: list[int] = []

    def run(self) -> None:
        """Answer calls until the client is gone."""
        self._shared.count("lease_connections", 1)
        try:
            while True:
                packet = self._sock.recv(PACKET_MAX_NBYTES)
                if not packet:
                    return
                reply = self._reply(packet)
                if reply is not None:
                    self._send(reply)
        except OSError as error:
            logger.debug("lease connection ended error=%s", error)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of everything the client held."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._drop(list(self._leases))
        for segment in self._ingest.values():
            segment.close()
            self._shared.ingest.give_back(segment.nbytes)
        self._ingest.clear()
        self._shared.count("lease_connections", -1)

    def hang_up(self) -> None:
        """End the connection from outside its thread; a call under way still gets its answer."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def expire(self, now: float) -> None:
        """Drop leases over their age: a client that was stopped must not hold memory for ever."""
        with self._lock:
            old = [number for number, (until, _) in self._leases.items() if until <= now]
        if old:
            self._shared.count("leases_aged", len(old))
            self._drop(old)

    def _drop(self, numbers: list[int]) -> None:
        with self._lock:
            gone = [self._leases.pop(number, None) for number in numbers]
        self._shared.count("leases", -sum(lease is not None for lease in gone))

    def _send(self, reply: pb.LeaseReply) -> None:
        data = reply.SerializeToString()
        fds, self._fds = self._fds, []
        if len(data) > PACKET_MAX_NBYTES:
            self._drop([reply.lease])
            data = _refusal(
                "UseStream", f"a reply of {len(data)} bytes is over {PACKET_MAX_NBYTES}"
            ).SerializeToString()
        if fds:
            socket.send_fds(self._sock, [data], fds)
        else:
            self._sock.send(data)

    def _reply(self, packet: bytes) -> pb.LeaseReply | None:
        began = time.perf_counter()
        try:
            call = pb.LeaseCall.FromString(packet)
        except DecodeError as error:
            return _refusal("InvalidEntry", str(error))
        self._drop(list(call.release))
        span = self._shared.spans.begin(f"Lease/{_verb(call)}")
        reply = self._answer(call)
        code = reply.error.kind if reply is not None and reply.HasField("error") else "OK"
        if reply is not None and self._shared.meter is not None:
            self._shared.meter.end(f"Lease/{_verb(call)}", code, time.perf_counter() - began)
        if span is not None and reply is not None:  # nothing but releases is no call
            self._shared.spans.end(span, code, about(self._identity, _keys(call)))
        return reply

    def _answer(self, call: pb.LeaseCall) -> pb.LeaseReply | None:
        try:
            return self._dispatch(call)
        except UseStream as error:
            return _refusal("UseStream", str(error))
        except KvstoreError as error:
            kinds = (kind.__name__ for kind in type(error).__mro__)
            return _refusal(next(kind for kind in kinds if hasattr(errors, kind)), str(error))
        except OSError:
            raise
        except Exception:
            logger.exception("lease call failed")
            return _refusal("KvstoreError", "internal error, see the daemon's log")

    def _dispatch(self, call: pb.LeaseCall) -> pb.LeaseReply | None:
        verb = _verb(call)
        if verb != "ingest":
            try:
                Access.check(self._identity, f"Cache/{verb.capitalize()}")
            except Refusal as refusal:
                raise PermissionDenied(str(refusal)) from None
        if call.HasField("get"):
            return self._get(call.get)
        if call.HasField("put"):
            return pb.LeaseReply(put=self._put(call.put))
        for name in SMALL_VERBS:
            if call.HasField(name):
                return pb.LeaseReply(**{name: getattr(self._verbs, name)(getattr(call, name))})
        if call.ingest_nbytes:
            return self._open_ingest(call.ingest_nbytes)
        return None if call.release else _refusal("InvalidEntry", "an empty call")

    def _get(self, asked: pb.GetRequest) -> pb.LeaseReply:
        shared = self._shared
        reply = pb.LeaseReply(boot_epoch=shared.verbs.epoch, lease_max_s=shared.lease_max_s)
        held: list[Any] = []
        # What must be decoded is decoded into this user's own segments: that is where it will be read.
        room = partial(shared.arena.empty, owner=self.uid)
        reading = Reading(self._store, shared.budget, check_keys(asked.keys), leading=asked.leading, room=room)
        try:
            while lot := self._next_lot(reading):
                for index, hit in lot:
                    if hit is not None:
                        tensors, place = self._placed(hit)
                        held.append(tensors)
                        self._hand(reply, place.segment)
                        reply.leased.add(
                            header=hit_header(index, hit),
                            segment=place.segment.number,
                            start=place.start,
                            generation=place.generation,
                        )
        finally:
            reading.close()
        if held:
            with self._lock:
                reply.lease = self._next
                self._next += 1
                self._leases[reply.lease] = (time.monotonic() + shared.lease_max_s, held)
            shared.count("leases", 1)
        return reply

    def _next_lot(self, reading: Reading) -> list[tuple[int, Hit | None]]:
        with self._shared.reads:
            return reading.next_lot()

    def _placed(self, hit: Hit) -> tuple[Mapping[str, Any], Place]:
        """The hit's tensors where this client may read them: as they are, or copied to a segment of his user's."""
        arena = self._shared.arena
        place = arena.place_of(hit.tensors, self.uid)
        if place is not None:
            return hit.tensors, place
        room = arena.empty({name: arrays.describe(name, x) for name, x in hit.tensors.items()}, self.uid)
        place = None if room is None else arena.place_of(room, self.uid)
        if room is None or place is None:
            raise UseStream("no room in shared memory, or nothing to share")
        for name, x in hit.tensors.items():
            room[name].copy_(x)
        return room, place

    def _hand(self, reply: pb.LeaseReply, segment: Segment, *, writable: bool = False) -> None:
        if segment.number in self._handed:
            return
        self._handed.add(segment.number)
        reply.segments.add(number=segment.number, nbytes=segment.nbytes, writable=writable)
        self._fds.append(segment.fd)

    def _open_ingest(self, nbytes: int) -> pb.LeaseReply:
        size = -(-max(nbytes, INGEST_MIN_NBYTES) // (1 << 20)) * (1 << 20)
        try:
            self._shared.ingest.take(size)
        except KvstoreError as error:
            raise UseStream(str(error)) from None
        # Numbered apart from the arena's: those count up from 1.
        segment = Segment((1 << 31) + len(self._ingest), self.uid, size, readers_only=False)
        self._ingest[segment.number] = segment
        reply = pb.LeaseReply()
        self._hand(reply, segment, writable=True)
        return reply

    def _put(self, asked: pb.LeasePut) -> pb.PutReply:
        shared = self._shared
        ready: list[Incoming] = []
        taken = 0
        try:
            for item in asked.entries:
                entry = Incoming(item.header, shared.store.config.entry_max_nbytes)
                shared.budget.take(entry.nbytes)
                taken += entry.nbytes
                self._ingested(entry, item.places)
                ready.append(entry)
            return pb.PutReply(stored=put_ready(self._store, ready), boot_epoch=shared.verbs.epoch)
        finally:
            shared.budget.give_back(taken)

    def _ingested(self, entry: Incoming, places: Any) -> None:
        """Copy an entry out of the client's ingest segments. He may still write there: the copy is what counts."""
        if len(places) != len(entry.specs):
            raise InvalidEntry(f"{len(entry.specs)} tensors in {len(places)} places")
        sources = [self._source(spec, place) for spec, place in zip(entry.specs.values(), places, strict=True)]
        entry.begin(partial(self._shared.arena.empty, owner=self.uid))
        for target, source in zip(entry.tensors.values(), sources, strict=True):
            if source is not None:
                target.reshape(-1).view(torch.uint8).copy_(source)

    def _source(self, spec: TensorInfo, place: pb.TensorPlace) -> torch.Tensor | None:
        nbytes = arrays.check_specs({"x": spec})
        if not nbytes:
            return None
        segment = self._ingest.get(place.segment)
        if segment is None or place.start + nbytes > segment.nbytes:
            raise InvalidEntry(
                f"bytes {place.start} to {place.start + nbytes} are in no ingest segment {place.segment}"
            )
        return torch.from_numpy(segment.bytes[place.start : place.start + nbytes])


def _verb(call: pb.LeaseCall) -> str:
    return next((name for name in ("get", "put", *SMALL_VERBS) if call.HasField(name)), "ingest")


def _keys(call: pb.LeaseCall) -> list[bytes]:
    if call.HasField("put"):
        return [entry.header.key for entry in call.put.entries]
    verb = _verb(call)
    return [] if verb == "ingest" else list(getattr(call, verb).keys)


def _refusal(kind: str, message: str) -> pb.LeaseReply:
    return pb.LeaseReply(error=pb.LeaseError(kind=kind, message=message))


class LeaseServer:
    """Listens beside a unix socket. start and stop from one thread."""

    def __init__(self, path: Path, shared: Shared) -> None:
        self._path = path
        self._shared = shared
        self._connections: set[Connection] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def start(self) -> None:
        """Bind and listen. The caller sets the umask."""
        with suppress(FileNotFoundError):
            self._path.unlink()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._sock.bind(str(self._path))
        self._sock.listen(64)
        for work in (self._accept, self._watch_ages):
            self._threads.append(threading.Thread(target=work, name=f"kvstored-lease{work.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Hang up on everybody; calls under way end first."""
        self._stopping.set()
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        with self._lock:
            connections, threads = list(self._connections), list(self._threads)
        for connection in connections:
            connection.hang_up()
        for thread in threads:
            thread.join(SEND_TIMEOUT_S)
        with suppress(FileNotFoundError):
            self._path.unlink()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            with self._lock:
                if len(self._connections) >= CONNECTIONS_MAX:
                    sock.close()  # the client uses the stream
                    continue
                # For sending only: a stopped client must not hold this thread, an idle one may stay.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SEND_TIMEOUT_S), 0))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_MAX_NBYTES)
                try:
                    connection = Connection(sock, self._shared)
                except PermissionError:
                    sock.close()  # the client uses the stream, where it can show a token
                    continue
                self._connections.add(connection)
                thread = threading.Thread(target=self._run, args=(connection,), name="kvstored-lease", daemon=True)
                self._threads = [t for t in self._threads if t.is_alive()]
                self._threads.append(thread)
                thread.start()

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _watch_ages(self) -> None:
        while not self._stopping.wait(JANITOR_INTERVAL_S):
            with self._lock:
                connections = list(self._connections)
            for connection in connections:
                connection.expire(time.monotonic())

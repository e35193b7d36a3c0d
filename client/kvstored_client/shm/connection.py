"""One lease socket: a call, its answer, and what is held of the daemon's and lent to it.

Whoever uses a connection may be interrupted between any two instructions (see `interrupts`). So it says of itself
whether it is `settled`: no answer is due, and no lease is without an owner. One that is not serves no other call: it is
abandoned, and the daemon frees what it held. As a second guard a call carries a number that its answer repeats. One
thread uses a connection at a time; finalizers run in any thread at any instant and only append.
"""

import _thread
import array
import os
import select
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from google.protobuf.message import DecodeError

from kvstore import errors
from kvstore.errors import KvstoreError
from kvstored_client.interrupts import close_all, close_first, damage, is_foreign
from kvstored_client.shm.ingest import Ended, IngestSegment, Mark, Room
from kvstored_client.shm.mapping import MappedSegment
from kvstored_client.shm.segments import Segments, UseStream
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import fixed64s
from kvstored_client.wire.trust import Place

PACKET_MAX_NBYTES = 256 << 10
KEYS_PER_PACKET = 512
RELEASE_WITHIN_S = 0.01
"""A lease ends with the next call on its connection or this much later."""
RELEASES_MAX = 1024
_NUMBER = struct.Struct("<BQ")
HEAD_NBYTES = _NUMBER.size + 8 * RELEASES_MAX + 8
"""What a number and releases add to a call, at most."""
_NUMBER_TAG = 9 << 3 | 1  # LeaseCall's fields
_RELEASE = 1
LOOK_S = 0.0001 if (os.cpu_count() or 1) > 1 else 0.0
"""How long to look for an answer before sleeping on it: a hot one comes by then, and waking an idle core takes as long
again. Not with sched_yield: on a busy machine it costs a whole slice."""
INGEST_MAX_NBYTES = 256 << 20
"""Shared memory of one connection for puts. A larger batch goes in several commits, a larger entry over the stream."""
INGEST_TWICE_NBYTES = 128 << 20
"""With so much of it a put waits until the daemon has copied the last one, rather than that more is asked for."""
_FDS_MAX = 64
"""Descriptors in one packet, as the daemon hands them over; of more the kernel would drop the rest."""
ASK_AGAIN_MAX = 64
"""Packets that may bring segments before one answers: 4,096 segments are 512 GiB of hot."""
_ANCILLARY = (socket.CMSG_SPACE(4 * _FDS_MAX),)
_AT_ONCE = (socket.MSG_DONTWAIT,)
GREETING = pb.LeaseCall(match=pb.MatchRequest())
"""What a connection asks first: its answer has the daemon's boot epoch."""
_CUT_OFF = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)  # an enum would take a microsecond to be compared with


class MoreSegments(UseStream):
    """The daemon handed over a part of the segments that its answer needs: ask again."""


class Silent(Exception):
    """The daemon took the call and did not answer in time."""


class _Turn:
    """A connection's place in the queue of those that have releases to send."""

    __slots__ = ("__weakref__", "connection")

    def __init__(self, connection: "Connection") -> None:
        self.connection = connection


def _nobody() -> None:
    """What a weak reference to nothing answers."""


class Releases:
    """Sends the releases that no call took along: a packet of their own each would cost a get half as much again."""

    def __init__(self) -> None:
        # Of all queues the one that a finalizer may put into, whatever it interrupts.
        self._queue: SimpleQueue[object] = SimpleQueue()
        self._running: Any = _nobody

    def wake(self, connection: "Connection") -> "weakref.ref[_Turn]":
        """This connection has releases to send, unless a call does it first. Its turn: gone once they are sent."""
        turn = _Turn(connection)
        self._queue.put(turn)
        self.start()
        return weakref.ref(turn)

    def start(self) -> None:
        """Start the thread, unless it runs; one that an exception from another thread has ended is replaced."""
        if self._running() is None:
            mark = Mark()
            self._running = weakref.ref(mark)
            with suppress(RuntimeError):  # at the process's end, or out of threads: the next call takes them along
                _thread.start_new_thread(_send_releases, (self._queue, weakref.ref(self, self._queue.put), mark))


def _send_releases(queue: "SimpleQueue[object]", _end: object, _mark: Mark) -> None:
    """Until something that is no turn comes: `_end`, with the last reference to the Releases."""
    while isinstance(turn := queue.get(), _Turn):
        time.sleep(RELEASE_WITHIN_S)
        connection = turn.connection
        del turn  # before the releases are taken: one that comes now is either taken or asks again
        connection.send_releases()
        del connection


class Connection:
    """One lease socket. settled: it may serve another call; closed: it serves no more."""

    settled = True
    closed = True
    _sock: socket.socket | None = None

    def __init__(self, releases: Releases) -> None:
        self._releases = releases
        self._turn: Any = _nobody
        self._given_back: deque[int] = deque()
        self._ended: deque[Ended] = deque()
        self._held: dict[int, Ended] = {}
        self.segments = Segments(0)
        self.ingest: list[IngestSegment] = []
        self.uncopied: Room | None = None
        """What the last put filled: the daemon may be copying it until it answers the next call."""
        self._spare: Room | None = None
        """What the put before filled: the next one of that size need not look for room."""
        self._poll = select.poll()
        self._number = 0
        self._numbered = False
        self._buffers = ([memoryview(bytearray(PACKET_MAX_NBYTES))],)
        self._packets: list[tuple[int, list[tuple[int, int, bytes]], int, Any]] = []
        """The packet that was received last. It holds descriptors, so C code puts it here: an interrupt between
        receiving it and keeping it would lose them."""
        self._descriptors: deque[int] | None = None

    def open(self, path: Path, timeout_s: float) -> int:
        """Connect and make sure that the daemon answers. Returns its boot epoch. Raises OSError and as `call`.

        It is settled once the thread that opened it has entered it where it will be found again.
        """
        sock, place = self._prepare(path, timeout_s)
        sock.connect(str(path))
        self._connected(place)
        return self._greeted(self.call(GREETING, timeout_s))

    def _prepare(self, path: Path, timeout_s: float) -> tuple[socket.socket, Place]:
        """A socket to connect, and whom it may meet there."""
        self._releases.start()
        sock = self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_MAX_NBYTES)
        # For sending, which waits only where the daemon leaves packets lying: releases, while it is stopped.
        spec = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6) or 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, spec)
        return sock, Place(path)

    def _connected(self, place: Place) -> None:
        sock = self._sock
        assert sock is not None
        place.check(sock)  # before anything is sent or mapped
        self._receive_into = sock.recvmsg_into
        self._poll.register(sock, select.POLLIN)
        self.closed = False

    def _greeted(self, reply: pb.LeaseReply) -> int:
        """The boot epoch in the first answer."""
        self._numbered = reply.number != 0
        return reply.match.boot_epoch

    def call(self, call: pb.LeaseCall, timeout_s: float) -> pb.LeaseReply:
        """Ask and wait; as `exchange`."""
        return self.exchange(call.SerializeToString(), timeout_s)

    def exchange(self, data: bytes, timeout_s: float) -> pb.LeaseReply:
        """Send the bytes of a LeaseCall and wait for the answer. Raises UseStream, Silent, or the daemon's own error.

        With an answer the connection is not settled yet: its lease needs an owner, see `give_back` and `hold`.
        """
        for _ in range(ASK_AGAIN_MAX):
            try:
                return self._exchange(data, timeout_s)
            except MoreSegments:
                continue
        raise UseStream(f"{ASK_AGAIN_MAX} packets brought segments and no answer")

    def _exchange(self, data: bytes, timeout_s: float) -> pb.LeaseReply:
        """One packet there, one back. Raises MoreSegments, and as `exchange`."""
        packet, number = self._packet(data)
        try:
            self._sock.send(packet)  # type: ignore[union-attr]  # `_packet` raises without one
            self._receive(timeout_s)
        except OSError as error:
            self.abandon()
            if is_foreign(error):
                raise
            if isinstance(error, BlockingIOError):
                raise Silent(f"no answer within {timeout_s} s") from None
            raise UseStream(str(error)) from None
        return self._read(number)

    def _packet(self, data: bytes) -> tuple[bytes, int]:
        """The packet of a call, and its number. From now on an answer is due. Raises UseStream after the end."""
        if self._sock is None or self.closed:
            raise UseStream("the connection ended")
        if len(data) > PACKET_MAX_NBYTES - HEAD_NBYTES:
            raise UseStream(f"a call of {len(data)} bytes")
        self.settled = False
        number = self._number = self._number + 1
        head = _NUMBER.pack(_NUMBER_TAG, number)
        if self._given_back or self._ended:
            head += fixed64s(_RELEASE, self._take_releases())
        return head + data, number

    def _receive(self, timeout_s: float) -> None:
        """Put the next packet into `_packets`."""
        poll, clock = self._poll.poll, time.perf_counter
        until = clock() + LOOK_S
        if until > self.segments.look_at:
            self.segments.look(until)
        # Looked for by poll, not by receiving what is not there: an exception each time took longer than the look.
        while not poll(0):
            if clock() >= until:
                # Not a time limit of the socket's: each signal, of a profiler's timer for one, would start it anew.
                if not poll(timeout_s * 1e3):
                    self.abandon()
                    raise Silent(f"no answer within {timeout_s} s")
                break
        self._take_packet()

    def _take_packet(self) -> None:
        self._packets.extend(map(self._receive_into, self._buffers, _ANCILLARY, _AT_ONCE))

    def _read(self, number: int) -> pb.LeaseReply:
        """The answer to call `number` out of the packet received."""
        nbytes, ancillary, flags, _ = self._packets[0]
        if not nbytes or flags & _CUT_OFF:
            self.abandon()
            raise UseStream("an answer was cut off" if nbytes else "the daemon hung up")
        try:
            reply = pb.LeaseReply.FromString(self._buffers[0][0][:nbytes].tobytes())
        except DecodeError as error:
            self.abandon()
            raise UseStream(str(error)) from None
        if reply.number != number and (reply.number or self._numbered):
            self.abandon()
            raise UseStream(f"the answer to call {reply.number} came to call {number}")
        if ancillary or reply.segments:
            self._map(reply)
        self._packets.clear()
        self._descriptors = None
        if self.uncopied is not None:
            self._spare, self.uncopied = self.uncopied, None
        if reply.HasField("error"):
            self.settled = True
            if reply.segments and reply.error.kind == "UseStream":
                raise MoreSegments(reply.error.message)
            raise _error_of(reply.error)
        return reply

    def _map(self, reply: pb.LeaseReply) -> None:
        """Map the segments whose descriptors came with the packet. Any other number of them is a broken connection."""
        descriptors = self._take_descriptors()
        if len(descriptors) != sum(2 if segment.device else 1 for segment in reply.segments):
            found = len(descriptors)
            self.abandon()
            raise UseStream(f"{found} descriptors came with {len(reply.segments)} segments")
        try:
            for segment in reply.segments:
                mapping = None
                if segment.device:
                    self.segments.add_device(segment, descriptors[0], descriptors[1])
                    close_first(descriptors)
                    close_first(descriptors)
                    continue
                if segment.writable or segment.number not in self.segments:
                    mapping = MappedSegment(descriptors[0], segment.nbytes, writable=segment.writable)
                close_first(descriptors)
                if mapping is None:
                    continue
                if segment.writable:
                    self.ingest.append(IngestSegment(segment.number, mapping))
                else:
                    self.segments.add(segment.number, mapping)
        except Exception as error:
            self.abandon()
            damaged = damage(error, "a segment")
            if damaged is error:
                raise
            raise UseStream(str(damaged)) from None
        close_all(descriptors)

    def _take_descriptors(self) -> deque[int]:
        """Those of the packet in `_packets` that are not closed yet."""
        if self._descriptors is None:
            found = array.array("i")
            for _, ancillary, _, _ in self._packets:
                for level, kind, data in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        found.frombytes(data[: len(data) // found.itemsize * found.itemsize])
            self._descriptors = deque(found)
        return self._descriptors

    def spare_room(self, nbytes: int) -> Room | None:
        """Room that a put before has left, if this one needs at least half of it. It is let go of otherwise."""
        spare, self._spare = self._spare, None
        return spare if spare is not None and spare.data.size // 2 <= nbytes <= spare.data.size else None

    def room(self, nbytes: int, timeout_s: float) -> Room:
        """Bytes in an ingest segment, at least so many. Raises UseStream, and as `call`."""
        spare = self.spare_room(nbytes)
        if spare is not None:
            return spare
        plan = self.find_room(nbytes)
        try:
            asked = next(plan)
            while True:
                try:
                    self.call(asked, timeout_s)
                except UseStream as error:
                    asked = plan.throw(error)
                else:
                    asked = next(plan)
        except StopIteration as found:
            return found.value  # type: ignore[no-any-return]

    def find_room(self, nbytes: int) -> Generator[pb.LeaseCall, None, Room]:
        """The calls that `room` makes, one after the other; a UseStream that one of them raised is thrown in."""
        found = self._room_there(nbytes)
        if found is None and self.uncopied is not None and self._ingest_nbytes >= INGEST_TWICE_NBYTES:
            yield GREETING  # with its answer the last put is copied
            found = self._room_there(nbytes)
        if found is not None:
            return found
        if self._ingest_nbytes + nbytes > INGEST_MAX_NBYTES:
            self.settled = True
            raise UseStream(f"{nbytes} bytes beside {self._ingest_nbytes} of {INGEST_MAX_NBYTES} in ingest segments")
        try:
            yield pb.LeaseCall(ingest_nbytes=nbytes)
        except UseStream:
            # The daemon lends no more. It has answered, though: what the last put took is free.
            found = None if self.closed else self._room_there(nbytes)
            if found is None:
                raise
            self.settled = False
            return found
        self._spare = None
        found = self.ingest[-1].take(nbytes) if self.ingest else None
        if found is None:
            raise UseStream("an ingest segment smaller than asked for")
        return found

    def _room_there(self, nbytes: int) -> Room | None:
        self._spare = None
        for segment in self.ingest:
            found = segment.take(nbytes)
            if found is not None:
                return found
        return None

    @property
    def _ingest_nbytes(self) -> int:
        return sum(segment.mapping.nbytes for segment in self.ingest)

    def ingest_at(self, address: int, nbytes: int) -> tuple[int, int] | None:
        """(segment, start) of these bytes in an ingest segment of this connection's; None: they lie in none."""
        for segment in self.ingest:
            start = address - segment.mapping.address
            if start >= 0 and start + nbytes <= segment.mapping.nbytes:
                return segment.number, start
        return None

    def give_back(self, lease: int) -> None:
        """End the lease of the last answer: with the next call, or in a moment."""
        if lease:
            self._given_back.append(lease)
            self.wake()
        self.settled = True

    def hold(self, owner: object, lease: int) -> None:
        """End the lease of the last answer once `owner` is gone; it is to call `wake`."""
        if lease:
            held = Ended(owner, self._ended.append)
            held.number = lease
            self._held[lease] = held
        self.settled = True

    def wake(self) -> None:
        """See to it that releases are sent if no call takes them along. Takes no lock: finalizers call it."""
        if self._turn() is None:
            self._turn = self._releases.wake(self)

    def send_releases(self) -> None:
        """Give back what no call has taken along. Needs no answer: a packet is sent whole."""
        sock = self._sock
        if sock is None or not (numbers := self._take_releases()):
            return
        try:
            sock.send(fixed64s(_RELEASE, numbers))
        except OSError:
            self.closed = True  # and abandoned by who uses it next

    def _take_releases(self) -> list[int]:
        numbers: list[int] = []
        try:
            while self._given_back and len(numbers) < RELEASES_MAX:
                numbers.append(self._given_back.popleft())
            while self._ended and len(numbers) < RELEASES_MAX:
                number = self._ended.popleft().number
                self._held.pop(number, None)
                numbers.append(number)
        except IndexError as error:
            if is_foreign(error):
                raise  # else a call and the thread took at once
        return numbers

    def abandon(self) -> None:
        """Serve no other call. The socket ends now, or with the last lease: who looks at one reads what is leased."""
        self.closed = True
        self._drop_descriptors()
        if not any(held() is not None for held in list(self._held.values())):
            self.close()

    def _drop_descriptors(self) -> None:
        if self._packets:
            close_all(self._take_descriptors())

    def close(self) -> None:
        """End the socket: the daemon frees all that was held."""
        self.closed = True
        if self._sock is not None:
            self._sock.close()

    def hang_up(self) -> None:
        """End it from another thread than the one that uses it, which finds that the daemon hung up."""
        if self._sock is not None:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        if self._sock is not None:
            self._drop_descriptors()
            self._sock.close()


def _error_of(error: pb.LeaseError) -> Exception:
    kind = getattr(errors, error.kind, None)
    if isinstance(kind, type) and issubclass(kind, KvstoreError):
        return kind(error.message)
    return UseStream(error.message)

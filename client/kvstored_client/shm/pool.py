"""The same host: calls over the lease socket, tensors through shared memory. The proto describes the exchange.

A pool keeps a few connections; each serves one call at a time and has its own ingest segments. Whatever goes wrong with
a connection closes it; the call then goes over the stream, unless the daemon was silent too long already. Thread-safe,
without a lock: a connection moves from the idle ones into its caller's hand and back, each time in one step of C code.
"""

import time
import weakref
from collections import deque
from itertools import compress
from operator import not_
from pathlib import Path
from queue import Empty, SimpleQueue

from kvstore.errors import KvstoreError
from kvstored_client.device import Transfers
from kvstored_client.interrupts import is_foreign, last_of, moved
from kvstored_client.shm.connection import Connection, Releases, Silent
from kvstored_client.shm.mapping import Copier
from kvstored_client.shm.segments import Segments, UseStream
from kvstored_client.wire._pb import cache_pb2 as pb

__all__ = ["Connection", "ConnectionPool", "Segments", "Silent", "UseStream"]

CONNECTIONS_MAX = 4
"""Calls under way at once; more wait. Two cores are busy with two copies."""
RETRY_S = 1.0
SILENT_RETRY_MAX_S = 60.0
"""A lease socket that takes connections and does not answer costs a wait each time: it is asked less and less."""
LOOK_AGAIN_S = 0.05
"""How often to look for an idle connection unasked: an interrupted thread need not have told that it left one."""


class ConnectionPool:
    """Connections to one daemon's lease socket, made as needed."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self.timeout_s = timeout_s
        self._made: list[weakref.ref[Connection]] = []
        self.transfers = Transfers(None)
        self.start_afresh()

    def start_afresh(self) -> None:
        """Forget all connections: in a forked child they are the parent's. To close a copy tells the daemon nothing."""
        for connection in self.connections():
            connection.close()
        self._made = []
        self.idle: deque[Connection] = deque()
        self._left: SimpleQueue[None] = SimpleQueue()
        self.segments = Segments(0)
        self._releases = Releases()
        self._not_before = 0.0
        self._silent_retry_s = RETRY_S
        self._closed = False
        self.copier = Copier()
        self.transfers.forget()
        self.lent = False
        """Whether `empty` ever handed out a tensor in an ingest segment."""

    def connections(self) -> list[Connection]:
        """Those that are open."""
        made = [connection for ref in self._made if (connection := ref()) is not None]
        return [connection for connection in made if not connection.closed]

    def take(self, hand: list[Connection], wanted: Connection | None = None) -> Connection:
        """A connection, moved to `hand`: the wanted one if it is idle, another idle one, a new one, or one to wait for.

        Its owner puts the hand back, whatever happens. Raises UseStream when there is none, Silent when none became
        free in time.
        """
        # The commonest case without another call: a few calls are what a get of a small entry notices.
        if wanted is None and self.idle:
            try:
                hand.extend(map(last_of, (self.idle,)))
            except IndexError as error:
                if is_foreign(error):
                    raise  # else another thread took it
            else:
                if not hand[-1].closed and hand[-1].segments is self.segments:
                    return hand[-1]
                self.put_back(hand)
        if (wanted is not None and self._take_wanted(hand, wanted)) or self._take_idle(hand):
            return hand[-1]
        return self._wait_for_one(hand)

    def ask(self, hand: list[Connection], call: pb.LeaseCall) -> pb.LeaseReply:
        """One small call and its answer. Raises as `take` and `Connection.call`."""
        connection = self.take(hand)
        reply = connection.call(call, self.timeout_s)
        connection.give_back(reply.lease)
        return reply

    def _wait_for_one(self, hand: list[Connection]) -> Connection:
        until = time.monotonic() + self.timeout_s
        while len(open_ones := self.connections()) >= CONNECTIONS_MAX:
            left = until - time.monotonic()
            if left <= 0:
                raise Silent(f"none of {len(open_ones)} connections was free within {self.timeout_s} s")
            try:
                self._left.get(timeout=min(left, LOOK_AGAIN_S))
            except Empty as error:
                if is_foreign(error):
                    raise
            if self._take_idle(hand):
                self._tell()
                return hand[-1]
        return self._connect(hand)

    def _take_idle(self, hand: list[Connection]) -> bool:
        while moved(self.idle, hand):
            if not hand[-1].closed and hand[-1].segments is self.segments:
                return True
            hand[-1].abandon()
            hand.pop()
        return False

    def _take_wanted(self, hand: list[Connection], wanted: Connection) -> bool:
        idle = self.idle
        if wanted not in idle or wanted.closed:
            return False
        try:
            hand.extend(compress((wanted,), map(not_, map(idle.remove, (wanted,)))))
        except ValueError as error:
            if is_foreign(error):
                raise
            return False  # another thread took it
        return True

    def _connect(self, hand: list[Connection]) -> Connection:
        self._check_connecting()
        hand.append(Connection(self._releases))
        connection = hand[-1]
        try:
            # Segments are numbered anew in each life of the daemon: whose they are must be known before one is mapped.
            # Half the patience: the other half is for the stream.
            epoch = connection.open(self._path, self.timeout_s / 2)
        except (Silent, OSError, UseStream, KvstoreError) as error:
            raise self._not_connected(connection, error) from None
        return self._connected(connection, epoch)

    def _check_connecting(self) -> None:
        if self._closed or time.monotonic() < self._not_before:
            raise UseStream("there was no lease socket a moment ago")

    def _not_connected(self, connection: Connection, error: Exception) -> Exception:
        """What to raise for a connection that was not made."""
        if isinstance(error, Silent):
            # Nothing was asked yet, so nothing is under way: the daemon may be well and this socket of its alone stuck.
            self._not_before = time.monotonic() + self._silent_retry_s
            self._silent_retry_s = min(2 * self._silent_retry_s, SILENT_RETRY_MAX_S)
            return UseStream(f"a fresh lease connection: {error}")
        connection.abandon()
        if isinstance(error, OSError) and is_foreign(error):
            return error
        self._not_before = time.monotonic() + RETRY_S
        return UseStream(str(error))

    def _connected(self, connection: Connection, epoch: int) -> Connection:
        """Enter a connection that was made."""
        self._silent_retry_s = RETRY_S
        segments = self.segments
        if epoch != segments.epoch:
            self.transfers.map_again()
            segments = self.segments = Segments(epoch, self.transfers)
        connection.segments = segments
        # Of two threads that connect at once one may be left out of the list: then there is one connection more.
        self._made = [*(ref for ref in self._made if ref() is not None), weakref.ref(connection)]
        connection.settled = True
        return connection

    def put_back(self, hand: list[Connection]) -> None:
        """Take back what is in a hand: to the idle ones, or, if it was left in the middle of something, abandoned.

        Again is harmless: one that was interrupted is to be called again.
        """
        while hand:
            connection = hand[-1]
            usable = connection.settled and not connection.closed and connection.segments is self.segments
            if usable and not self._closed:
                self.idle.extend(map(last_of, (hand,)))
                if self._left.empty():
                    self._tell()
            else:
                connection.abandon()
                hand.pop()

    def _tell(self) -> None:
        """Somebody who waits may look: a connection may be idle."""
        if self.idle:
            self._left.put(None)

    def owner_of(self, address: int, nbytes: int) -> tuple[Connection, int, int] | None:
        """Whose ingest segment holds these bytes: (connection, segment, start). None: nobody's that is open."""
        for connection in self.connections():
            found = connection.ingest_at(address, nbytes)
            if found is not None:
                return connection, *found
        return None

    def close(self) -> None:
        """End all connections."""
        self._closed = True
        hand: list[Connection] = []
        while moved(self.idle, hand):
            hand[-1].close()
            hand.pop()
        for connection in self.connections():
            connection.hang_up()
        self.segments.close()

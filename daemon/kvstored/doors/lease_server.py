"""The lease socket: clients of this host are accepted, a thread each, and leases end by age.

Its two threads outlive whatever happens to one client or to the process's limits: a failed turn is counted, said once,
and followed by the next one. Should the accepting thread end all the same, the socket is removed with it, so that
clients take the stream at once, and `age_s` grows, so that the watchdog is not fed.
"""

import errno
import logging
import math
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kvstored.access.refusals import Pace
from kvstored.doors.lease_connection import PACKET_MAX_NBYTES, SEND_TIMEOUT_S, Connection
from kvstored.doors.lease_shared import Shared
from kvstored_client.wire.trust import peer_uid

logger = logging.getLogger(__name__)

CONNECTIONS_MAX = 256
USER_CONNECTIONS_MAX = 192
"""Of one user: the rest is for the others."""
TURNED_AWAY_MAX = 32
"""Refused clients that are not hung up on yet."""
TURN_S = 1.0
"""The accepting thread turns at least so often, which is what the watchdog looks at."""
BACK_OFF_S = 0.05
"""After a failure: descriptors and threads come back when somebody lets go of them, not by asking faster."""
JANITOR_INTERVAL_S = 0.5
_NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE})
_BROKEN = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})
"""What only a socket that no longer listens answers."""


class LeaseServer:
    """Listens beside a unix socket. start and stop from one thread."""

    def __init__(self, path: Path, shared: Shared) -> None:
        self._path = path
        self._shared = shared
        self._connections = shared.connections
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._spare: int | None = None
        self._failing = 0
        self._pace = Pace()
        self._turned_away: deque[tuple[float, socket.socket]] = deque()
        self._turned_at = dict.fromkeys((self._accept, self._watch_ages), time.monotonic())

    def start(self) -> None:
        """Bind and listen."""
        self._listen()
        self._keep_spare()
        for turn in (self._accept, self._watch_ages):
            thread = threading.Thread(target=self._go_on, args=(turn,), name=f"kvstored-lease{turn.__name__}")
            thread.daemon = True
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Hang up on everybody; calls under way end first."""
        self._stopping.set()
        self._close_door()
        with self._lock:
            connections, threads = list(self._connections), list(self._threads)
        for connection in connections:
            connection.hang_up()
        for thread in threads:
            thread.join(SEND_TIMEOUT_S)
        self._close_turned_away(math.inf)
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def age_s(self) -> float:
        """Seconds since the slower of the two threads last turned."""
        return time.monotonic() - min(self._turned_at.values())

    def recheck(self) -> None:
        """The tokens were replaced: hang up on clients whose users are not who they were."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            if not connection.is_current():
                connection.hang_up()

    def _listen(self) -> None:
        with suppress(FileNotFoundError):
            self._path.unlink()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        # By the umask: a chmod after binding would leave it open for a moment.
        before = os.umask(0o117)
        try:
            self._sock.bind(str(self._path))
        finally:
            os.umask(before)
        self._sock.listen(64)
        self._sock.settimeout(TURN_S)

    def _close_door(self) -> None:
        """No client may wait in the queue of a socket that nobody accepts from."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        with suppress(OSError):
            self._path.unlink()

    def _go_on(self, turn: Callable[[], None]) -> None:
        """Take turns until the stop."""
        try:
            while not self._stopping.is_set():
                self._turned_at[turn] = time.monotonic()
                try:
                    turn()
                except Exception as error:  # noqa: BLE001 - the boundary of the thread: the next turn is as good
                    self._failed(error)
                else:
                    self._worked(turn)
        finally:
            if turn == self._accept:
                self._close_door()

    def _failed(self, error: Exception) -> None:
        if self._stopping.is_set():
            return
        self._shared.accept_failures += 1
        self._failing += 1
        if self._failing == 1:
            logger.error("lease event=failing error=%s effect=%s", error, "clients use the stream until it is over")
        number = error.errno if isinstance(error, OSError) else None
        if number in _NO_DESCRIPTOR:
            self._turn_one_away()
        elif number in _BROKEN:
            self._close_door()
            with suppress(OSError):  # the next turn fails, and tries again
                self._listen()
        self._stopping.wait(BACK_OFF_S)

    def _worked(self, turn: Callable[[], None]) -> None:
        if self._failing and turn == self._accept:
            logger.warning("lease event=over failures=%d", self._failing)
            self._failing = 0

    def _keep_spare(self) -> None:
        if self._spare is None:
            with suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _turn_one_away(self) -> None:
        """Hang up on the client that waits longest, so that it uses the stream now and not after its patience.

        Accepting it takes a descriptor, the spare one.
        """
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        with suppress(OSError):
            self._sock.settimeout(0)  # only one that waits already
            self._sock.accept()[0].close()
        with suppress(OSError):
            self._sock.settimeout(TURN_S)
        self._keep_spare()

    def _accept(self) -> None:
        self._keep_spare()
        try:
            sock, _ = self._sock.accept()
        except (TimeoutError, ConnectionAbortedError):
            return
        try:
            refused = self._serve(sock)
        except BaseException:
            sock.close()
            raise
        if refused:
            self._shared.refused[refused] += 1
            self._turn_away(sock)

    def _turn_away(self, sock: socket.socket) -> None:
        """Hang up: the client uses the stream, where it can show a token. Who comes again and again has to wait for it.

        It holds one descriptor meanwhile, and would come again at once.
        """
        delay_s = self._pace.delay_s(str(peer_uid(sock)))
        if delay_s:
            self._turned_away.append((time.monotonic() + delay_s, sock))
        else:
            sock.close()
        if len(self._turned_away) > TURNED_AWAY_MAX:
            self._turned_away.popleft()[1].close()

    def _close_turned_away(self, until: float) -> None:
        with suppress(IndexError):  # two threads take from it
            while self._turned_away[0][0] <= until:
                self._turned_away.popleft()[1].close()

    def _serve(self, sock: socket.socket) -> str:
        """Give a client its thread. Else why not: there are too many, or it is nobody that this socket serves."""
        with self._lock:
            if len(self._connections) >= CONNECTIONS_MAX:
                return "full"
            # For sending only: a stopped client must not hold this thread, an idle one may stay.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SEND_TIMEOUT_S), 0))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_MAX_NBYTES)
            try:
                connection = Connection(sock, self._shared)
            except PermissionError:
                self._shared.access.refuse_user(peer_uid(sock))
                return "no_entry"
            if sum(other.uid == connection.uid for other in self._connections) >= USER_CONNECTIONS_MAX:
                return "full"
            thread = threading.Thread(target=self._run, args=(connection,), name="kvstored-lease", daemon=True)
            self._connections.add(connection)
            try:
                thread.start()
            except BaseException:  # no more threads
                self._connections.discard(connection)
                raise
            self._threads = [t for t in self._threads if t.is_alive()]
            self._threads.append(thread)
        return ""

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _watch_ages(self) -> None:
        if self._stopping.wait(JANITOR_INTERVAL_S):
            return
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.expire(time.monotonic())
        self._close_turned_away(time.monotonic())

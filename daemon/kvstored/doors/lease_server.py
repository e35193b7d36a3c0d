"""The lease socket: clients of this host are accepted, a thread each, and leases end by age."""

import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

from kvstored.doors.lease_connection import PACKET_MAX_NBYTES, SEND_TIMEOUT_S, Connection, Shared

CONNECTIONS_MAX = 256


JANITOR_INTERVAL_S = 0.5


class LeaseServer:
    """Listens beside a unix socket. start and stop from one thread."""

    def __init__(self, path: Path, shared: Shared) -> None:
        self._path = path
        self._shared = shared
        self._connections = shared.connections
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

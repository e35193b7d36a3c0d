"""Servers that answer as a test says: one thread each, that ends with the test."""

import socket
import threading
from contextlib import suppress

from kvstore.shared.addresses import Address
from kvstore.shared.nodes import SLOTS, Shard, Topology


def words_of(buffer):
    """The first whole command of what has come, and the rest; None: it is not whole."""
    if b"\r\n" not in buffer:
        return None
    line, rest = buffer.split(b"\r\n", 1)
    words = []
    for _ in range(int(line[1:])):
        if b"\r\n" not in rest:
            return None
        line, rest = rest.split(b"\r\n", 1)
        size = int(line[1:])
        if len(rest) < size + 2:
            return None
        words.append(rest[:size])
        rest = rest[size + 2 :]
    return words, rest


def bulk(value):
    return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)


class Scripted:
    """answer(words, connection) gives the bytes that follow a command; None ends the connection after what came before.

    PING and READONLY it answers itself. asked: the commands, with the number of their connection.
    """

    def __init__(self, answer):
        self.answer = answer
        self.asked = []
        self.connections = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = Address(*self._server.getsockname())
        self._open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection, self.connections), daemon=True).start()

    def _serve(self, connection, number):
        buffer = b""
        try:
            while got := connection.recv(1 << 16):
                buffer += got
                while (found := words_of(buffer)) is not None:
                    words, buffer = found
                    if words[0] == b"PING":
                        out = bulk(words[1])
                    elif words[0] in (b"READONLY", b"ASKING"):
                        self.asked.append((number, words))
                        out = b"+OK\r\n"
                    else:
                        self.asked.append((number, words))
                        out = self.answer(words, number)
                    if out is None:
                        connection.close()
                        return
                    connection.sendall(out)
        except OSError:
            return

    def close(self):
        with suppress(OSError):  # closed before
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in self._open:
            connection.close()


def one_shard(primary, *replicas, cluster=True):
    """All slots at one server."""
    return Topology((Shard(0, SLOTS - 1, primary, replicas),), cluster)

"""What a message costs here whatever is sent in it, and a raw data port as it might stand beside gRPC.

Nothing of kvstored is in these but the shapes of its exchanges: they are the floors that its rows are read against.
"""

import multiprocessing
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2

_HEAD = struct.Struct("<QQ")
"""A request: index of the payload, unused. A reply: its bytes, unused; then the payload."""


@contextmanager
def data_port(values: list[np.ndarray]) -> Iterator[Callable[[int, np.ndarray], None]]:
    """A server process that sends payloads over plain TCP out of its memory. Yields get(index, out)."""
    context = multiprocessing.get_context("fork")
    listening = socket.create_server(("127.0.0.1", 0))
    process = context.Process(target=_serve, args=(listening, values), daemon=True)
    process.start()
    sock = socket.create_connection(listening.getsockname())
    listening.close()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = memoryview(bytearray(_HEAD.size))

    def get(index: int, out: np.ndarray) -> None:
        sock.sendall(_HEAD.pack(index, 0))
        _fill(sock, head)
        nbytes, _ = _HEAD.unpack(head)
        _fill(sock, memoryview(out).cast("B")[:nbytes])

    try:
        yield get
    finally:
        sock.close()
        process.join(10)


def _fill(sock: socket.socket, target: memoryview) -> None:
    at = 0
    while at < len(target):
        at += sock.recv_into(target[at:]) or _ended()


def _ended() -> int:
    raise EOFError("the data port hung up")


def _serve(listening: socket.socket, values: list[np.ndarray]) -> None:
    sock, _ = listening.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    views = [memoryview(value).cast("B") for value in values]
    while len(asked := sock.recv(_HEAD.size, socket.MSG_WAITALL)) == _HEAD.size:
        view = views[_HEAD.unpack(asked)[0]]
        sent = sock.sendmsg([_HEAD.pack(len(view), 0), view]) - _HEAD.size
        sock.sendall(view[sent:])
    os._exit(0)


@contextmanager
def empty_packet() -> Iterator[Callable[[], object]]:
    """A packet to another process and one back over SOCK_SEQPACKET, nothing done with either."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        while packet := theirs.recv(4096):
            theirs.send(packet)
        os._exit(0)
    theirs.close()

    def exchange() -> object:
        ours.send(bytes(64))
        return ours.recv(4096)

    try:
        yield exchange
    finally:
        ours.close()
        os.waitpid(pid, 0)


def empty_call(address: str) -> Callable[[], object]:
    """An empty unary call of gRPC: the daemon's health check, which passes neither interceptor nor store."""
    channel = grpc.insecure_channel(address.removeprefix("tcp:"))
    check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
    request = health_pb2.HealthCheckRequest().SerializeToString()
    return lambda: check(request)

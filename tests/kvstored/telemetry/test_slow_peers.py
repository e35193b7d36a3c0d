"""The metrics port answers while others hold connections to it: none outlives its time, and none is in the way."""

import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry

from kvstored.telemetry import metrics_port
from kvstored.telemetry.metrics_port import CONNECTIONS_MAX, MetricsPort


@pytest.fixture
def port() -> Iterator[int]:
    server = MetricsPort("127.0.0.1:0", CollectorRegistry(), dict)
    yield server.port
    server.close()


def healthy(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as reply:
        return bool(reply.read() == b"ok\n")


def test_a_scrape_is_answered_while_more_connections_than_there_are_slots_send_nothing(port: int) -> None:
    with ExitStack() as stack:
        for _ in range(3 * CONNECTIONS_MAX):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            peer.send(b"GET / HT")
        assert all(healthy(port) for _ in range(5))


def test_a_request_that_comes_byte_by_byte_ends_with_its_time(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as peer:
        peer.send(b"GET / HTTP/1.1\r\nX: ")
        assert healthy(port), "so the connection before is accepted"
        monkeypatch.setattr(metrics_port.time, "monotonic", lambda: now + 60.0)
        ended = b"?"
        while ended == b"?":
            try:
                peer.send(b"x")  # never silent for as long as the limit of one wait
                peer.settimeout(0.05)
                ended = peer.recv(1)
            except TimeoutError:
                continue
            except OSError:
                ended = b""
        assert ended == b""
        assert healthy(port)


def test_slots_are_free_again_once_their_connections_end(port: int) -> None:
    for _ in range(3 * CONNECTIONS_MAX):
        assert healthy(port)

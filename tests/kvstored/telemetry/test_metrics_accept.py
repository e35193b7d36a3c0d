"""The metrics port goes on when there was no thread or no descriptor for a connection."""

import errno
import socket
import threading
import time

import pytest
from prometheus_client import CollectorRegistry

from kvstored.telemetry import metrics_port
from kvstored.telemetry.metrics_port import CONNECTIONS_MAX, MetricsPort
from tests.conftest import free_port, wait_until
from tests.kvstored.conftest import http_get


def test_connections_without_a_thread_take_no_room_for_good(monkeypatch):
    port = free_port()
    served = MetricsPort(f"127.0.0.1:{port}", CollectorRegistry(), dict)
    real, failed = threading.Thread.start, []

    def start(thread):
        if "process_request" in thread.name and len(failed) < CONNECTIONS_MAX:
            failed.append(thread)
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    for count in range(1, CONNECTIONS_MAX + 1):
        socket.create_connection(("127.0.0.1", port)).close()
        wait_until(lambda count=count: len(failed) == count, timeout_s=30)
    assert http_get(port, "/health")[0] == 200
    served.close()


def test_out_of_descriptors_it_waits_before_it_asks_again(monkeypatch):
    server = object.__new__(metrics_port._Server)
    pauses = []

    class NoneLeft:
        def accept(self):
            raise OSError(errno.EMFILE, "none left")

    server.socket = NoneLeft()
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(OSError, match="none left"):
        server.get_request()
    assert pauses == [metrics_port.BACK_OFF_S]

"""The lease socket goes on whatever happens to the process's limits, and where it cannot, clients know at once."""

import errno
import os
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kvstored.doors import lease_server
from kvstored.doors.lease_server import LeaseServer
from kvstored.server import accepts, connections_max
from kvstored_client import Client
from kvstored_client.wire._pb import cache_pb2 as pb
from tests.conftest import wait_until
from tests.kvstored.inside import daemon_inside

X = {"x": np.arange(1000, dtype=np.float32)}


@pytest.fixture
def inside():
    with daemon_inside() as found:
        yield found


def door(inside):
    return inside.daemon._leases[0]


def lease_path(inside):
    return Path(f"{inside.socket_path}.lease")


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


class Failing:
    """A listening socket whose next accepts raise."""

    def __init__(self, sock, errors):
        self._sock = sock
        self._errors = errors

    def accept(self):
        if self._errors:
            raise self._errors.pop()
        return self._sock.accept()

    def __getattr__(self, name):
        return getattr(self._sock, name)


def connected(inside):
    return inside.store and inside.daemon._shared.gauges()["lease_connections"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EPERM, errno.EBADF])
def test_an_accept_that_fails_ends_neither_the_thread_nor_the_socket(inside, caplog, number):
    """One EMFILE ended the accepting thread for good, and every worker waited five seconds for each miss."""
    server = door(inside)
    server._sock = Failing(server._sock, [OSError(number, os.strerror(number))])
    wait_until(lambda: inside.daemon._shared.accept_failures >= 1, timeout_s=30)
    client = inside.client()
    assert client.put(b"k", X)
    wait_until(lambda: client.get(b"k") and connected(inside) == 1, timeout_s=30)
    assert np.array_equal(client.get(b"k").tensors["x"], X["x"])
    said = [record.getMessage() for record in caplog.records if "event=failing" in record.getMessage()]
    assert len(said) == 1
    assert os.strerror(number) in said[0]
    assert server.age_s() < lease_server.TURN_S * 20


def test_without_a_thread_for_a_client_it_is_hung_up_on_and_the_next_one_is_served(inside, monkeypatch):
    real, refused = threading.Thread.start, []

    def start(thread):
        if thread.name == "kvstored-lease" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(60)
        peer.connect(str(lease_path(inside)))
        assert peer.recv(100) == b""
    assert connected(inside) == 0
    client = inside.client()
    assert client.put(b"k", X)
    wait_until(lambda: client.get(b"k") and connected(inside) == 1, timeout_s=30)


def test_out_of_descriptors_a_waiting_client_is_hung_up_on_at_once(inside, tmp_path):
    server = LeaseServer(tmp_path / "door", inside.daemon._shared)  # without its threads: turn by turn
    server._listen()
    server._keep_spare()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(60)
        peer.connect(str(tmp_path / "door"))
        server._failed(OSError(errno.EMFILE, "none left"))
        assert peer.recv(100) == b""
    assert server._spare is not None
    server.stop()


def test_a_socket_that_no_longer_listens_is_made_anew(inside):
    door(inside)._sock.close()
    wait_until(lambda: inside.daemon._shared.accept_failures >= 1)

    def serves():
        client = Client(f"unix:{inside.socket_path}", framework="numpy")
        with client:
            client.put(b"k", X)
            return connected(inside) == 1

    wait_until(serves)
    assert lease_path(inside).stat().st_mode & 0o777 == 0o660


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_all_the_same_takes_its_socket_along_and_the_watchdog_is_not_fed(inside, monkeypatch):
    monkeypatch.setattr("kvstored.server.DOOR_MAX_S", 0.5)

    def ended(self):
        raise SystemExit

    server = door(inside)
    monkeypatch.setattr(LeaseServer, "_failed", lambda *_: ended(server))
    server._sock = Failing(server._sock, [OSError(errno.EMFILE, "none left")])
    wait_until(lambda: not lease_path(inside).exists(), timeout_s=30)
    wait_until(lambda: any("lease socket" in text for text in inside.daemon.closed_doors()), timeout_s=30)
    client = inside.client()
    began = time.monotonic()
    assert client.put(b"k", X)
    assert client.get(b"k") is not None
    assert time.monotonic() - began < 60 / 2, "a closed socket is known at once, not after a wait"
    assert connected(inside) == 0


def test_one_user_leaves_room_for_others_on_the_lease_socket(inside, monkeypatch):
    monkeypatch.setattr(lease_server, "USER_CONNECTIONS_MAX", 3)
    call = pb.LeaseCall(match=pb.MatchRequest()).SerializeToString()
    peers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(4)]
    answered = []
    for peer in peers:
        peer.settimeout(60)
        peer.connect(str(lease_path(inside)))
        try:
            peer.send(call)
            answered.append(bool(peer.recv(1 << 18)))
        except (BrokenPipeError, ConnectionResetError):
            answered.append(False)
    assert answered == [True, True, True, False]
    assert inside.daemon._shared.refused == {"full": 1, "no_entry": 0}
    for peer in peers:
        peer.close()


def test_the_pulse_sees_an_address_that_nobody_accepts_at(inside):
    assert inside.daemon.closed_doors() == []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{probe.getsockname()[1]}"
    assert not accepts(gone)
    inside.daemon._bound.append(gone)
    assert inside.daemon.closed_doors() == [f"nobody accepts at {gone}"]


def test_connections_are_bounded_by_the_descriptors_there_are():
    assert connections_max(1024, 1) == 256
    assert connections_max(1024, 2) == 128
    assert connections_max(65536, 2) == 1024
    assert connections_max(256, 1) == 32


def test_connections_of_strangers_beyond_the_limit_leave_the_daemon_its_descriptors(monkeypatch):
    monkeypatch.setattr("kvstored.server.raise_descriptor_limit", lambda: 512)
    with daemon_inside(tcp=True) as daemon:
        client = daemon.client()
        assert client.put(b"k", X)
        before = descriptors()
        peers = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(200)]
        ended = 0
        for peer in peers:
            peer.settimeout(1)
            try:
                while peer.recv(1000):
                    pass
                ended += 1
            except ConnectionResetError:
                ended += 1
            except TimeoutError:
                break
        assert descriptors() < before + 200 + 40
        assert client.get(b"k") is not None
        for peer in peers:
            peer.close()


def test_a_put_of_no_entries_stores_none_and_is_no_defect(inside, caplog):
    """It raised IndexError, and each such packet of anybody's wrote a traceback."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(60)
        sock.connect(str(lease_path(inside)))
        for copy_later in (False, True):
            call = pb.LeaseCall(put=pb.LeasePut(copy_later=copy_later), number=7)
            sock.send(call.SerializeToString())
            reply = pb.LeaseReply.FromString(sock.recv(1 << 16))
            assert (reply.error.kind, reply.HasField("put"), reply.put.stored, reply.number) == ("", True, 0, 7)
    assert "Traceback" not in caplog.text

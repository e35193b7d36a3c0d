"""A put is answered before its bytes are copied out of the client's segment, and no reader can tell."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvstore.errors import InvalidEntry
from kvstore.shm.layout import ALIGN
from kvstored_client import Client
from kvstored_client.shm import connection as connection_module
from kvstored_client.shm.ingest import IngestSegment
from kvstored_client.wire._pb import cache_pb2 as pb
from tests.conftest import DaemonProcess

NBYTES = 1 << 20


class Peer:
    """A client of the lease socket that writes into its segment when it likes."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(120)
        self._sock.connect(f"{daemon.socket_path}.lease")
        self._sock.send(pb.LeaseCall(ingest_nbytes=4 * NBYTES).SerializeToString())
        data, self._fds, _, _ = socket.recv_fds(self._sock, 1 << 18, 4)
        self._number = pb.LeaseReply.FromString(data).segments[0].number

    def write(self, value: int, start: int = 0) -> None:
        os.pwrite(self._fds[0], bytes([value]) * NBYTES, start)

    def put(self, *keys: bytes, parent: bytes = b"", copy_later: bool = True, read: bool = True) -> Any:
        call = pb.LeaseCall(put=pb.LeasePut(copy_later=copy_later))
        for key in keys:
            header = pb.PutHeader(key=key, nbytes=NBYTES, parent=parent)
            header.tensors.add(name="x", dtype=pb.DTYPE_UINT8, shape=[NBYTES])
            call.put.entries.add(header=header, places=[pb.TensorPlace(segment=self._number, start=0)])
        self._sock.send(call.SerializeToString())
        return self.answer() if read else None

    def answer(self) -> Any:
        return pb.LeaseReply.FromString(self._sock.recv(1 << 18))

    def ask(self) -> Any:
        self._sock.send(pb.LeaseCall(match=pb.MatchRequest()).SerializeToString())
        return self.answer()

    def close(self) -> None:
        self._sock.close()
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def peer(shared_daemon: DaemonProcess) -> Iterator[Peer]:
    peer = Peer(shared_daemon)
    yield peer
    peer.close()


def value_of(client: Client, key: bytes) -> Any:
    hit = client.get(key)
    assert hit is not None
    return hit.tensors["x"]


def test_what_is_written_after_the_next_answer_is_no_part_of_the_value(
    shared_daemon: DaemonProcess, peer: Peer
) -> None:
    near = shared_daemon.client(framework="numpy")
    for turn in range(50):
        peer.write(turn)
        assert peer.put(b"later").put.stored == 1
        peer.ask()
        peer.write(255)
        assert (value_of(near, b"later") == turn).all()


def test_without_the_promise_the_value_is_copied_when_the_put_is_answered(
    shared_daemon: DaemonProcess, peer: Peer
) -> None:
    near = shared_daemon.client(framework="numpy")
    for turn in range(50):
        peer.write(turn)
        assert peer.put(b"at once", copy_later=False).put.stored == 1
        peer.write(255)
        assert (value_of(near, b"at once") == turn).all()


@pytest.mark.parametrize("door", ["near", "far"])
def test_a_client_that_breaks_the_promise_changes_its_own_value_once_and_for_all_readers(
    shared_daemon: DaemonProcess, peer: Peer, door: str
) -> None:
    """It writes while the daemon copies. Whatever mixture was copied is the value: nobody sees it change."""
    near, far = (
        shared_daemon.client(framework="numpy", shared_memory=True),
        shared_daemon.client(framework="numpy", shared_memory=False),
    )
    first, second = (near, far) if door == "near" else (far, near)
    for _ in range(50):
        peer.write(1)
        assert peer.put(b"broken").put.stored == 1
        peer.write(2)
        seen = value_of(first, b"broken").copy()
        peer.write(3)
        assert np.array_equal(value_of(second, b"broken"), seen)
        assert near.demote(b"broken") in (0, 1)
        assert np.array_equal(value_of(first, b"broken"), seen)
        near.delete(b"broken")


def test_what_a_client_put_before_it_was_killed_is_kept(shared_daemon: DaemonProcess) -> None:
    near = shared_daemon.client(framework="numpy")
    for turn in range(20):
        peer = Peer(shared_daemon)
        peer.write(turn)
        peer.put(b"last words %d" % turn, read=False)
        peer.close()
        while near.match([b"last words %d" % turn]) == 0:
            pass
        assert (value_of(near, b"last words %d" % turn) == turn).all()


def test_a_call_refused_half_way_has_copied_what_it_stored(shared_daemon: DaemonProcess, peer: Peer) -> None:
    """The refusal ends the promise: from then on the client may write again."""
    near = shared_daemon.client(framework="numpy")
    peer.write(7)
    assert peer.put(b"orphan", parent=b"not held").put.stored == 0
    assert peer.put(b"x" * 300).error.kind == "InvalidEntry"
    assert peer.put(b"whole").put.stored == 1
    assert peer.put(b"y" * 300).error.kind == "InvalidEntry"
    peer.write(8)
    assert (value_of(near, b"whole") == 7).all()


def sent_puts(client: Client, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The LeasePuts that a client sends from now on."""
    client.put(b"a first one", {"x": np.zeros(8, np.uint8)})
    connection = client._pool.connections()[0]
    sent: list[Any] = []
    exchange = connection.exchange

    def noted(data: bytes, timeout_s: float) -> Any:
        call = pb.LeaseCall.FromString(data)
        sent.append(call.put if call.HasField("put") else None)
        return exchange(data, timeout_s)

    monkeypatch.setattr(connection, "exchange", noted)
    return sent


def test_a_client_promises_only_for_memory_that_its_caller_cannot_write_to(
    shared_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared_daemon.client(framework="numpy") as client:
        sent = sent_puts(client, monkeypatch)
        own = client.empty((NBYTES,), "uint8")
        other = np.full(NBYTES, 3, np.uint8)
        for tensors, later in (({"x": other}, True), ({"x": own}, False), ({"x": own, "y": other}, False)):
            sent.clear()
            own[:] = 5
            client.put(b"promised", tensors)
            assert [call.copy_later for call in sent if call is not None] == [later]
            own[:] = 6
            expected = 3 if tensors["x"] is other else 5
            assert (value_of(client, b"promised") == expected).all()


def test_a_client_fills_no_block_that_the_daemon_may_still_copy(
    shared_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared_daemon.client(framework="numpy") as client:
        sent = sent_puts(client, monkeypatch)
        last = None
        for turn in range(10):
            client.put(b"turn%d" % turn, {"x": np.full(NBYTES, turn, np.uint8)})
            place = sent[-1].entries[0].places[0]
            assert last is None or place.segment != last.segment or abs(place.start - last.start) >= NBYTES
            last = place
        places = {(call.entries[0].places[0].segment, call.entries[0].places[0].start) for call in sent}
        assert len(places) <= 4, "blocks are used again, two of them and where the first small put lay"
        for turn in range(10):
            assert (value_of(client, b"turn%d" % turn) == turn).all()


def test_a_put_as_large_as_all_of_a_connection_s_memory_waits_for_the_one_before(
    shared_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "INGEST_MAX_NBYTES", 17 << 20)
    monkeypatch.setattr(connection_module, "INGEST_TWICE_NBYTES", 16 << 20)
    with shared_daemon.client(framework="numpy") as client:
        sent = sent_puts(client, monkeypatch)
        for turn in range(6):
            assert client.put(b"large", {"x": np.full(12 << 20, turn, np.uint8)})
        assert sum(call is not None for call in sent) == 6, "none went over the stream"
        assert (value_of(client, b"large") == 5).all()
        client.delete(b"large")


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(start, bytes) of the rooms that were looked for in ingest segments."""
    found: list[tuple[int, int]] = []
    take = IngestSegment.take

    def noted(self: IngestSegment, nbytes: int) -> Any:
        room = take(self, nbytes)
        if room is not None:
            found.append((room.start, nbytes))
        return room

    monkeypatch.setattr(IngestSegment, "take", noted)
    return found


def test_puts_of_one_size_fill_two_rooms_in_turn(shared_daemon: DaemonProcess, rooms: list[tuple[int, int]]) -> None:
    """Two, because the daemon may still copy out of the last one."""
    with shared_daemon.client(framework="numpy") as client:
        for turn in range(40):
            assert client.put(b"turn %d" % (turn % 8), {"x": np.full(NBYTES, turn, np.uint8)})
        assert len(rooms) == len(set(rooms)) == 2
        for turn in range(32, 40):
            assert (value_of(client, b"turn %d" % (turn % 8)) == turn).all()
            client.delete(b"turn %d" % (turn % 8))


def test_room_that_a_put_needs_less_than_half_of_is_let_go(
    shared_daemon: DaemonProcess, rooms: list[tuple[int, int]]
) -> None:
    with shared_daemon.client(framework="numpy") as client:
        for nbytes in (NBYTES, NBYTES, NBYTES, NBYTES // 2, NBYTES // 8, 64, 64, 64, NBYTES):
            value = np.arange(nbytes, dtype=np.uint8)
            assert client.put(b"size", {"x": value})
            assert np.array_equal(value_of(client, b"size"), value)
        looked_for = [nbytes - ALIGN for _, nbytes in rooms]  # its generation before it
        assert looked_for == [NBYTES, NBYTES // 8, 64, NBYTES], "one each: a get's answer leaves the last one"
        assert client._pool is not None
        (connection,) = client._pool.connections()
        assert sum(segment._free.used_nbytes for segment in connection.ingest) <= 2 * NBYTES
        client.delete(b"size")


def test_room_of_a_put_that_the_daemon_refuses_is_free_again(
    shared_daemon: DaemonProcess, rooms: list[tuple[int, int]]
) -> None:
    with shared_daemon.client(framework="numpy", on_error="raise") as client:
        for _ in range(5):
            with pytest.raises(InvalidEntry, match="ttl_s"):
                client.put(b"refused", {"x": np.zeros(NBYTES, np.uint8)}, ttl_s=1e30)
        assert len({start for start, _ in rooms}) == 1
        assert client.put(b"taken", {"x": np.ones(NBYTES, np.uint8)})
        assert (value_of(client, b"taken") == 1).all()
        client.delete(b"taken")

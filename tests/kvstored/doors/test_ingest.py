"""The client's own segments, out of which the daemon copies a put: no byte outside of them is ever read."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvstored_client.wire._pb import cache_pb2 as pb
from tests.conftest import DaemonProcess

NBYTES = 5


class Peer:
    """A client of the lease socket that says what it likes. segment: its ingest segment, mapped as a file."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(120)
        self._sock.connect(f"{daemon.socket_path}.lease")
        self._sock.send(pb.LeaseCall(ingest_nbytes=1 << 20).SerializeToString())
        data, self._fds, _, _ = socket.recv_fds(self._sock, 1 << 18, 4)
        self.segment = pb.LeaseReply.FromString(data).segments[0]
        end = np.arange(self.segment.nbytes - NBYTES, self.segment.nbytes, dtype=np.uint64).astype(np.uint8)
        os.pwrite(self._fds[0], end.tobytes(), self.segment.nbytes - NBYTES)
        self.end = end

    def put(self, key: bytes, *places: tuple[int, int]) -> Any:
        """The reply to a put of tensors of NBYTES at these (segment, start)."""
        header = pb.PutHeader(key=key, nbytes=NBYTES * len(places))
        for i in range(len(places)):
            header.tensors.add(name=f"x{i}", dtype=pb.DTYPE_UINT8, shape=[NBYTES])
        at = [pb.TensorPlace(segment=segment, start=start) for segment, start in places]
        call = pb.LeaseCall(put=pb.LeasePut(entries=[pb.IngestedEntry(header=header, places=at)]))
        self._sock.send(call.SerializeToString())
        return pb.LeaseReply.FromString(self._sock.recv(1 << 18))

    def close(self) -> None:
        self._sock.close()
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def peer(shared_daemon: DaemonProcess) -> Iterator[Peer]:
    peer = Peer(shared_daemon)
    yield peer
    peer.close()


def test_a_place_that_ends_outside_its_segment_is_refused_by_its_bounds(
    shared_daemon: DaemonProcess, peer: Peer
) -> None:
    """One byte too far, all of it, and starts at which an end of 64 bits would wrap around to a small number."""
    for beyond in (1, NBYTES - 1, NBYTES, 1 << 31, (1 << 63) - 1, (1 << 64) - 1 - (16 << 20)):
        start = peer.segment.nbytes - NBYTES + beyond
        error = peer.put(b"outside", (peer.segment.number, start)).error
        assert error.kind == "InvalidEntry", hex(beyond)
        assert f"bytes {start} to {start + NBYTES}" in error.message
    assert shared_daemon.client().get(b"outside") is None


def test_a_place_that_ends_at_the_end_of_its_segment_is_taken(shared_daemon: DaemonProcess, peer: Peer) -> None:
    end = peer.segment.nbytes - NBYTES
    assert peer.put(b"at the end", (peer.segment.number, end)).put.stored == 1
    hit = shared_daemon.client(framework="numpy").get(b"at the end")
    assert np.array_equal(hit.tensors["x0"], peer.end)


def test_one_bad_place_among_good_ones_stores_nothing(shared_daemon: DaemonProcess, peer: Peer) -> None:
    number = peer.segment.number
    for bad in ((number, peer.segment.nbytes), (number + 1, 0), (1, 0), (0, 0)):
        assert peer.put(b"some", (number, 0), bad).error.kind == "InvalidEntry"
    assert shared_daemon.client().get(b"some") is None
    assert shared_daemon.client().stats().values["in_flight_nbytes"] == 0


def test_another_connections_segment_is_none_of_ours(shared_daemon: DaemonProcess, peer: Peer) -> None:
    """Two of them have the same number: each means its own, and what one wrote the other cannot put."""
    other = Peer(shared_daemon)
    try:
        assert other.segment.number == peer.segment.number
        assert peer.put(b"mine", (peer.segment.number, 0)).put.stored == 1
        hit = shared_daemon.client(framework="numpy").get(b"mine")
        assert not hit.tensors["x0"].any()
    finally:
        other.close()

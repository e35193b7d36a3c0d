"""More segments than one packet brings: all of them come, and shared memory is used."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from kvstored.doors.lease_connection import SEGMENTS_MAX
from kvstored_client.shm.connection import Connection, Releases, UseStream
from kvstored_client.wire._pb import cache_pb2 as pb
from tests.conftest import wait_until
from tests.kvstored.inside import daemon_inside

SEGMENTS = 300
NBYTES = 60_000
"""Nearly a segment: two do not fit in one."""


@pytest.fixture(scope="module")
def wide():
    """A daemon with an entry in each of 300 segments."""
    with daemon_inside(segment_nbytes=64 << 10) as found:
        client = found.client()
        for i in range(SEGMENTS):
            client.put(key(i), {"x": np.full(NBYTES, i % 251, np.uint8)}, fidelity="exact")
        assert client.get(key(SEGMENTS - 1)) is not None  # with its answer the last put is copied
        assert len(found.arena._segments) >= SEGMENTS - 1
        yield found


def key(i):
    return b"entry %d" % i


def shared_memory_only(client, monkeypatch):
    for name in ("send", "stream_out", "stream_in"):
        monkeypatch.setattr(client._transport, name, lambda *_: pytest.fail("the stream was used"))


@pytest.mark.parametrize("count", [SEGMENTS_MAX, SEGMENTS_MAX + 1, 100, SEGMENTS])
def test_a_get_and_a_lease_over_many_segments_go_through_shared_memory(wide, monkeypatch, count):
    keys = [key(i) for i in range(count)]
    client = wide.client()
    shared_memory_only(client, monkeypatch)
    for i, hit in enumerate(client.get_many(keys)):
        assert (hit.tensors["x"] == i % 251).all()
    fresh = wide.client()
    shared_memory_only(fresh, monkeypatch)
    with fresh.lease_many(keys) as hits:
        for i, hit in enumerate(hits):
            assert hit.tensors["x"][0] == i % 251
    wait_until(lambda: wide.daemon._shared.gauges()["leases"] == 0)


def test_entries_that_are_decoded_over_many_segments_come_too(wide, monkeypatch):
    client = wide.client()
    low = [b"low %d" % i for i in range(SEGMENTS_MAX + 10)]
    for i, one in enumerate(low):
        client.put(one, {"x": np.full(NBYTES, i, np.uint8)}, fidelity="exact")
    assert client.demote(*low) == len(low)
    fresh = wide.client()
    hits = fresh.get_many(low)
    assert [hit.tensors["x"][0] for hit in hits] == list(range(len(low)))
    assert fresh.delete(*low) == len(low)


def test_no_packet_brings_more_descriptors_than_a_client_has_room_for(wide):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(60)
        peer.connect(f"{wide.socket_path}.lease")
        call = pb.LeaseCall(get=pb.GetRequest(keys=[key(i) for i in range(SEGMENTS)])).SerializeToString()
        brought = []
        for _ in range(20):
            peer.send(call)
            data, fds, flags, _ = socket.recv_fds(peer, 1 << 18, 253)
            for fd in fds:
                os.close(fd)
            reply = pb.LeaseReply.FromString(data)
            brought.append(len(fds))
            assert len(fds) == len(reply.segments) <= SEGMENTS_MAX
            assert not flags & socket.MSG_CTRUNC
            if not reply.HasField("error"):
                break
            assert reply.error.kind == "UseStream"
        assert len(reply.leased) == SEGMENTS
        assert sum(brought) >= SEGMENTS - 1


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


class LyingPeer:
    """A daemon's end of a lease connection."""

    def __init__(self):
        self.near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection = Connection(Releases())
        self.connection._sock = far
        self.connection._receive_into = far.recvmsg_into
        self.connection._poll.register(far, 1)
        self.connection.closed = False

    def call(self, reply, descriptors):
        socket.send_fds(self.near, [reply.SerializeToString()], descriptors)
        return self.connection.call(pb.LeaseCall(match=pb.MatchRequest()), 60)


@pytest.mark.parametrize(("said", "sent"), [(2, 1), (1, 2), (0, 1), (100, 100)])
def test_another_number_of_descriptors_than_was_said_is_a_broken_connection(said, sent):
    peer = LyingPeer()
    fd = os.memfd_create("segment")
    os.ftruncate(fd, 4096)
    before = descriptors()
    reply = pb.LeaseReply(number=1, segments=[pb.Segment(number=i + 1, nbytes=4096) for i in range(said)])
    with pytest.raises(UseStream):
        peer.call(reply, [fd] * sent)
    assert peer.connection.closed
    assert descriptors() <= before
    os.close(fd)
    peer.near.close()


def test_a_daemon_that_only_ever_brings_segments_is_not_asked_for_ever():
    peer = LyingPeer()
    for number in range(1, 100):
        error = pb.LeaseError(kind="UseStream", message="more")
        fd = os.memfd_create("segment")
        os.ftruncate(fd, 4096)
        segments = [pb.Segment(number=number, nbytes=4096)]
        reply = pb.LeaseReply(number=number, error=error, segments=segments)
        socket.send_fds(peer.near, [reply.SerializeToString()], [fd])
        os.close(fd)
    with pytest.raises(UseStream, match="64 packets"):
        peer.connection.call(pb.LeaseCall(match=pb.MatchRequest()), 60)
    peer.connection.close()
    peer.near.close()

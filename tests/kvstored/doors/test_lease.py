"""The lease socket: the bytes are right, nobody can harm them, and what dies lets go."""

import gc
import os
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.errors import LeaseKept, RecordCorrupt
from kvstored_client import Client
from kvstored_client.shm.mapping import PARALLEL_NBYTES
from kvstored_client.shm.pool import Connection
from kvstored_client.wire._pb import cache_pb2 as pb
from tests.conftest import environment, wait_until
from tests.kvstored.inside import daemon_inside

MIB = 1 << 20


def values(client):
    return client.stats().values


@pytest.fixture
def client(shared_daemon):
    return shared_daemon.client()


def shared_memory_only(client, monkeypatch):
    """From here on a call that falls back to the stream fails the test."""

    def refuse(*args):
        raise AssertionError("the stream was used")

    for name in ("send", "stream_out", "stream_in"):
        monkeypatch.setattr(client._transport, name, refuse)


@pytest.mark.parametrize("nbytes", [1, 4097, MIB, 20 * MIB + 1])
def test_put_and_get_go_through_shared_memory_and_come_back_exact(client, monkeypatch, nbytes):
    shared_memory_only(client, monkeypatch)
    x = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    assert client.put(b"near", {"x": x, "y": torch.tensor(2.5), "z": torch.empty(0, 3)})
    hit = client.get(b"near")
    assert torch.equal(hit.tensors["x"], x)
    assert hit.tensors["y"] == 2.5
    assert hit.tensors["z"].shape == (0, 3)
    out = {"x": torch.zeros(nbytes, dtype=torch.uint8), "y": torch.zeros(()), "z": torch.empty(0, 3)}
    assert torch.equal(client.get(b"near", out=out).tensors["x"], x)
    assert client.get(b"not there") is None


def test_a_view_is_the_daemons_own_memory_and_ends_with_the_block(client, monkeypatch):
    shared_memory_only(client, monkeypatch)
    x = torch.randn(1000)
    client.put(b"view", {"x": x})
    with client.lease(b"view") as hit:
        view = hit.tensors["x"]
        assert torch.equal(view, x)
        wait_until(lambda: values(client)["leases"] == 1)  # what was let go before may still be told
    assert view.numel() == 0
    with pytest.raises(LeaseKept, match="has ended"):
        _ = hit.tensors["x"]
    wait_until(lambda: values(client)["leases"] == 0)


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize("looked_at", [False, True])
def test_a_lease_that_nobody_leaves_is_given_back_with_its_last_reference(shared_daemon, framework, looked_at):
    """Its hits know each other, and its tensors know it: not in a ring, which would wait for the collector."""
    client = shared_daemon.client(framework=framework)
    client.put_many([(b"ring %d" % i, {"x": np.arange(1000)}) for i in range(3)])
    gc.disable()
    try:
        hits = client.lease_many([b"ring 0", b"ring 1", b"ring 2"]).__enter__()
        (lease,) = {hit.tensors._lease for hit in hits}
        gone, tensors = weakref.ref(lease), [hit.tensors for hit in hits]
        del lease
        if looked_at:
            assert [int(of["x"][i]) for i, of in enumerate(tensors)] == [0, 1, 2]
        del hits
        assert gone() is not None
        del tensors
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_the_tensors_of_hits_that_are_looked_at_in_turn_are_made_together_and_end_together(shared_daemon, framework):
    client = shared_daemon.client(framework=framework)
    client.put_many([(b"turn %d" % i, {"x": np.full(1000, i)}) for i in range(3)])
    with pytest.raises(LeaseKept, match="copy it inside"), client.lease_many([b"turn 0", b"turn 1", b"turn 2"]) as hits:
        first, second, third = hits
        assert int(first.tensors["x"][0]) == 0
        kept = third.tensors.made["x"][:2]
        assert kept.tolist() == [2, 2]
        assert int(second.tensors["x"][0]) == 1
        del first, second, third
    assert kept.tolist() == [2, 2]


def test_a_view_that_is_kept_beyond_its_block_is_refused_and_the_memory_stays_leased(client):
    client.put(b"kept", {"x": torch.ones(1000)})
    kept = []
    with pytest.raises(LeaseKept, match="copy it inside"), client.lease(b"kept") as hit:
        kept.append(hit.tensors["x"][5:])
    assert kept[0].sum() == 995
    wait_until(lambda: values(client)["leases"] == 1)  # what was let go before may still be told
    kept.clear()
    gc.collect()
    wait_until(lambda: values(client)["leases"] == 0)


def test_numpy_views_are_read_only(shared_daemon):
    client = shared_daemon.client(framework="numpy")
    client.put(b"numpy", {"x": np.arange(10)})
    with client.lease(b"numpy") as hit:
        with pytest.raises(ValueError, match="read-only"):
            hit.tensors["x"][0] = 1
        assert hit.tensors["x"].sum() == 45


def test_an_error_inside_the_block_comes_out_as_itself(client):
    client.put(b"error", {"x": torch.ones(3)})
    with pytest.raises(KeyError), client.lease(b"error") as hit:
        hit.tensors["nothing"]
    assert client.get(b"error") is not None


def test_a_leased_block_is_not_used_again_when_its_entry_is_deleted(client):
    x = torch.randn(MIB // 4)
    client.put(b"gone", {"x": x})
    with client.lease(b"gone") as hit:
        client.delete(b"gone")
        for i in range(50):
            client.put(b"other%d" % i, {"x": torch.zeros(MIB // 4)})
        assert torch.equal(hit.tensors["x"], x)
    for i in range(50):
        client.delete(b"other%d" % i)


def test_warm_and_cold_entries_are_decoded_where_the_client_reads(client, monkeypatch):
    shared_memory_only(client, monkeypatch)
    x = torch.randn(4, 64)
    client.put(b"sinks", {"x": x}, fidelity="exact")
    assert client.demote(b"sinks") == 1
    with client.lease(b"sinks") as hit:
        assert hit.tier == "cold"
        assert torch.equal(hit.tensors["x"], x)
    client.put(b"lossy", {"x": x})
    assert client.demote(b"lossy") == 1
    assert client.get(b"lossy").encoding == "nf4"


def test_tensors_of_empty_are_put_without_a_copy_on_this_side(client, monkeypatch):
    x = client.empty((1000, 1000), "float32")
    x[:] = torch.randn(1000, 1000)
    monkeypatch.setattr(client._pool.copier, "copy", lambda *_: pytest.fail("copied"))
    assert client.put(b"empty", {"x": x})
    monkeypatch.undo()
    assert torch.equal(client.get(b"empty").tensors["x"], x)
    x.fill_(0)  # still the caller's: the daemon has a copy of its own
    assert client.get(b"empty").tensors["x"].abs().sum() > 0


def test_an_abandoned_tensor_of_empty_gives_its_room_back(client):
    for _ in range(100):
        x = client.empty((4 * MIB,), "float32")
        assert x.numel() == 4 * MIB
        del x
    ingest = client._pool.connections()[0].ingest
    assert sum(room.mapping.nbytes for room in ingest) <= 32 * MIB


def test_batches_larger_than_a_packet_or_a_segment_keep_their_order(client):
    small = {b"s%d" % i: torch.full((10,), float(i)) for i in range(1200)}
    assert client.put_many([(k, {"x": x}) for k, x in small.items()]) == 1200
    for hit, (key, x) in zip(client.get_many(list(small)), small.items(), strict=True):
        assert hit.key == key
        assert torch.equal(hit.tensors["x"], x)
    large = {b"l%d" % i: torch.full((5 * MIB,), float(i)) for i in range(8)}
    assert client.put_many([(k, {"x": x}) for k, x in large.items()]) == 8
    assert [hit.tensors["x"][0] for hit in client.get_many(list(large))] == list(range(8))
    client.delete(*large)


def test_every_dtype_and_both_doors_agree(shared_daemon):
    near, far = shared_daemon.client(), shared_daemon.client(shared_memory=False)
    for name in ("float32", "bfloat16", "bool", "int64", "float8_e4m3fn", "complex64"):
        x = (torch.rand(7, 9) > 0.5).to(getattr(torch, name))
        near.put(b"door", {"x": x})
        a, b = near.get(b"door").tensors["x"], far.get(b"door").tensors["x"]
        assert a.dtype == b.dtype == x.dtype
        assert torch.equal(a.view(torch.uint8), x.view(torch.uint8))
        assert torch.equal(b.view(torch.uint8), x.view(torch.uint8))


HOLDER = """
import sys, time
from kvstored_client import Client
cache = Client(sys.argv[1], framework="numpy", on_error="raise")
keys = [b"held%d" % i for i in range(100)]
blocks = [cache.lease(key) for key in keys]
hits = [block.__enter__() for block in blocks]
x = cache.empty((1 << 20,), "float32")
assert all(hit is not None for hit in hits)
print("holding", flush=True)
time.sleep(600)
"""


def hold(daemon):
    """A process that holds 100 leases and a tensor in its ingest segment."""
    held = subprocess.Popen([sys.executable, "-c", HOLDER, daemon.address], env=environment(), stdout=subprocess.PIPE)
    assert held.stdout.readline() == b"holding\n"
    return held


def test_a_killed_client_leaves_nothing_behind(daemon):
    client = daemon.client(framework="numpy")
    client.put_many([(b"held%d" % i, {"x": np.full(1000, i)}) for i in range(100)])
    before = values(client)
    process = hold(daemon)
    assert values(client)["leases"] == 100
    process.kill()
    # Half of what their age would take: it is the socket's end that frees them (0.1 s on an idle machine).
    wait_until(lambda: values(client)["leases"] == 0, timeout_s=30)
    process.wait()
    process.stdout.close()
    wait_until(lambda: values(client)["lease_connections"] == before["lease_connections"])


def test_a_stopped_client_loses_its_leases_at_their_maximum_age(daemon_factory):
    daemon = daemon_factory(server="lease_max_s = 1.0")
    client = daemon.client(framework="numpy")
    client.put_many([(b"held%d" % i, {"x": np.full(1000, i)}) for i in range(100)])
    process = hold(daemon)
    process.send_signal(signal.SIGSTOP)
    # Counted one by one, not seen at once: on a busy machine the first has aged before the last was taken.
    wait_until(lambda: values(client)["leases"] == 0)
    assert values(client)["leases_aged"] == 100
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_read_that_outlives_its_lease_is_a_miss_and_never_other_bytes(daemon_factory, monkeypatch):
    daemon = daemon_factory(server="lease_max_s = 0.2")
    client = daemon.client(framework="numpy")
    client.put(b"slow", {"x": np.ones(PARALLEL_NBYTES, dtype=np.uint8)})
    copy = client._pool.copier.copy
    other = daemon.client(framework="numpy")

    def slowly(target, source):
        other.delete(b"slow")
        wait_until(lambda: values(other)["leases"] == 0)
        for i in range(4):
            other.put(b"new%d" % i, {"x": np.zeros(PARALLEL_NBYTES, dtype=np.uint8)})
        copy(target, source)

    monkeypatch.setattr(client._pool.copier, "copy", slowly)
    assert client.get(b"slow") is None
    assert client.failures == 1


def test_a_restart_is_noticed_and_no_stale_segment_is_read(daemon):
    client = daemon.client(framework="numpy")
    for life in range(3):
        for i in range(5):
            client.put(b"%d" % i, {"x": np.full(10_000, 10 * life + i)})
        for i in range(5):
            assert (client.get(b"%d" % i).tensors["x"] == 10 * life + i).all()
        assert daemon.stop() == 0
        daemon.start()
    assert client.get(b"0") is not None


def test_without_the_lease_socket_the_stream_gives_the_same_results(daemon):
    (daemon.socket_path.parent / (daemon.socket_path.name + ".lease")).unlink()
    client = daemon.client()
    x = torch.randn(MIB)
    assert client.put(b"k", {"x": x})
    assert torch.equal(client.get(b"k").tensors["x"], x)
    with client.lease(b"k") as hit:
        assert torch.equal(hit.tensors["x"], x)
    assert client.empty((3,)).shape == (3,)
    assert client.match([b"k"]) == 1


@pytest.mark.parametrize(
    "call",
    [
        pb.LeaseCall(ingest_nbytes=1 << 60),
        pb.LeaseCall(get=pb.GetRequest(keys=[b""])),
        pb.LeaseCall(release=[1, 2, 3], match=pb.MatchRequest(keys=[bytes(300)])),
        pb.LeaseCall(put=pb.LeasePut(entries=[pb.IngestedEntry(header=pb.PutHeader(key=b"k"))])),
        pb.LeaseCall(
            put=pb.LeasePut(
                entries=[
                    pb.IngestedEntry(
                        header=pb.PutHeader(
                            key=b"k", nbytes=5, tensors=[pb.TensorSpec(name="x", dtype=pb.DTYPE_UINT8, shape=[5])]
                        ),
                        places=[pb.TensorPlace(segment=1, start=2**63)],
                    )
                ]
            )
        ),
    ],
)
def test_bad_calls_are_answered_and_the_connection_goes_on(shared_daemon, call):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(60)
        sock.connect(str(shared_daemon.socket_path) + ".lease")
        sock.send(call.SerializeToString())
        assert pb.LeaseReply.FromString(sock.recv(1 << 18)).HasField("error")
        sock.send(b"\xff\xff\xff")
        assert pb.LeaseReply.FromString(sock.recv(1 << 18)).error.kind == "InvalidEntry"
        sock.send(pb.LeaseCall(match=pb.MatchRequest(keys=[b"k"])).SerializeToString())
        assert pb.LeaseReply.FromString(sock.recv(1 << 18)).HasField("match")


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's id, which only root can")
def test_another_user_gets_the_bytes_in_his_own_segments_only(daemon):
    client = daemon.client(framework="numpy")
    client.put(b"mine", {"x": np.arange(1000)})
    assert client.get(b"mine") is not None  # what was answered is kept, and names a segment of the owner's
    daemon.directory.parent.chmod(0o755)
    for path in (daemon.socket_path, daemon.socket_path.with_name("k.sock.lease")):
        path.chmod(0o666)
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(3001)
            os.setuid(3001)
            inherited = set(Path("/proc/self/maps").read_text().splitlines())
            with Client(daemon.address, framework="numpy", on_error="raise") as other:
                hit = other.get(b"mine")
                assert np.array_equal(hit.tensors["x"], np.arange(1000))
                mapped = set(Path("/proc/self/maps").read_text().splitlines()) - inherited
                own = {line.partition("memfd:")[2].split()[0] for line in mapped if "memfd:kvstored-" in line}
                assert own == {"kvstored-3001"}, "in segments of his own"
            os._exit(0)
        except BaseException as error:  # noqa: BLE001
            sys.stderr.write(repr(error))
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_block_that_outlives_its_lease_ends_with_an_error_and_not_with_other_bytes(daemon_factory):
    """The lease reached its maximum age: what was read since may be another entry's."""
    daemon = daemon_factory(server="lease_max_s = 0.2")
    client, other = daemon.client(framework="numpy"), daemon.client(framework="numpy")
    client.put(b"slow", {"x": np.ones(MIB, dtype=np.uint8)})

    def outlive():
        with client.lease(b"slow") as hit:
            assert hit.tensors["x"].sum() == MIB
            other.delete(b"slow")
            wait_until(lambda: values(other)["leases_aged"] == 1)
            for i in range(20):
                other.put(b"new%d" % i, {"x": np.zeros(MIB, dtype=np.uint8)})

    with pytest.raises(RecordCorrupt, match="lease_max_s"):
        outlive()


def test_hits_of_a_lease_are_made_when_they_are_looked_at(client, monkeypatch):
    shared_memory_only(client, monkeypatch)
    keys = [b"lazy%d" % i for i in range(100)]
    client.put_many([(key, {"x": torch.full((10,), float(i))}) for i, key in enumerate(keys)])
    with client.lease_many([*keys, b"nobody put this"]) as hits:
        assert len(hits) == 101
        assert hits[-1] is None
        assert hits[7].tensors["x"][0] == 7
        assert hits[7] is hits[7 - 101]
        assert [hit.key for hit in hits[3:5]] == keys[3:5]
        assert [float(hit.tensors["x"][0]) for hit in hits if hit is not None] == list(map(float, range(100)))
    with pytest.raises(LeaseKept, match="has ended"):
        _ = hits[50].tensors["x"]
    client.delete(*keys)


def test_what_was_answered_is_counted_whoever_asks_next(client, shared_daemon):
    """The daemon counts after it has answered; through the other door and another connection it shows all the same."""
    other = shared_daemon.client()
    client.put(b"counted", {"x": torch.ones(10)})
    for _ in range(200):
        hits = values(other)["hits"]
        assert client.get(b"counted") is not None
        assert values(other)["hits"] == hits + 1


def test_what_was_answered_is_in_the_entry_s_own_count(client):
    client.put(b"own count", {"x": torch.ones(10)})
    for i in range(100):
        assert client.get(b"own count") is not None
        assert client.inspect(b"own count").hits == i + 1


def test_a_block_that_cannot_be_taken_apart_comes_over_the_stream(client, monkeypatch):
    x = torch.arange(10)
    client.put(b"garbled", {"x": x})
    taken = Connection.exchange

    def garbled(self, data, timeout_s):
        reply = taken(self, data, timeout_s)
        reply.leased[:] = [b"\xff" for _ in reply.leased]
        return reply

    monkeypatch.setattr(Connection, "exchange", garbled)
    assert torch.equal(client.get(b"garbled").tensors["x"], x)
    with client.lease_many([b"garbled"]) as hits, pytest.raises(RecordCorrupt, match="cannot be"):
        _ = hits[0]


def test_a_release_goes_with_the_next_call_or_by_itself(client, monkeypatch):
    """One packet less a get; a client that calls no more lets go all the same."""
    shared_memory_only(client, monkeypatch)
    client.put(b"let go", {"x": torch.ones(10)})
    for _ in range(50):
        assert client.get(b"let go") is not None
    wait_until(lambda: values(client)["leases"] == 0)


def test_leases_of_a_parent_are_not_given_back_by_its_forked_child(client):
    client.put(b"forked", {"x": torch.arange(10)})
    with client.lease(b"forked") as hit:
        pid = os.fork()
        if pid == 0:
            try:
                same = client.get(b"forked")
                os._exit(0 if torch.equal(same.tensors["x"], torch.arange(10)) else 1)
            except BaseException:  # noqa: BLE001
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        wait_until(lambda: values(client)["leases"] == 1)  # what was let go before may still be told
        assert hit.tensors["x"].sum() == 45


def test_a_segment_of_a_reply_that_was_too_large_comes_with_the_next_one(daemon):
    """It counted as handed over, and everything in it went over the stream for the rest of the connection's life."""
    writer = daemon.client(framework="numpy")
    tensors = {
        f"tensor number {i} of an entry with long names and many of them": np.zeros(1, np.uint8) for i in range(250)
    }
    for i in range(16):
        assert writer.put(b"wide%d" % i, tensors)

    def asked(sock, *keys):
        sock.send(pb.LeaseCall(get=pb.GetRequest(keys=keys)).SerializeToString())
        data, fds, _, _ = socket.recv_fds(sock, 1 << 20, 8)
        for fd in fds:
            os.close(fd)
        return pb.LeaseReply.FromString(data), len(fds)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(30)
        sock.connect(str(daemon.socket_path) + ".lease")
        refused, descriptors = asked(sock, *(b"wide%d" % i for i in range(16)))
        assert (refused.error.kind, descriptors) == ("UseStream", 0)
        assert values(writer)["leases"] == 0
        reply, descriptors = asked(sock, b"wide3")
        assert len(reply.leased) == 1
        assert [segment.number for segment in reply.segments] == [pb.Leased.FromString(reply.leased[0]).segment]
        assert descriptors == 1


def test_an_entry_that_sank_as_it_is_is_said_to_be_where_it_is(client, monkeypatch):
    """What a client remembers of a block is not where the entry is: hot and warm may hold the very same bytes."""
    shared_memory_only(client, monkeypatch)
    client.put(b"integers", {"x": torch.arange(1000)})
    tiers = []
    for _ in range(2):
        with client.lease(b"integers") as hit:
            assert torch.equal(hit.tensors["x"], torch.arange(1000))
            tiers.append(hit.tier)
        if len(tiers) == 1:
            assert client.demote(b"integers") == 1
    assert tiers[0] == "hot" != tiers[1]
    client.delete(b"integers")


def test_a_chain_longer_than_the_bytes_in_flight_is_read_in_place_also_where_its_end_is_missing(monkeypatch):
    """It was refused as an entry too large: a chain that ends is no whole answer, and was charged at once."""
    with daemon_inside(segment_nbytes=8 * MIB, in_flight_nbytes=32 * MIB) as daemon:
        client = daemon.client()
        keys = [b"%d" % n for n in range(48)]
        for n, key in enumerate(keys):
            client.put(key, {"x": np.full(MIB, n, np.uint8)}, fidelity="exact")
        shared_memory_only(client, monkeypatch)
        for wanted in (keys, [*keys, b"missing"]):
            hits = client.get_many(wanted, leading=True)
            assert [int(hit.tensors["x"][-1]) for hit in hits] == list(range(48))
        assert daemon.daemon.watch.budget.used_nbytes == 0

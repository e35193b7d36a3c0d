"""What a daemon does with bad input: a status with the value and the limit, no memory, and it goes on."""

import re
import threading

import grpc
import numpy as np
import pytest

from kvstore.errors import OverQuota
from kvstore.keys import CheckedKeys
from kvstore.store import Store
from kvstored.calls.budget import Budget
from kvstored.calls.gets import Reading
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.address import parse_address
from tests.conftest import free_port, wait_until
from tests.kvstored.conftest import http_get
from tests.raw import RawClient, entry_frames, header, spec

MIB = 1 << 20
END = pb.PutFrame(end=pb.EntryEnd())
INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED

BAD_PUTS = {
    "empty key": ([header(b"", 1, spec("x", 1))], INVALID, "1 to 256 bytes, got 0"),
    "257-byte key": ([header(bytes(257), 1, spec("x", 1))], INVALID, "1 to 256 bytes, got 257"),
    "1 MiB key": ([header(bytes(MIB), 1, spec("x", 1))], EXHAUSTED, "at most 65536 bytes, got 1048"),
    "no tensors": ([header(b"k", 0)], INVALID, "at least 1 tensor"),
    "10,000 tensors": (
        [header(b"k", 10_000, *(spec(str(i), 1) for i in range(10_000)))],
        EXHAUSTED,
        "at most 65536 bytes, got",
    ),
    "257 tensors": ([header(b"k", 257, *(spec(str(i), 1) for i in range(257)))], EXHAUSTED, "256 tensors, got 257"),
    "tensor twice": ([header(b"k", 2, spec("x", 1), spec("x", 1))], INVALID, "twice"),
    "no name": ([header(b"k", 1, spec("", 1))], INVALID, "1 to 64 bytes"),
    "long name": ([header(b"k", 1, spec("n" * 65, 1))], INVALID, "1 to 64 bytes, got 65"),
    "control character in a name": ([header(b"k", 1, spec("a\nb", 1))], INVALID, "printable"),
    "unknown dtype": ([header(b"k", 1, spec("x", 1, dtype=77))], INVALID, "unknown dtype 77"),
    "no dtype": ([header(b"k", 1, spec("x", 1, dtype=0))], INVALID, "unknown dtype 0"),
    "dimension 2**62": ([header(b"k", 2**62, spec("x", 2**62))], INVALID, str(2**62)),
    # -1 as an unsigned 64-bit number: the only way to write it on this wire.
    "negative dimension": ([header(b"k", 1, spec("x", 2**64 - 1))], INVALID, str(2**64 - 1)),
    "zero beside 2**62": ([header(b"k", 0, spec("x", 0, 2**62))], INVALID, str(2**62)),
    "product overflows": ([header(b"k", 0, spec("x", 2**32, 2**32))], EXHAUSTED, "at most"),
    "9 dimensions": ([header(b"k", 1, spec("x", *[1] * 9))], INVALID, "at most 8 dimensions, got 9"),
    "3 GiB": ([header(b"k", 3 << 30, spec("x", 3 << 30))], EXHAUSTED, "at most.*3221225472"),
    "more announced than specified": ([header(b"k", 5, spec("x", 4))], INVALID, "announces 5 bytes.*add up to 4"),
    "negative ttl": ([header(b"k", 1, spec("x", 1), ttl_s=-1)], INVALID, "-1"),
    "ttl nan": ([header(b"k", 1, spec("x", 1), ttl_s=float("nan"))], INVALID, "nan"),
    "huge ttl": ([header(b"k", 1, spec("x", 1), ttl_s=1e12), pb.PutFrame(chunk=b"1"), END], INVALID, "ttl"),
    "unknown fidelity": ([header(b"k", 1, spec("x", 1), fidelity=9)], INVALID, "fidelity 9"),
    "chunk missing": ([header(b"k", 2, spec("x", 2)), pb.PutFrame(chunk=b"1"), END], INVALID, "received 1 of 2"),
    "too many bytes": ([header(b"k", 2, spec("x", 2)), pb.PutFrame(chunk=b"123")], INVALID, "3 of 2"),
    "end missing": ([header(b"k", 2, spec("x", 2)), pb.PutFrame(chunk=b"12")], INVALID, "without its end"),
    "chunk first": ([pb.PutFrame(chunk=b"1")], INVALID, "before a header"),
    "end first": ([END], INVALID, "before a header"),
    "header inside an entry": ([header(b"k", 2, spec("x", 2))] * 2, INVALID, "before the end of an entry"),
    "wrong checksum": (
        [header(b"k", 1, spec("x", 1)), pb.PutFrame(chunk=b"1"), pb.PutFrame(end=pb.EntryEnd(xxh3=1))],
        INVALID,
        "checksum",
    ),
    "chunk over 4 MiB": ([header(b"k", 5 * MIB, spec("x", 5 * MIB)), pb.PutFrame(chunk=bytes(5 * MIB))], EXHAUSTED, ""),
}


@pytest.fixture
def raw(daemon):
    client = RawClient(parse_address(daemon.address))
    yield client
    client.close()


def test_every_bad_put_is_refused_with_value_and_limit_and_memory_stays_flat(daemon, raw):
    raw.put(entry_frames(b"good", b"data"))
    before = daemon.rss_nbytes()
    for name, (frames, code, message) in BAD_PUTS.items():
        with pytest.raises(grpc.RpcError) as caught:
            raw.put(frames)
        assert caught.value.code() == code, (name, caught.value)
        assert re.search(message, caught.value.details()), (name, caught.value.details())
    for _ in range(20):
        for name in ("3 GiB", "dimension 2**62", "10,000 tensors", "1 MiB key", "end missing"):
            with pytest.raises(grpc.RpcError):
                raw.put(BAD_PUTS[name][0])
    assert daemon.rss_nbytes() - before < 64 * MIB
    assert len(raw.match(b"k").held) == 0
    assert len(raw.match(b"good").held) == 1


def test_entries_announced_but_never_sent_cost_no_memory(daemon_factory):
    daemon = daemon_factory(server='silence_s = 1.0\nin_flight_nbytes = "1GiB"')
    raw = RawClient(parse_address(daemon.address))
    before = daemon.rss_nbytes()

    def silent():
        yield header(b"k", 900 * MIB, spec("x", 900 * MIB))
        over.wait(120)

    over = threading.Event()
    with pytest.raises(grpc.RpcError) as caught:
        raw.put(silent())
    over.set()
    assert caught.value.code() == INVALID
    assert "no frame for 1.0 s (server.silence_s); received 0 of 943718400" in caught.value.details()
    assert daemon.rss_nbytes() - before < 64 * MIB
    raw.put(entry_frames(b"next", b"fine"))
    raw.close()


def test_bytes_in_flight_over_the_budget_are_refused_at_once_with_a_time_to_retry(daemon_factory):
    daemon = daemon_factory(server='in_flight_nbytes = "8MiB"\nsilence_s = 120.0')
    raw = RawClient(parse_address(daemon.address))
    with pytest.raises(grpc.RpcError) as never:
        raw.put([header(b"k", 9 * MIB, spec("x", 9 * MIB))])
    assert never.value.code() == EXHAUSTED
    assert dict(never.value.trailing_metadata())["kvstored-error"] == "EntryTooLarge"

    begun, go_on = threading.Event(), threading.Event()

    def slow():
        yield header(b"slow", 6 * MIB, spec("x", 6 * MIB))
        begun.set()
        go_on.wait(120)
        for _ in range(6):
            yield pb.PutFrame(chunk=bytes(MIB))
        yield END

    call = raw.channel.stream_unary(
        "/kvstored.v1.Cache/Put", pb.PutFrame.SerializeToString, pb.PutReply.FromString
    ).future(slow())
    assert begun.wait(120)
    with daemon.client() as watching:
        wait_until(lambda: watching.stats().values["in_flight_nbytes"] >= 6 * MIB)
    with pytest.raises(grpc.RpcError) as busy:
        raw.put(entry_frames(b"k", bytes(6 * MIB)))
    # At once, not when there is room: the other one still waits for this.
    assert not call.done()
    assert busy.value.code() == EXHAUSTED
    metadata = dict(busy.value.trailing_metadata())
    assert int(metadata["retry-after-ms"]) > 0
    assert metadata["kvstored-error"] == "OverQuota"
    go_on.set()
    assert call.result(120).stored == 1
    assert raw.put(entry_frames(b"k", bytes(6 * MIB))).stored == 1
    raw.close()


def test_bad_requests_beside_put_are_refused(daemon, raw):
    def code_of(path, data):
        with pytest.raises(grpc.RpcError) as caught:
            raw.channel.unary_unary(path)(data, timeout=10)
        return caught.value.code()

    for verb in ("Match", "Touch", "Delete", "Pin"):
        assert code_of(f"/kvstored.v1.Cache/{verb}", b"\xff\xff\xff") == INVALID
        too_many = pb.MatchRequest(keys=[b"%d" % i for i in range(4097)])
        assert code_of(f"/kvstored.v1.Cache/{verb}", too_many.SerializeToString()) == INVALID
    assert code_of("/kvstored.v1.Admin/Inspect", pb.InspectRequest(key=b"").SerializeToString()) == INVALID
    assert code_of("/kvstored.v1.Cache/Nothing", b"") == grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError) as caught:
        list(raw.get(pb.GetRequest(keys=[b""])))
    assert caught.value.code() == INVALID
    with pytest.raises(grpc.RpcError) as caught:
        list(raw.channel.unary_stream("/kvstored.v1.Admin/List")(pb.ListRequest(tier=9).SerializeToString()))
    assert caught.value.code() == INVALID


def test_a_unary_message_over_4_mib_and_headers_over_16_kib_are_refused(daemon, raw):
    with pytest.raises(grpc.RpcError) as caught:
        raw.channel.unary_unary("/kvstored.v1.Cache/Match")(bytes(5 * MIB), timeout=10)
    assert caught.value.code() == EXHAUSTED
    with pytest.raises(grpc.RpcError) as caught:
        raw.channel.unary_unary("/kvstored.v1.Cache/Match")(b"", timeout=10, metadata=[("x-big", "v" * (64 << 10))])
    assert caught.value.code() in (EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    assert raw.match(b"k") is not None


def test_a_call_over_the_limit_takes_the_place_of_one_that_has_been_silent(daemon_factory):
    port = free_port()
    daemon = daemon_factory(server=f'calls_max = 2\nsilence_s = 120.0\nmetrics_address = "127.0.0.1:{port}"')
    raw = RawClient(parse_address(daemon.address))
    release = threading.Event()

    def waiting():
        yield header(b"k", 1, spec("x", 1))
        release.wait(120)

    put = raw.channel.stream_unary("/kvstored.v1.Cache/Put", pb.PutFrame.SerializeToString, pb.PutReply.FromString)
    calls = [put.future(waiting()) for _ in range(2)]

    def both_wait():
        # By the other port: a call to look would take the place that the second put is to have.
        status, body, _ = http_get(port, "/metrics")
        return status == 200 and 'kvstored_rpc_running{method="Cache/Put"} 2.0' in body

    wait_until(both_wait)

    def is_answered():
        try:
            raw.match(b"k")
        except grpc.RpcError as error:
            if error.code() != EXHAUSTED:
                raise
            return False  # no put has been silent for a second yet
        return True

    wait_until(is_answered)
    wait_until(lambda: any(call.done() for call in calls))
    release.set()
    assert sorted(call.code().name for call in calls) == ["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"]
    raw.close()


def test_a_reader_that_stops_reading_is_cut_off_and_costs_little(daemon_factory):
    daemon = daemon_factory(server="silence_s = 1.0")
    with daemon.client() as client:
        client.put(b"big", {"x": np.ones(200 * MIB, dtype=np.uint8)})
        assert client.get(b"big") is not None  # copied by now: the put was answered before
    raw = RawClient(parse_address(daemon.address))
    before = daemon.rss_nbytes()
    stream = raw.get(pb.GetRequest(keys=[b"big"]), timeout=120)
    next(stream)
    highest = [0]

    def cut_off():
        highest[0] = max(highest[0], daemon.rss_nbytes())
        return watching.stats().values["in_flight_nbytes"] == 0

    with daemon.client() as watching:
        wait_until(cut_off)
    assert highest[0] - before < 24 * MIB
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    # The second where it did not take even that word in time.
    assert caught.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
    raw.close()


def test_readers_that_never_listen_keep_no_memory(daemon_factory):
    """To abort such a call waits until its reader takes what was sent before; what it had read was held as long."""
    daemon = daemon_factory(server="silence_s = 1.0")
    with daemon.client() as client:
        client.put(b"big", {"x": np.ones(64 * MIB, dtype=np.uint8)})
        raw = RawClient(parse_address(daemon.address))
        calls = [raw.get(pb.GetRequest(keys=[b"big"])) for _ in range(2)]
        for call in calls:
            next(call)
        wait_until(lambda: client.stats().values["in_flight_nbytes"] == 0)
        assert raw.match(b"big").held
    raw.close()


def test_a_hot_entry_that_waits_for_a_slow_reader_is_in_flight(daemon_factory):
    """Hot lets go of it when it likes, and then it was in nobody's account: 200 MiB too much with 512 streams."""
    daemon = daemon_factory(server='in_flight_nbytes = "64MiB"\nsilence_s = 120.0')
    raw = RawClient(parse_address(daemon.address))
    with daemon.client() as client:
        client.put(b"hot", {"x": np.ones(24 * MIB, dtype=np.uint8)})
        stream = raw.get(pb.GetRequest(keys=[b"hot"]), timeout=120)
        next(stream)
        wait_until(lambda: client.stats().values["in_flight_nbytes"] >= 24 * MIB)
        others = [raw.get(pb.GetRequest(keys=[b"hot"]), timeout=120) for _ in range(2)]
        with pytest.raises(grpc.RpcError) as refused:
            for other in others:
                next(other)
        assert refused.value.code() == EXHAUSTED
        for call in (stream, *others):
            call.cancel()
        wait_until(lambda: client.stats().values["in_flight_nbytes"] == 0)
        assert len(list(raw.get(pb.GetRequest(keys=[b"hot"])))) > 1
    raw.close()


def test_what_a_get_would_read_is_counted_before_it_is_read():
    """Counted afterwards, as many entries as there are threads were in memory and in nobody's account."""
    with Store.open(background=False) as store:
        store.put(b"low", {"x": np.ones(MIB, np.float32)})
        store.demote(b"low")
        budget = Budget(8 * MIB)
        budget.take(5 * MIB)
        low = CheckedKeys([b"low"])
        reading = Reading(store, budget, pb.GetRequest(), low)
        with pytest.raises(OverQuota, match="4194304 bytes more would make"):
            reading.plan()
        reading.close()
        assert store.stats().values["gets"] == 0
        budget.give_back(5 * MIB)
        packed = Reading(store, budget, pb.GetRequest(accept=[store.inspect(b"low").encoding]), low)
        packed.plan()
        [(_, found)] = packed.read()
        assert budget.used_nbytes == sum(part.nbytes for part in found.contents.payload) < MIB
        packed.close()
        assert budget.used_nbytes == 0

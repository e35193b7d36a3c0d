"""What a client gives back: frameworks, out, streams in order, and bytes that are never wrong."""

import multiprocessing
import threading

import ml_dtypes
import numpy as np
import pytest
import torch
import xxhash

from kvstore.errors import InvalidEntry, LeaseKept, RecordCorrupt
from kvstored_client import Client
from kvstored_client.stream.receiver import Receiver
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.address import parse_address
from kvstored_client.wire.frames import BadFrame, build_frame, build_miss
from tests.kvstored_client.hammering import hammer, work
from tests.raw import RawClient, entry_frames

MIB = 1 << 20


def test_torch_goes_in_and_numpy_comes_out_and_back(shared_daemon):
    k = torch.randn(2, 5, 3, 8).to(torch.bfloat16)
    shared_daemon.client().put(b"k", {"k": k})
    as_numpy = shared_daemon.client(framework="numpy").get(b"k").tensors["k"]
    assert as_numpy.dtype == np.dtype(ml_dtypes.bfloat16)
    shared_daemon.client().put(b"again", {"k": as_numpy})
    assert torch.equal(shared_daemon.client(framework="torch").get(b"again").tensors["k"], k)


def test_out_is_filled_in_place_whatever_it_is(shared_daemon):
    client = shared_daemon.client()
    x = torch.randn(300, 1000)
    client.put(b"k", {"x": x})
    outs = [
        torch.zeros(300, 1000),
        torch.zeros(1000, 300).T,
        np.zeros((300, 1000), dtype=np.float32),
        torch.nn.Parameter(torch.zeros(300, 1000)),
    ]
    for out in outs:
        with torch.no_grad():
            hit = client.get(b"k", out={"x": out})
        assert hit.tensors["x"] is out
        assert torch.equal(torch.as_tensor(out).detach(), x)


@pytest.mark.parametrize(
    "out",
    [
        {"x": torch.zeros(4)},
        {"x": torch.zeros(3, dtype=torch.float64)},
        {"y": torch.zeros(3)},
        {"x": torch.zeros(3), "y": torch.zeros(3)},
        {"x": np.zeros(6, dtype=np.float32)[::2]},
        {"x": np.frombuffer(bytes(12), dtype=np.float32)},  # read-only
        {"x": np.zeros(3, dtype=np.dtype(np.float32).newbyteorder())},
        {},
    ],
)
def test_an_out_that_does_not_fit_raises(shared_daemon, out):
    client = shared_daemon.client(on_error="miss")
    client.put(b"k", {"x": torch.ones(3)})
    with pytest.raises(InvalidEntry, match="out"):
        client.get(b"k", out=out)


def test_a_lease_from_nobody_is_a_miss(tmp_path):
    with Client(f"unix:{tmp_path}/nobody", timeout_s=0.2) as client:
        with client.lease(b"k") as hit:
            assert hit is None
        with client.lease_many([b"k", b"l"]) as hits:
            assert not any(hits)


def test_hits_of_a_lease_are_the_same_by_position_and_in_turn(shared_daemon):
    """More than are made together, with misses among them; each is made once."""
    client = shared_daemon.client(framework="numpy")
    keys = [b"hit %d" % i for i in range(40)]
    client.put_many([(key, {"x": np.full(10, i)}) for i, key in enumerate(keys) if i % 7])
    with client.lease_many(keys) as hits:
        third = hits[3]
        seen = [None if hit is None else int(hit.tensors["x"][0]) for hit in hits]
        assert seen == [i if i % 7 else None for i in range(40)]
        assert third is hits[3]
        assert hits[-1] is hits[39]
        assert [hit is None for hit in hits[:2]] == [True, False]
        for outside in (40, -41):
            with pytest.raises(IndexError):
                hits[outside]
        del third
    with pytest.raises(LeaseKept):
        hits[1].tensors["x"]


def test_strided_conjugated_and_empty_tensors_are_put_as_their_values(shared_daemon):
    client = shared_daemon.client()
    values = {
        "transposed": torch.randn(30, 40).T,
        "sliced": torch.randn(30, 40)[::3, 5:7],
        "conj": torch.randn(5, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "big endian": np.arange(5, dtype=">f4"),
    }
    client.put(b"k", values)
    hit = client.get(b"k")
    for name, x in values.items():
        expected = torch.as_tensor(x.astype("<f4")) if isinstance(x, np.ndarray) else x.resolve_conj()
        assert torch.equal(hit.tensors[name], expected), name


@pytest.mark.parametrize("nbytes", [0, 1, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 9 * MIB + 3])
@pytest.mark.parametrize("path", ["unix", "tcp"])
def test_any_size_comes_back_over_unix_and_tcp(shared_daemon, path, nbytes):
    address = shared_daemon.address.split(",")[path == "tcp"]
    x = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
    with Client(address, framework="numpy", on_error="raise") as client:
        assert client.put(b"k", {"x": x})
        assert np.array_equal(client.get(b"k").tensors["x"], x)


def test_a_long_batch_keeps_its_order_and_marks_its_misses(shared_daemon):
    client = shared_daemon.client(framework="numpy")
    keys = [b"%d" % i for i in range(1000)]
    stored = client.put_many([(key, {"x": np.full(100, i)}) for i, key in enumerate(keys) if i % 3])
    assert stored == sum(1 for i in range(1000) if i % 3)
    for i, hit in enumerate(client.get_many(keys)):
        assert (hit is None) == (i % 3 == 0)
        assert hit is None or (hit.key == keys[i] and np.array_equal(hit.tensors["x"], np.full(100, i)))
    assert [hit.key for hit in client.get_many(keys[1:], leading=True)] == keys[1:3]


def test_a_client_of_plain_protobuf_and_ours_read_each_other(shared_daemon):
    raw = RawClient(parse_address(shared_daemon.address))
    ours = shared_daemon.client(framework="numpy")
    payload = np.random.default_rng(1).integers(0, 256, 5 * MIB, dtype=np.uint8)
    assert raw.put(entry_frames(b"raw", payload.tobytes())).stored == 1
    assert np.array_equal(ours.get(b"raw").tensors["x"], payload)
    ours.put(b"ours", {"x": payload})
    frames = list(raw.get(pb.GetRequest(keys=[b"ours", b"none"])))
    assert frames[0].header.nbytes == payload.size
    assert frames[0].header.boot_epoch == ours.boot_epoch
    body = b"".join(frame.chunk for frame in frames)
    assert body == payload.tobytes()
    ends = [frame.end for frame in frames if frame.HasField("end")]
    assert [end.xxh3 for end in ends] == [xxhash.xxh3_64_intdigest(body)]
    assert frames[-1].miss.index == 1
    raw.close()


def get_header(nbytes, **more):
    spec = pb.TensorSpec(name="x", dtype=pb.DTYPE_UINT8, shape=[nbytes])
    return pb.GetHeader(index=0, tensors=[spec], nbytes=nbytes, tier=pb.TIER_HOT, encoding="raw", **more)


def end(payload):
    return pb.EntryEnd(xxh3=xxhash.xxh3_64_intdigest(payload)).SerializeToString()


def test_a_wrong_checksum_is_a_miss_counted_and_the_rest_of_the_batch_stands():
    receiver = Receiver([b"a", b"b"], "numpy")
    second = get_header(3)
    second.index = 1
    receiver.read(
        [
            build_frame(get_header(3).SerializeToString(), [memoryview(b"abX")], end(b"abc")),
            build_frame(second.SerializeToString(), [memoryview(b"abc")], end(b"abc")),
        ]
    )
    assert receiver.hits[0] is None
    assert receiver.hits[1] is not None
    assert receiver.corrupt == 1


BAD_STREAMS = {
    "cut off": [build_frame(get_header(3).SerializeToString(), [memoryview(b"ab")])],
    "too short": [build_frame(get_header(3).SerializeToString(), [memoryview(b"ab")], end(b"ab"))],
    "too long": [build_frame(get_header(3).SerializeToString(), [memoryview(b"abcd")])],
    "no header": [build_frame(None, [memoryview(b"abc")])],
    "two headers": [build_frame(get_header(3).SerializeToString())] * 2,
    "an index nobody asked for": [
        build_frame(pb.GetHeader(index=7, tensors=get_header(0).tensors).SerializeToString(), [], end(b""))
    ],
    "sizes that disagree": [build_frame(pb.GetHeader(tensors=get_header(3).tensors, nbytes=4).SerializeToString())],
    "a size of 2**60": [build_frame(get_header(1 << 60).SerializeToString())],
    "no frame": [b"\xff\xff"],
}


@pytest.mark.parametrize("stream", BAD_STREAMS.values(), ids=BAD_STREAMS)
def test_a_damaged_stream_is_refused_before_it_does_harm(stream):
    with pytest.raises(BadFrame):
        Receiver([b"a"], "numpy").read(stream)


def test_a_damaged_stream_is_a_miss_for_the_caller(shared_daemon, monkeypatch):
    client = shared_daemon.client(on_error="miss", shared_memory=False)
    monkeypatch.setattr(client._transport, "stream_in", lambda *_: (message for message in [b"\xff\xff"]))
    assert client.get(b"k") is None
    assert client.failures == 1
    strict = shared_daemon.client(on_error="raise", shared_memory=False)
    monkeypatch.setattr(strict._transport, "stream_in", lambda *_: (message for message in [b"\xff\xff"]))
    with pytest.raises(RecordCorrupt):
        strict.get(b"k")


def test_a_miss_carries_the_boot_epoch():
    receiver = Receiver([b"a"], "numpy")
    receiver.read([build_miss(pb.GetMiss(index=0, boot_epoch=42))])
    assert receiver.boot_epoch == 42


@pytest.mark.slow
def test_32_threads_of_one_client_and_8_processes_see_no_wrong_bytes(daemon_factory):
    # Tiers small enough that entries sink and rise all the time.
    daemon = daemon_factory(store='[store.hot]\ncapacity_nbytes = "4MiB"\n[store.warm]\ncapacity_nbytes = "2MiB"\n')
    client = daemon.client(framework="numpy", timeout_s=30)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=work, args=(daemon.address, 1000 + n, results)) for n in range(8)]
    for process in processes:
        process.start()
    seen = []
    threads = [threading.Thread(target=lambda n=n: seen.append(hammer(client, n, 40))) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    seen += [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert len(seen) == 40
    assert sum(wrong for wrong, _ in seen) == 0
    assert sum(hits for _, hits in seen) > 0
    assert daemon.stop() == 0

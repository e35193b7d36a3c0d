"""Entries that travel encoded: decoded by the client they are, bit for bit, what the daemon would have sent."""

import json

import numpy as np
import pytest
import torch
import xxhash

from kvstore.arrays import as_bytes
from kvstore.codecs import codec_for, codec_named, encode_entry
from kvstore.entries.compact import packed as packed_entry
from kvstore.keys import Key
from kvstore.residency.read_path import Found
from kvstore.residency.transcode import raw_entry
from kvstored.calls.replies import encoded_reply, hit_frames, hit_header
from kvstored_client import Client
from kvstored_client.decoding import ENCODINGS, Packed, Unpacking, accepted, shape_of
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import EARLY_NBYTES, BadFrame, parse_frame

DOORS = ("shared memory", "stream")


@pytest.fixture(params=DOORS)
def clients(request: pytest.FixtureRequest, shared_daemon) -> tuple[Client, Client]:
    """One that decodes and one that lets the daemon decode, through the same door."""
    near = request.param == "shared memory"
    here, there = (
        shared_daemon.client(shared_memory=near, decode=decode, framework="torch") for decode in ("client", "daemon")
    )
    return here, there


def values(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "k": torch.randn(2, 96, 2, 64, generator=generator).to(dtype),
        "v": torch.randn(2, 96, 2, 64, generator=generator).to(dtype),
        "state": torch.randn(1000, generator=generator).to(dtype),
        "ids": torch.arange(7),
        "empty": torch.empty(0, 3, dtype=dtype),
    }


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def sink(client: Client, key: bytes) -> None:
    """Put the same values, and down to warm with them."""
    client.put(key, {"k": values(torch.float32)["k"]})
    assert client.demote(key) == 1


def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From here on: the bytes of each entry that this process decodes."""
    calls: list[int] = []
    decode = Packed.decode

    def counting(self: Packed, parts, targets) -> None:
        calls.append(self.nbytes)
        decode(self, parts, targets)

    unpack = Unpacking.__init__

    def counting_as_it_comes(self: Unpacking, packed, targets) -> None:
        calls.append(packed.nbytes)
        unpack(self, packed, targets)

    monkeypatch.setattr(Packed, "decode", counting)
    monkeypatch.setattr(Unpacking, "__init__", counting_as_it_comes)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_client_and_daemon_decode_the_same_bits(clients, monkeypatch, dtype):
    here, there = clients
    tensors = values(dtype)
    here.put(b"packed", tensors)
    assert here.demote(b"packed") == 1
    calls = packed_calls(monkeypatch)
    theirs = there.get(b"packed")
    assert calls == []
    ours = here.get(b"packed")
    assert len(calls) == 1
    assert calls[0] < sum(x.nbytes for x in tensors.values()) / 1.8
    assert (ours.tier, ours.encoding, ours.lossy) == (theirs.tier, theirs.encoding, theirs.lossy)
    assert ours.encoding in ENCODINGS
    assert list(ours.tensors) == list(theirs.tensors)
    for name, x in theirs.tensors.items():
        assert ours.tensors[name].shape == x.shape
        assert torch.equal(bits(ours.tensors[name]), bits(x))
    here.delete(b"packed")


def test_out_is_filled_whether_or_not_it_is_dense(clients, monkeypatch):
    here, there = clients
    sink(here, b"packed out")
    due = there.get(b"packed out").tensors["k"]
    calls = packed_calls(monkeypatch)
    dense, strided = torch.zeros(due.shape), torch.zeros(*due.shape[:-1], 128)[..., ::2]
    array = np.zeros(tuple(due.shape), dtype=np.float32)
    for out in (dense, strided, array):
        sink(here, b"packed out")  # put anew: a second hit of the same would be promoted
        assert here.get(b"packed out", out={"k": out}).tensors["k"] is out
        assert np.array_equal(np.asarray(out), due.numpy())
    assert len(calls) == 3
    here.delete(b"packed out")


def test_what_is_raw_or_exact_travels_as_it_is(clients, monkeypatch):
    here, _ = clients
    calls = packed_calls(monkeypatch)
    x = torch.randn(100, 64)
    here.put(b"hot", {"k": x})
    here.put(b"exact", {"k": x}, fidelity="exact")
    here.demote(b"exact")
    assert torch.equal(here.get(b"hot").tensors["k"], x)
    assert torch.equal(here.get(b"exact").tensors["k"], x)
    assert calls == []
    here.delete(b"hot", b"exact")


def test_a_batch_mixes_packed_raw_and_missing(clients):
    here, there = clients
    for i in range(6):
        here.put(b"mix%d" % i, {"k": torch.full((64, 64), float(i)) + torch.randn(64, 64)})
    here.demote(b"mix1", b"mix4")
    keys = [b"mix%d" % i for i in range(7)]
    for mine, theirs in zip(here.get_many(keys), there.get_many(keys), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine.tensors["k"], theirs.tensors["k"])
    here.delete(*keys)


def test_a_view_is_decoded_by_the_daemon(clients, monkeypatch):
    here, there = clients
    sink(here, b"packed view")
    due = there.get(b"packed view").tensors["k"]
    with here.lease(b"packed view") as hit:
        assert torch.equal(hit.tensors["k"], due)
    here.delete(b"packed view")


def test_nothing_is_accepted_without_the_kernel(monkeypatch):
    monkeypatch.setattr("kvstored_client.decoding._has_kernel", lambda: False)
    assert accepted("auto") == ()
    assert accepted("client") == ENCODINGS
    monkeypatch.setattr("kvstored_client.decoding._has_kernel", lambda: True)
    assert accepted("auto") == ENCODINGS
    assert accepted("daemon") == ()
    with pytest.raises(ValueError, match="decode is one of"):
        Client("unix:/nowhere", decode="perhaps")  # type: ignore[arg-type]


def test_on_the_daemons_own_host_small_entries_are_decoded_by_the_daemon(shared_daemon, monkeypatch):
    monkeypatch.setattr("kvstored_client.decoding._has_kernel", lambda: True)
    calls = packed_calls(monkeypatch)
    decoded_here = {}
    for near in (True, False):
        client = shared_daemon.client(shared_memory=near)
        sink(client, b"small")
        calls.clear()
        assert client.get(b"small").encoding in ENCODINGS
        decoded_here[near] = len(calls)
    assert decoded_here == {True: 0, False: 1}
    client.delete(b"small")


def header(**changes) -> pb.GetHeader:
    spec = {"name": "k", "dtype": pb.DTYPE_FLOAT32, "shape": [64]}
    codes = pb.TensorSpec(name="", dtype=pb.DTYPE_UINT8, shape=[32])
    packed = {"encoding": "nf4", "parts": [codes], "attrs": "{}", **changes}
    return pb.GetHeader(tensors=[pb.TensorSpec(**spec)], nbytes=256, packed=[pb.PackedTensor(**packed)])


@pytest.mark.parametrize(
    "changes",
    [
        {"encoding": "gzip"},
        {"parts": []},
        {"parts": [pb.TensorSpec(name=str(i), dtype=pb.DTYPE_UINT8, shape=[1]) for i in range(17)]},
        {"parts": [pb.TensorSpec(name="", dtype=pb.DTYPE_UINT8, shape=[1 << 40])]},
        {"parts": [pb.TensorSpec(name="", dtype=pb.DTYPE_UINT8, shape=[1 << 20])]},
        {"attrs": "[]"},
        {"attrs": "{" * 100},
        {"attrs": '"' + "x" * 5000 + '"'},
    ],
)
def test_a_header_that_cannot_be_is_refused_before_anything_is_allocated(changes):
    from kvstore.errors import InvalidEntry, KvstoreError

    good = header()
    assert Packed(good, shape_of(good)).nbytes == 32
    bad = header(**changes)
    with pytest.raises(KvstoreError) as refused:
        Packed(bad, shape_of(bad))
    assert isinstance(refused.value, InvalidEntry) or "at most" in str(refused.value)


def test_parts_that_do_not_fit_are_a_miss_not_a_crash():
    from kvstore.errors import CodecError

    message = header()
    packed = Packed(message, shape_of(message))
    with pytest.raises(CodecError):
        packed.decode([np.zeros(32, np.uint8)], {"k": np.zeros(256, np.uint8)})


def found(tensors: dict[str, torch.Tensor]) -> tuple[Found, bytes]:
    """An entry that stays encoded, and the bytes that follow its header."""
    entry = encode_entry(raw_entry(Key(b"k"), tensors), codec_for("auto"))
    frames = [
        parse_frame(frame, pb.GetFrame)
        for frame in hit_frames(0, encoded_reply(Found(Key(b"k"), "warm", entry, 0.0)), 1)
    ]
    return Found(Key(b"k"), "warm", entry, 0.0), b"".join(bytes(frame.chunk) for frame in frames)


def unpacking(of: Found) -> tuple[Unpacking, dict[str, np.ndarray]]:
    header = pb.GetHeader.FromString(hit_header(0, encoded_reply(of)))
    targets = {name: np.full(t.spec.nbytes, 7, np.uint8) for name, t in of.entry.tensors.items()}
    return Unpacking(Packed(header, shape_of(header)), targets), targets


def test_an_entry_of_as_many_tensors_as_may_be_has_as_many_parts_as_they_have():
    """A pressed cache of 30 layers has 60 tensors and 300 parts: the limit of 256 tensors was held against parts."""
    generator = torch.Generator().manual_seed(5)
    tensors = {f"{role}.{i}": torch.randn(1, 2, 96, 32, generator=generator) for role in "kv" for i in range(128)}
    of, data = found(tensors)
    assert sum(len(t.parts) for t in of.entry.tensors.values()) > 3 * 256
    ours, targets = unpacking(of)
    ours.take(memoryview(data))
    ours.finish()
    for name, held in of.entry.tensors.items():
        assert np.array_equal(targets[name], as_bytes(codec_named(held.encoding).decode(held)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cut", [1, 3, 1000, 4097, 1 << 30])
def test_however_the_bytes_of_an_entry_are_cut_it_decodes_to_the_same(cut):
    """Also where a tensor begins at an odd address of a message, or one message ends in the middle of a part."""
    tensors = {"odd": torch.arange(3, dtype=torch.uint8), **values(torch.float32)}
    of, data = found(tensors)
    ours, theirs = unpacking(of), unpacking(of)
    theirs[0].take(memoryview(data))
    theirs[0].finish()
    for start in range(0, len(data), cut):
        ours[0].take(memoryview(bytes(data[start : start + cut])))
    ours[0].finish()
    for name in tensors:
        assert np.array_equal(ours[1][name], theirs[1][name])
    assert np.array_equal(ours[1]["ids"].view(np.int64), np.arange(7))
    assert np.array_equal(ours[1]["odd"], np.arange(3))


def test_more_or_fewer_bytes_than_an_encoded_entry_has_are_no_entry():
    of, data = found(values(torch.float32))
    with pytest.raises(BadFrame, match="due"):
        unpacking(of)[0].take(memoryview(data + b"x"))
    short, _ = unpacking(of)
    short.take(memoryview(data[:-1]))
    with pytest.raises(BadFrame, match="1 bytes early"):
        short.finish()


def test_a_large_tensor_ends_its_frame_so_that_it_is_decoded_while_the_next_one_comes():
    of, data = found({name: torch.randn(4, 2048, 2, 64) for name in ("k", "v")})
    frames = [parse_frame(frame, pb.GetFrame) for frame in hit_frames(0, encoded_reply(of), 1)]
    first = sum(part.nbytes for part in of.entry.tensors["k"].parts.values())
    assert first >= EARLY_NBYTES
    assert [len(frame.chunk) for frame in frames] == [first, len(data) - first]
    small, _ = found(values(torch.float32))
    assert len(list(hit_frames(0, encoded_reply(small), 1))) == 1


@pytest.mark.parametrize("tokens", [96, 4096])
def test_what_is_said_of_an_entry_is_what_it_is_whether_it_is_kept_or_not(tokens):
    """A small one in one piece of memory, said afresh each time, and a large one that keeps it."""
    generator = torch.Generator().manual_seed(4)
    tensors = {
        "k": torch.randn(2, tokens, 2, 64, generator=generator),
        "n": torch.arange(3, dtype=torch.uint8),
        "v": torch.randn(2, tokens, 2, 64, generator=generator),
    }
    loose = encode_entry(raw_entry(Key(b"k"), tensors), codec_for("auto"))
    entry = packed_entry(loose)
    assert (entry is loose) == (tokens == 4096)
    for _ in range(2):
        sent = encoded_reply(Found(Key(b"k"), "warm", entry, 1.5))
        head = pb.GetHeader.FromString(hit_header(3, sent, 9))
        assert (head.index, head.tier, head.age_s, head.boot_epoch) == (3, pb.TIER_WARM, 1.5, 9)
        assert (head.nbytes, head.encoding, head.lossy) == (loose.value_nbytes, "nf4-kv2", True)
        assert list(head.relative_errors) == list(loose.receipt.values())
        assert [(spec.name, tuple(spec.shape)) for spec in head.tensors] == [
            (name, tuple(x.shape)) for name, x in tensors.items()
        ]
        for said, held in zip(head.packed, loose.tensors.values(), strict=True):
            assert (said.encoding, json.loads(said.attrs or "{}")) == (held.encoding, dict(held.attrs))
            assert [(part.name, tuple(part.shape)) for part in said.parts] == [
                (suffix, tuple(part.shape)) for suffix, part in held.parts.items()
            ]
        payload = b"".join(as_bytes(part).tobytes() for held in loose.tensors.values() for part in held.parts.values())
        frames = [parse_frame(frame, pb.GetFrame) for frame in hit_frames(3, sent, 9)]
        assert b"".join(bytes(frame.chunk) for frame in frames) == payload
        assert pb.EntryEnd.FromString(bytes(frames[-1].end)).xxh3 == xxhash.xxh3_64(payload).intdigest()
    assert (entry.kept_reply is None) == (tokens == 96)


def test_a_shape_is_known_by_all_that_is_alike_and_by_nothing_else():
    assert shape_of(header(attrs="{}")) is shape_of(header(attrs='{"role": "key"}'))
    other = header(parts=[pb.TensorSpec(name="", dtype=pb.DTYPE_INT8, shape=[32])])
    assert shape_of(header()) is not shape_of(other)
    assert shape_of(other).coded[0].parts[""].dtype == "int8"
    wide = pb.GetHeader(tensors=[pb.TensorSpec(name="x" * 60 + str(i), dtype=1, shape=[1]) for i in range(100)])
    assert shape_of(wide) is not shape_of(wide), "too long to be remembered"
    assert shape_of(wide) == shape_of(wide)

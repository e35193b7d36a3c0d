"""What is fuzzed: one function a parser. It returns, or raises the one error that parser may raise; all else is a bug.

A checksum would stop nearly every mutation of a record at the door, so `record` repairs checksums, key and lengths
first: what is behind the door must stand on its own.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import isfinite
from pathlib import Path

import numpy as np
import torch
import xxhash
from google.protobuf.message import DecodeError

from kvstore.arrays import ENTRY_MAX_NBYTES
from kvstore.codecs import check_entry, codec_named, decode_entry
from kvstore.codecs.basis import Basis, read_basis, use
from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.codecs.kv_learned import encoded_in
from kvstore.codecs.layers import encode_runs
from kvstore.disk import rows as index_rows
from kvstore.disk.columns import columns
from kvstore.disk.occupancy import Occupancy
from kvstore.disk.rows import parse_row
from kvstore.disk.segments import Place
from kvstore.dtypes import TensorSpec
from kvstore.entries import record as records
from kvstore.entries.compression import Compression
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.entries.safetensors_header import Slot, parse_header, tensor_rows, write_header
from kvstore.errors import CodecError, ConfigError, KvstoreError, RecordCorrupt
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import labelled
from kvstore.residency.read_path import Found
from kvstored.access.tokens import read_tokens
from kvstored.calls.budget import Budget
from kvstored.calls.puts import PutStream
from kvstored.calls.replies import encoded_reply, hit_header
from kvstored_client.decoding import ENCODINGS, Packed, shape_of
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import BadFrame, parse_frame
from tests.kvstore.codecs import tiny_model

KEY = Key(b"fuzz")
LIMIT_NBYTES = 1 << 20
_CUT = struct.Struct("<H")


def frames(data: bytes) -> None:
    """A Put: messages, each behind its length, through the checks of the daemon."""
    stream = PutStream(LIMIT_NBYTES, Budget(4 * LIMIT_NBYTES), lambda _specs: None)
    try:
        at = 0
        while at + _CUT.size <= len(data):
            (length,) = _CUT.unpack_from(data, at)
            at += _CUT.size
            stream.take(parse_frame(data[at : at + length], pb.PutFrame))
            at += length
        stream.end()
    except (BadFrame, DecodeError, KvstoreError):
        pass
    finally:
        stream.close()
    assert stream._budget.used_nbytes == 0  # refused or not: what is still counted then is counted for ever


def record(data: bytes) -> None:
    """A record read from disk, its checksums right whatever the bytes say."""
    for candidate in (data, _repaired(data)):
        try:
            entry = records.unpack(candidate, KEY, limit_nbytes=LIMIT_NBYTES)
        except RecordCorrupt:
            continue
        assert entry.nbytes < 64 * LIMIT_NBYTES


def safetensors(data: bytes) -> None:
    """A header before so many bytes of data (the first four)."""
    try:
        slots, _ = parse_header(data[4:], int.from_bytes(data[:4], "little"))
    except RecordCorrupt:
        return
    assert len(slots) <= 4096


def tokens(data: bytes) -> None:
    """A tokens file."""
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            read_tokens(Path(file.name))
        except (ConfigError, UnicodeDecodeError):
            return


def rows(data: bytes) -> None:
    """A row of the index, its checksum right whatever the bytes say: one by one and as columns it is the same row.

    One that is believed can be written again, and leads to numbers that a start of the store can reckon with.
    """
    for body in (data[:-4], data):
        row = body + (xxhash.xxh3_64_intdigest(body + KEY) & 0xFFFFFFFF).to_bytes(4, "little")
        found, whole = parse_row(KEY, row), columns([KEY], [row])
        assert whole.damaged == ([KEY] if found is None else [])
        if found is None:
            continue
        meta = found.meta
        assert (whole.keys, *whole.parents, *whole.namespaces) == ([KEY], meta.parent, meta.owner.namespace)
        assert whole.pinned_until.tolist() == [meta.pinned_until]
        assert all(map(isfinite, (meta.created_at, meta.last_hit_at)))
        assert meta.value_nbytes <= ENTRY_MAX_NBYTES
        later = replace(found, seq=found.seq + 1, place=found.place._replace(segment=found.place.segment + 1))
        assert len(index_rows.pack_row(KEY, later)) <= len(row) + 1024
        places = np.array([found.place], np.int64)
        assert Occupancy().recover(places[:, 1:]) is not None


def attrs(data: bytes) -> None:
    """What a record says of its tensors, as JSON: read, described, decoded and sent as it is.

    Each tensor decodes to what is said of it, or is a CodecError; what is sent encoded a client understands.
    """
    fixed, _, parts = _encoded()
    try:
        found = {row.name: row for row in tensor_rows({"kvstored.tensors": data.decode("utf-8", "replace")})}
        held = {name: records.tensor_of(row, fixed, parts) for name, row in found.items()}
    except RecordCorrupt:
        return
    entry = Entry(KEY, held, lossy=True)
    if entry.value_nbytes > LIMIT_NBYTES:
        return
    assert all(error >= 0 for error in entry.receipt.values())
    try:
        check_entry(entry)
    except CodecError:
        try:
            decode_entry(entry)
        except CodecError:
            return
        raise AssertionError("what cannot be passed on was decoded") from None
    decoded = decode_entry(entry)
    assert {name: (str(x.dtype)[6:], tuple(x.shape)) for name, x in decoded.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in entry.specs.items()
    }
    if entry.is_encoded_in(ENCODINGS):
        reply = encoded_reply(Found(KEY, "cold", entry, 0.0))
        header = pb.GetHeader.FromString(hit_header(0, reply))
        Packed(header, shape_of(header))


def learned(data: bytes) -> None:
    """The codes of a tensor of kv-learned, in the golden basis: both doors agree, and nothing is infinite."""
    encoded = _learned()
    main = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    candidate = EncodedTensor(encoded.spec, encoded.encoding, {"": main}, encoded.attrs)
    codec = codec_named(encoded.encoding)
    try:
        decoded = codec.decode(candidate)
    except CodecError:
        return
    assert bool(torch.isfinite(decoded).all())
    codec.check(candidate)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "attrs": attrs,
    "frames": frames,
    "learned": learned,
    "record": record,
    "rows": rows,
    "safetensors": safetensors,
    "tokens": tokens,
}


def _repaired(data: bytes) -> bytes:
    fixed = records._FIXED
    if len(data) < fixed.size:
        return data
    fields = list(fixed.unpack_from(data))
    body = data[fixed.size :]
    json_nbytes = min(fields[9], len(body))
    stored = body[json_nbytes:]
    fields[0], fields[1], fields[2] = records.MAGIC, records.VERSION, fixed.size
    fields[4] = records._key_hash(KEY)
    fields[9], fields[12] = json_nbytes, len(KEY)
    fields[14], fields[15] = len(stored), xxhash.xxh3_64_intdigest(stored)
    head = fixed.pack(*fields) + body[:json_nbytes]
    fields[3] = xxhash.xxh3_64_intdigest(head[records._CHECKED_FROM :])
    return fixed.pack(*fields) + body


@cache
def _encoded() -> tuple[dict[str, Slot], str, torch.Tensor]:
    """Slots, what is said of the tensors, and the data of an entry with a tensor in each encoding."""
    x = torch.linspace(-1, 1, 2 * 66 * 2 * 32).reshape(2, 66, 2, 32).to(torch.float16)
    at = torch.arange(66.0)[:, None]
    turning = torch.randn(2, 66, 2, 32, generator=torch.Generator().manual_seed(1))
    turning[..., 0], turning[..., 16] = 30 * at.cos(), 30 * at.sin()
    means = codec_named("nf4-kv2").encode("k", turning.to(torch.float16))  # its receipt differs by kernel, by 1e-3
    runs = [(0, 1, codec_named("int8")), (1, 2, codec_named("nf4-kv"))]
    tensors = {
        "k": codec_named("nf4-kv").encode("k", x),
        "m": replace(means, attrs={**means.attrs, "relative_error": 0.08}),
        "n": codec_named("nf4").encode("n", x),
        "i": codec_named("int8").encode("i", x),
        "l": encode_runs("l", x, NO_HINTS, runs),
        "r": EncodedTensor(TensorSpec("int64", (3,)), "raw", {"": torch.arange(3)}),
    }
    packed = records.pack(Entry(KEY, tensors, lossy=True), Meta(1.0, 2.0, 1.0, 0), compression=Compression.NONE)
    data = torch.from_numpy(np.concatenate(packed.data))
    slots, facts = parse_header(packed.head[records.FIXED_NBYTES :], data.numel())
    return slots, facts["kvstored.tensors"], data


@cache
def _golden() -> Basis:
    return use(read_basis(Path(__file__).parents[1] / "golden" / "kv-learned.safetensors"))


@cache
def _learned() -> EncodedTensor:
    return encoded_in(_golden(), "v", tiny_model.values(12).to(torch.float16), Hints(prefix_start=False))


def seeds() -> dict[str, list[bytes]]:
    """Valid inputs of each target: what the corpus on disk was begun with."""
    x = torch.arange(48, dtype=torch.float32).reshape(4, 12)
    entry = Entry(KEY, {"k": EncodedTensor(TensorSpec("float32", (4, 12)), "raw", {"": x})}, lossy=False)
    packed = records.pack(entry, Meta(1.0, 2.0, 1.0, x.numel() * 4, sliding=True, exact=True))
    whole = packed.head + b"".join(bytes(memoryview(part.data)) for part in packed.data)
    spec = pb.TensorSpec(name="x", dtype=pb.DTYPE_UINT8, shape=[5])
    header = pb.PutHeader(key=b"key", tensors=[spec], nbytes=5, ttl_s=3.0)
    one = pb.PutFrame(header=header, chunk=b"12345", end=pb.EntryEnd()).SerializeToString()
    parts = [pb.PutFrame(header=header), pb.PutFrame(chunk=b"123"), pb.PutFrame(chunk=b"45", end=pb.EntryEnd())]
    many = [part.SerializeToString() for part in parts]
    slots = {"a": Slot("F32", (2, 3), 0, 24), "b": Slot("BF16", (4,), 24, 32)}
    meta = Meta(1.0, 2.0, 1.0, 5, encoding="nf4-kv", parent=Key(b"before"), owner=labelled("model@1"))
    row = index_rows.Row(Place(3, 4096, 900), 400, 7, meta)
    text = _encoded()[1]
    return {
        "attrs": [text.encode(), *(json.dumps([one]).encode() for one in json.loads(text))],
        "learned": [_learned().parts[""].numpy().tobytes()],
        "frames": [_cut(one), b"".join(map(_cut, many)), _cut(one) * 2],
        "record": [whole],
        "rows": [
            index_rows.pack_row(KEY, row),
            index_rows.pack_row(KEY, replace(row, meta=Meta(1.0, 2.0, 1.0, 5, pinned=True))),
        ],
        "safetensors": [(32).to_bytes(4, "little") + write_header(slots, {"fact": "text"})],
        "tokens": [
            b'[[token]]\nname = "a"\nsha256 = "' + b"0" * 64 + b'"\nrights = ["read"]\n'
            b'[[certificate]]\nname = "b"\nrights = ["admin"]\n'
        ],
    }


def _cut(message: bytes) -> bytes:
    return _CUT.pack(len(message)) + message

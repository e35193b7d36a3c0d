"""What is fuzzed: one function a parser. It returns, or raises the one error that parser may raise; all else is a bug.

A checksum would stop nearly every mutation of a record at the door, so `record` repairs checksums, key and lengths
first: what is behind the door must stand on its own.
"""

import struct
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from google.protobuf.message import DecodeError

from kvstore.dtypes import TensorSpec
from kvstore.entries import record as records
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.entries.safetensors_header import Slot, parse_header, write_header
from kvstore.errors import ConfigError, KvstoreError, RecordCorrupt
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstored.access.tokens import read_tokens
from kvstored.calls.budget import Budget
from kvstored.calls.puts import PutStream
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import BadFrame, parse_frame

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
        stream.check_whole()
    except (BadFrame, DecodeError, KvstoreError):
        pass
    finally:
        stream.close()
    assert stream._budget.used_nbytes <= 4 * LIMIT_NBYTES


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


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "record": record,
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
    return {
        "frames": [_cut(one), b"".join(map(_cut, many)), _cut(one) * 2],
        "record": [whole],
        "safetensors": [(32).to_bytes(4, "little") + write_header(slots, {"fact": "text"})],
        "tokens": [
            b'[[token]]\nname = "a"\nsha256 = "' + b"0" * 64 + b'"\nrights = ["read"]\n'
            b'[[certificate]]\nname = "b"\nrights = ["admin"]\n'
        ],
    }


def _cut(message: bytes) -> bytes:
    return _CUT.pack(len(message)) + message

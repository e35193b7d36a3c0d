"""Frames of the bulk streams: `PutFrame` and `GetFrame` of the proto, cut and joined by hand.

The bytes are plain protobuf, readable and writable by any generated code; only the payload never becomes a protobuf
object, which would cost two more copies on each side (0.2 GB/s measured through a `bytes` field, above 1 without).
Holds no state but a cursor; one Gather or Scatter belongs to one thread at a time.
"""

import struct
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from kvstore.keys import KEY_MAX_NBYTES
from kvstored_client.wire._pb import cache_pb2 as pb

CHUNK_NBYTES = 2 << 20
"""Payload of one frame. Measured over a unix socket, 16 MiB entries: see bench/RESULTS.md, Transport."""

EARLY_NBYTES = 512 << 10
"""A frame costs 0.1 to 0.3 ms whatever is in it; so much takes as long to decode, while the next one is on its way."""

UNUSUAL_FIELDS_MAX = 64
UNUSUAL_HEADERS_MAX_NBYTES = 64 << 10
"""Of a put's frame that is left to protobuf: what the daemon accepts of a header anyway."""

Bytes = NDArray[np.uint8]
_EMPTY = memoryview(b"")
_WIRE_BYTES, _WIRE_FIXED = 2, {1: 8, 5: 4}
_HEADER, _CHUNK, _END, _MISS = (n << 3 | 2 for n in (1, 2, 3, 4))


class BadFrame(ValueError):
    """Bytes that are not a frame, or a frame where another one was due."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. header, end, miss: the serialized submessage or None; chunk: a view of the message's own bytes."""

    header: memoryview | None = None
    chunk: memoryview = _EMPTY
    end: memoryview | None = None
    miss: memoryview | None = None


def parse_frame(data: bytes, kind: type[pb.PutFrame | pb.GetFrame]) -> Frame:
    """Take a message of this kind apart without copying. Raises BadFrame."""
    view = memoryview(data)
    found: dict[int, memoryview] = {}
    at = 0
    while at < len(view):
        tag = view[at]
        if tag not in (_HEADER, _CHUNK, _END, _MISS) or tag in found:
            return _parse_unusual(data, kind)
        size, at = _read_varint(view, at + 1)
        if size > len(view) - at:
            raise BadFrame(f"a field of {size} bytes in a frame with {len(view) - at} left")
        found[tag] = view[at : at + size]
        at += size
    return Frame(found.get(_HEADER), found.get(_CHUNK, _EMPTY), found.get(_END), found.get(_MISS))


def _parse_unusual(data: bytes, kind: type[pb.PutFrame | pb.GetFrame]) -> Frame:
    # Fields of a later version, or a field sent twice: protobuf's own rules decide, at protobuf's speed.
    if kind is pb.PutFrame:
        _check_unusual(memoryview(data))
    try:
        frame = kind.FromString(data)
    except DecodeError as error:
        raise BadFrame(f"not a frame: {error}") from None
    found = {field.name: value for field, value in frame.ListFields()}
    parts = {name: memoryview(found[name].SerializeToString()) for name in ("header", "end", "miss") if name in found}
    return Frame(chunk=memoryview(frame.chunk), **parts)


def _check_unusual(view: memoryview) -> None:
    """Raise BadFrame for more fields, or larger headers, than would be worth parsing: each becomes an object."""
    at = fields = headers_nbytes = 0
    while at < len(view):
        fields += 1
        tag, at = _read_varint(view, at)
        if tag & 7 == _WIRE_BYTES:
            size, at = _read_varint(view, at)
            headers_nbytes += size if tag == _HEADER else 0
            at += size
        elif tag & 7 in _WIRE_FIXED:
            at += _WIRE_FIXED[tag & 7]
        elif tag & 7:
            raise BadFrame("a group in a frame")
        else:
            _, at = _read_varint(view, at)
        if fields > UNUSUAL_FIELDS_MAX or headers_nbytes > UNUSUAL_HEADERS_MAX_NBYTES:
            raise BadFrame(
                f"a frame has at most {UNUSUAL_FIELDS_MAX} fields and headers of {UNUSUAL_HEADERS_MAX_NBYTES} bytes, "
                f"got more than {fields - 1} and {headers_nbytes}"
            )


def build_frame(header: bytes | None, pieces: Sequence[memoryview] = (), end: bytes | None = None) -> bytes:
    """A frame of a serialized header, the payload `pieces` joined, and a serialized EntryEnd: one copy."""
    parts: list[bytes | memoryview] = []
    if header is not None:
        parts += (bytes((_HEADER,)), _varint(len(header)), header)
    nbytes = sum(len(piece) for piece in pieces)
    if nbytes:
        parts += (bytes((_CHUNK,)), _varint(nbytes), *pieces)
    if end is not None:
        parts += (bytes((_END,)), _varint(len(end)), end)
    return b"".join(parts)


def build_miss(miss: pb.GetMiss) -> bytes:
    """A GetFrame that answers one key with a miss."""
    body = miss.SerializeToString()
    return bytes((_MISS,)) + _varint(len(body)) + body


def submessage(field: int, body: bytes) -> bytes:
    """A field of a message that holds another one, serialized."""
    return _BYTES[field << 3 | 2] + _varint(len(body)) + body


def put_header(key: bytes, parent: bytes | None, rest: bytes) -> bytes:
    """A PutHeader of checked keys. rest: its other fields, serialized."""
    if parent is None:
        return b"".join((_KEY_HEADS[len(key)], key, rest))
    return b"".join((_KEY_HEADS[len(key)], key, _PARENT_HEADS[len(parent)], parent, rest))


Placed = tuple[bytes, bytes | None, bytes, Sequence[tuple[int | None, int]]]
"""An entry in shared memory: what `put_header` is given, and (segment, start) of its tensors."""


def put_call(entries: Iterable[Placed], segment: int, start: int, *, copy_later: bool) -> bytes:
    """A LeaseCall that puts entries.

    segment, start: the room in which those lie that have no segment of their own, from where their start is counted.
    """
    parts: list[bytes] = []
    for key, parent, described, places in entries:
        header, item = put_header(key, parent, described), pb.IngestedEntry()
        for of, at in places:
            if of is None:
                item.places.add(segment=segment, start=start + at)
            else:
                item.places.add(segment=of, start=at)
        rest, size = item.SerializeToString(), _varint(len(header))
        parts += (_ENTRY_TAG, _varint(1 + len(size) + len(header) + len(rest)), _HEADER_TAG, size, header, rest)
    if copy_later:
        parts.append(_COPY_LATER)
    body = b"".join(parts)
    return b"".join((_PUT_TAG, _varint(len(body)), body))


def fixed64s(field: int, values: Sequence[int]) -> bytes:
    """A field `repeated fixed64` of a message."""
    return _BYTES[field << 3 | 2] + _varint(8 * len(values)) + struct.pack(f"<{len(values)}Q", *values)


def get_call(keys: Sequence[bytes], rest: bytes) -> bytes:
    """A LeaseCall that gets checked keys. rest: the other fields of its GetRequest, serialized."""
    body = _get_request(keys, rest)
    return b"".join((_GET_TAG, _varint(len(body)), body))


def _get_request(keys: Sequence[bytes], rest: bytes) -> bytes:
    lengths = set(map(len, keys))
    if len(lengths) == 1:  # hashes, as a rule: all of them in one step
        head = _KEY_HEADS[lengths.pop()]
        return b"".join((head, head.join(keys), rest))
    parts = [rest] * (2 * len(keys) + 1)
    parts[0:-1:2] = map(_KEY_HEADS.__getitem__, map(len, keys))
    parts[1::2] = keys
    return b"".join(parts)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _BYTES[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 35:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise BadFrame("a field's length is cut off or has more than 5 bytes")


_BYTES = [bytes((value,)) for value in range(256)]
_KEY_HEADS = [bytes((1 << 3 | 2,)) + _varint(nbytes) for nbytes in range(KEY_MAX_NBYTES + 1)]
"""What stands before a key of so many bytes, and before the key that it continues."""
_PARENT_HEADS = [
    _BYTES[pb.PutHeader.PARENT_FIELD_NUMBER << 3 | 2] + _varint(nbytes) for nbytes in range(KEY_MAX_NBYTES + 1)
]
_GET_TAG, _PUT_TAG = (_BYTES[n << 3 | 2] for n in (pb.LeaseCall.GET_FIELD_NUMBER, pb.LeaseCall.PUT_FIELD_NUMBER))
_ENTRY_TAG = _BYTES[pb.LeasePut.ENTRIES_FIELD_NUMBER << 3 | 2]
_HEADER_TAG = _BYTES[pb.IngestedEntry.HEADER_FIELD_NUMBER << 3 | 2]
_COPY_LATER = pb.LeasePut(copy_later=True).SerializeToString()


class Gather:
    """Reads a run of arrays as if they were one: pieces of at most a chunk, without copying.

    ends: positions that end a chunk too, once it has EARLY_NBYTES: the reader can begin with what it has.
    """

    def __init__(self, arrays: Sequence[Bytes], ends: Container[int] = ()) -> None:
        self._views = [array.data for array in arrays if array.size]
        self._ends = ends
        self.nbytes = sum(len(view) for view in self._views)

    def chunks(self, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[list[memoryview]]:
        """The payload of each frame in turn, as pieces to join; one empty list if there are no bytes at all."""
        pieces: list[memoryview] = []
        room = chunk_nbytes
        position = 0
        for view in self._views:
            at = 0
            while at < len(view):
                piece = view[at : at + room]
                pieces.append(piece)
                at += len(piece)
                position += len(piece)
                room -= len(piece)
                if not room or (chunk_nbytes - room >= EARLY_NBYTES and position in self._ends):
                    yield pieces
                    pieces, room = [], chunk_nbytes
        if pieces or not self.nbytes:
            yield pieces


class Scatter:
    """Fills a run of arrays from chunks in order, as if they were one."""

    def __init__(self, arrays: Sequence[Bytes]) -> None:
        self._arrays = [array for array in arrays if array.size]
        self.due_nbytes = sum(array.size for array in self._arrays)
        self.filled_nbytes = 0
        self._at = 0

    def write(self, chunk: memoryview) -> None:
        """Copy a chunk to where the last one ended. Raises BadFrame for more bytes than are due."""
        if len(chunk) > self.due_nbytes - self.filled_nbytes:
            raise BadFrame(f"more bytes than due: {self.filled_nbytes + len(chunk)} of {self.due_nbytes}")
        self.filled_nbytes += len(chunk)
        data = np.frombuffer(chunk, dtype=np.uint8)
        while data.size:
            target = self._arrays[0]
            n = min(data.size, target.size - self._at)
            # numpy lets other threads run while it copies; assigning to a memoryview does not.
            np.copyto(target[self._at : self._at + n], data[:n])
            data = data[n:]
            self._at += n
            if self._at == target.size:
                self._arrays.pop(0)
                self._at = 0


def cut_frames(header: bytes, payload: Gather, xxh3: int | None = None) -> Iterator[bytes]:
    """The frames of an entry: the header rides with the first chunk, the checksum with the last.

    xxh3: the checksum, where it is known.
    """
    checksum = xxhash.xxh3_64()
    head: bytes | None = header
    left = payload.nbytes
    for pieces in payload.chunks():
        for piece in pieces:
            if xxh3 is None:
                checksum.update(piece)
            left -= len(piece)
        end = None
        if not left:
            end = pb.EntryEnd(xxh3=checksum.intdigest() if xxh3 is None else xxh3).SerializeToString()
        yield build_frame(head, pieces, end)
        head = None

"""Requests of one message, measured before they are parsed: a hostile one would take a second of the event loop.

A request of 4 MiB, the most that a call may send, has room for two million empty keys, and each becomes an object. What
a call may name has 1.1 MiB at most, and the others a few hundred bytes; fields are counted without making anything of
them. Pure.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from google.protobuf.message import Message

from kvstore.errors import InvalidEntry
from kvstore.keys import KEY_MAX_NBYTES, KEYS_PER_CALL_MAX
from kvstored_client.wire._pb import cache_pb2 as pb

OTHER_FIELDS_MAX = 64
"""Fields of a request beside its keys, those of later versions included."""
FIELDS_MAX = KEYS_PER_CALL_MAX + OTHER_FIELDS_MAX
SMALL_MAX_NBYTES = 4 << 10
KEYS_MAX_NBYTES = KEYS_PER_CALL_MAX * (KEY_MAX_NBYTES + 3) + SMALL_MAX_NBYTES
UNCOUNTED_NBYTES = 3 * KEYS_PER_CALL_MAX
"""Fewer bytes hold no more fields than it would take to count: they are parsed as they are."""
_KEY_TAG = 1 << 3 | 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
MAX_NBYTES: Mapping[type[Message], int] = MappingProxyType(
    dict.fromkeys(
        (pb.GetRequest, pb.MatchRequest, pb.TouchRequest, pb.DeleteRequest, pb.PinRequest, pb.EvictRequest,
         pb.DemoteRequest, pb.PromoteRequest, pb.ExplainRequest),
        KEYS_MAX_NBYTES,
    )
)  # fmt: skip
"""Bytes of a request by its kind; of the others `SMALL_MAX_NBYTES`."""

M = TypeVar("M", bound=Message)


def read_request(kind: type[M], data: bytes) -> M:
    """Parse a request. Raises InvalidEntry for one that is too large or has too many fields, DecodeError for junk."""
    limit_nbytes = MAX_NBYTES.get(kind, SMALL_MAX_NBYTES)
    if len(data) > limit_nbytes:
        raise InvalidEntry(f"a {kind.DESCRIPTOR.name} has at most {limit_nbytes} bytes, got {len(data)}")
    if len(data) > UNCOUNTED_NBYTES and not _keys_of_one_length(data) and _has_more_fields(data, FIELDS_MAX):
        raise InvalidEntry(
            f"a call names at most {KEYS_PER_CALL_MAX} keys, got more than {FIELDS_MAX} fields in {len(data)} bytes"
        )
    return kind.FromString(data)


def _keys_of_one_length(data: bytes) -> bool:
    """Whether nearly all of it is few enough keys of one length, as hashes are: told in a microsecond."""
    step = data[1] + 2
    count = max(0, len(data) - OTHER_FIELDS_MAX) // step
    if data[1] >= 0x80 or count > KEYS_PER_CALL_MAX:
        return False
    end = count * step
    return data[0:end:step] == bytes((_KEY_TAG,)) * count and data[1:end:step] == data[1:2] * count


def _has_more_fields(data: bytes, most: int) -> bool:
    """Whether there are more fields than so many; looks at one more, and at no value."""
    at = 0
    for _ in range(most):
        if at >= len(data):
            return False
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(data, at)
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            return True  # a group, which no version of ours has: it could hold any number of fields
    return at < len(data)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    return value, len(data) if shift < 70 else at


def keys_named(data: bytes) -> tuple[int, bytes]:
    """How many keys a request names, and the first (b"": none), for a line in a log: every kind has them in field 1."""
    keys = read_request(pb.EvictRequest, data).keys
    return len(keys), keys[0] if keys else b""

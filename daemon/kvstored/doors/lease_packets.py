"""Replies of the lease socket that are no answer, and the number that ties a reply to its call. No state."""

import struct

from kvstore.shm.arena import Handed
from kvstored_client.wire._pb import cache_pb2 as pb

_NUMBERED = struct.Struct("<BQ")
NUMBER_NBYTES = _NUMBERED.size
NUMBER_TAG = 14 << 3 | 1  # of a LeaseReply
_CALL_NUMBER_TAG = 9 << 3 | 1  # of a LeaseCall, where it comes first


class UseStream(Exception):
    """This call cannot be served here: the client asks again over gRPC."""


class MoreSegments(UseStream):
    """The answer needs more segments than a packet may bring: some come with this, the client asks again for the rest.

    A client that does not know this takes the stream, and shared memory some calls later.
    """


class Revoked(OSError):
    """This client's user is not the caller any more that it was when it connected."""


def refusal(kind: str, message: str) -> bytes:
    """A reply that is an error: kind is a class of kvstore.errors, or "UseStream"."""
    return pb.LeaseReply(error=pb.LeaseError(kind=kind, message=message)).SerializeToString()


def numbered(reply: bytes, number: int) -> bytes:
    """A reply as that to call `number`; 0 for a call that had none."""
    return reply + _NUMBERED.pack(NUMBER_TAG, number) if number else reply


def number_of(packet: bytes) -> int:
    """The number of a call that cannot be read otherwise."""
    if len(packet) < _NUMBERED.size:
        return 0
    tag, number = _NUMBERED.unpack_from(packet)
    return int(number) if tag == _CALL_NUMBER_TAG else 0


def told(segment: Handed, *, writable: bool = False) -> pb.Segment:
    """What is said of a segment whose descriptors come along."""
    return pb.Segment(number=segment.number, nbytes=segment.nbytes, writable=writable, device=segment.device)

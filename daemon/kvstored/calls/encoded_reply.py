"""Header and payload of an entry that is sent without decoding. Large entries keep theirs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import xxhash

from kvstore import arrays
from kvstore.entries.compact import Layout, PackedTensors, layout_of
from kvstore.entries.entry import Entry
from kvstore.hit import TensorInfo
from kvstore.residency.read_path import Found
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import Bytes, submessage
from kvstored_client.wire.messages import relative_errors, tensor_specs


@dataclass(frozen=True, eq=False)
class Contents:
    """serialized: the fields of a GetHeader that are the same each time. payload: the bytes behind it, by part.

    ends: where each tensor's bytes end: one that is there whole can be decoded. value_nbytes: once decoded.
    """

    serialized: bytes
    payload: Sequence[Bytes]
    nbytes: int
    ends: frozenset[int]
    value_nbytes: int

    @cached_property
    def xxh3(self) -> int:
        """The checksum of the bytes, as they were when it was first asked for."""
        checksum = xxhash.xxh3_64()
        for part in self.payload:
            checksum.update(part.data)
        return int(checksum.intdigest())


class EncodedReply(NamedTuple):
    """An entry found, to be sent as it is held. again: it was before."""

    tier: str
    age_s: float
    contents: Contents
    entry: Entry
    again: bool


def encoded_reply(found: Found) -> EncodedReply:
    """The reply for an entry found. A large entry keeps it; for a small one it would cost a third of its size."""
    entry = found.entry
    if isinstance(entry.kept_reply, Contents):
        return EncodedReply(found.tier, found.age_s, entry.kept_reply, entry, again=True)
    if isinstance(entry.tensors, PackedTensors):
        contents = _contents(entry, entry.tensors.payload, entry.tensors.attrs)
        return EncodedReply(found.tier, found.age_s, contents, entry, again=False)
    tensors = entry.tensors.values()
    payload = [arrays.as_bytes(part) for held in tensors for part in held.parts.values()]
    contents = _contents(entry, payload, [dict(held.attrs) for held in tensors])
    entry.keep_reply(contents)
    return EncodedReply(found.tier, found.age_s, contents, entry, again=False)


def _contents(entry: Entry, payload: Sequence[Bytes], attrs: Sequence[dict[str, object]]) -> Contents:
    head, packed, counts = _alike(layout_of(entry))
    own = pb.GetHeader(
        nbytes=entry.value_nbytes,
        encoding=entry.encoding,
        lossy=entry.lossy,
        relative_errors=relative_errors(entry.receipt, lossy=entry.lossy),
    )
    # Messages one behind the other are one message.
    serialized = [head, own.SerializeToString()]
    for described, facts in zip(packed, attrs, strict=True):
        written = pb.PackedTensor(attrs=json.dumps(facts, allow_nan=False)) if facts else pb.PackedTensor()
        serialized.append(submessage(pb.GetHeader.PACKED_FIELD_NUMBER, described + written.SerializeToString()))
    ends = [0, *accumulate(part.size for part in payload)]
    return Contents(b"".join(serialized), payload, ends[-1], frozenset(ends[n] for n in counts), entry.value_nbytes)


@lru_cache(maxsize=1024)
def _alike(layout: Layout) -> tuple[bytes, tuple[bytes, ...], tuple[int, ...]]:
    """What all entries of one shape share: header bytes, bytes a tensor, the running count of parts."""
    specs = {name: TensorInfo(spec.dtype, spec.shape) for name, spec in zip(layout.names, layout.specs, strict=True)}
    head = pb.GetHeader(tensors=tensor_specs(specs))
    packed: list[bytes] = []
    counts: list[int] = []
    for at, encoding in enumerate(layout.encodings):
        parts = {
            part.suffix: TensorInfo(str(part.dtype).removeprefix("torch."), part.shape)
            for part in layout.parts
            if part.tensor == at
        }
        packed.append(pb.PackedTensor(encoding=encoding, parts=tensor_specs(parts)).SerializeToString())
        counts.append(len(parts) + (counts[-1] if counts else 0))
    return head.SerializeToString(), tuple(packed), tuple(counts)

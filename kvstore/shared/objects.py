"""An object: an entry as it lies in the shared store, and what is checked before any of it is believed.

    object = head (96 bytes) | namespace, masked (96 bytes) | record (docs/record-format.md) under the alias
    head   = magic, version, sizes, seconds to live, when it was published, the namespace's tag and epoch | HMAC

Little-endian. A head is authenticated by itself, so a lookup believes its sizes and its time to live. Invariant: an
entry comes out only if the head's HMAC, the record's checksums, its key, its sizes and, unless the configuration says
that records are in clear, its seal are right; everything else is RecordCorrupt, which is a miss.
Pure: no clock, no network. Any thread.
"""

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import xxhash

from kvstore.arrays import ENTRY_MAX_NBYTES
from kvstore.boundary import Blaming
from kvstore.entries import record
from kvstore.entries.entry import Entry
from kvstore.entries.sealing import Key as SealKey
from kvstore.entries.sealing import Seals
from kvstore.errors import RecordCorrupt
from kvstore.keys import NAMESPACE_MAX_NBYTES, Key
from kvstore.metadata.meta import Meta
from kvstore.shared import HEAD_NBYTES, Buffer
from kvstore.shared.names import MAC_NBYTES, VERSION, Names

MAGIC = b"KVSO"
_HEAD = struct.Struct("<4sHHQQddQ16s")
_PLAIN_NBYTES = _HEAD.size
RECORD_AT = HEAD_NBYTES + NAMESPACE_MAX_NBYTES
"""Where the record begins: a multiple of 16, so that what lies aligned in it lies aligned in the object."""
TTL_MAX_S = 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Head:
    """A head whose HMAC is right. published_at: by the writer's clock, only to show it."""

    namespace_nbytes: int
    record_nbytes: int
    value_nbytes: int
    ttl_s: float
    published_at: float
    namespace_epoch: int
    tag: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole object."""
        return RECORD_AT + self.record_nbytes


@dataclass(frozen=True, slots=True)
class Arrived:
    """An entry from the shared store, checked. exact: it was put to stay exact."""

    entry: Entry
    ttl_s: float
    exact: bool
    namespace: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What an object says of its entry beside the value. ttl_s: what it has to live after a use."""

    namespace: str
    ttl_s: float
    exact: bool
    now: float
    namespace_epoch: int


def made(names: Names, alias: Key, entry: Entry, facts: Facts, seal: SealKey | None) -> list[Buffer]:
    """The object of an entry in its form below hot, as buffers. Raises EntryTooLarge as `record.pack`."""
    renamed = Entry(alias, entry.tensors, lossy=entry.lossy)
    meta = Meta(facts.now, facts.now + facts.ttl_s, facts.ttl_s, entry.value_nbytes, exact=facts.exact)
    packed = record.pack(renamed, meta, seal=seal)
    text = facts.namespace.encode()
    plain = _HEAD.pack(
        MAGIC, VERSION, len(text), packed.nbytes, entry.value_nbytes, facts.ttl_s, facts.now, facts.namespace_epoch,
        names.tag(facts.namespace),
    )  # fmt: skip
    # Padded before it is masked: the length of a name is told by the head, which few can read.
    masked = names.masked(alias, text.ljust(NAMESPACE_MAX_NBYTES, b"\0"))
    head = plain + names.head_mac(alias, plain)
    return [head + masked + packed.head, *(part.data for part in packed.data)]


def parse_head(names: Names, alias: Key, data: bytes | memoryview) -> Head:
    """A checked head. Raises RecordCorrupt."""
    if len(data) != HEAD_NBYTES:
        raise RecordCorrupt(f"head of {len(data)} bytes, due are {HEAD_NBYTES}")
    plain = bytes(data[:_PLAIN_NBYTES])
    if not hmac.compare_digest(names.head_mac(alias, plain), bytes(data[-MAC_NBYTES:])):
        raise RecordCorrupt("the head was not made for this object with the secret of these hosts")
    magic, version, *facts = _HEAD.unpack(plain)
    head = Head(*facts)
    if magic != MAGIC or version != VERSION:
        raise RecordCorrupt(f"not an object of version {VERSION}: magic {magic!r}, version {version}")
    if (
        head.namespace_nbytes > NAMESPACE_MAX_NBYTES
        or max(head.record_nbytes, head.value_nbytes) > 2 * ENTRY_MAX_NBYTES
    ):
        raise RecordCorrupt(f"an object of {head.record_nbytes} bytes for a value of {head.value_nbytes}")
    if not isfinite(head.ttl_s) or not 0 < head.ttl_s <= TTL_MAX_S:
        raise RecordCorrupt(f"an object with {head.ttl_s} s to live")
    return head


def opened(names: Names, alias: Key, key: Key, head: Head, data: bytearray, seals: Seals, *, clear: bool) -> Arrived:
    """The entry of an object that arrived whole, under its own key; it may share memory with `data`.

    clear: records that are not sealed are taken. Raises RecordCorrupt, of which UnknownSeal is one.
    """
    view = memoryview(data)
    if len(view) != head.nbytes or parse_head(names, alias, view[:HEAD_NBYTES]) != head:
        raise RecordCorrupt(f"object of {len(view)} bytes, its head said {head.nbytes}, or another head")
    text = names.masked(alias, bytes(view[HEAD_NBYTES:RECORD_AT]))[: head.namespace_nbytes]
    namespace = text.decode(errors="replace")
    if names.tag(namespace) != head.tag:
        raise RecordCorrupt("the namespace of an object is not the one of its head")
    inside = view[RECORD_AT:]
    found = record.parse_head(inside[: record.HEAD_MAX_NBYTES], alias)
    if head.value_nbytes != found.value_nbytes or len(inside) != found.nbytes + found.stored_nbytes:
        raise RecordCorrupt(f"record of {len(inside)} bytes, its header says {found.nbytes + found.stored_nbytes}")
    if not (found.sealed or clear):
        raise RecordCorrupt("the record is in clear, and store.shared.clear is not true")
    stored = _aligned(inside[found.nbytes :], copied=not found.sealed)
    with Blaming(RecordCorrupt, "record"):  # the boundary: another host wrote it, or somebody else
        digest = xxhash.xxh3_64_intdigest(stored.data)
        entry = record.assemble(found, bytes(inside[: found.nbytes]), stored, alias, digest, seals)
    own = Entry(key, entry.tensors, lossy=entry.lossy)
    return Arrived(own, head.ttl_s, found.exact, namespace)


def _aligned(data: memoryview, *, copied: bool) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """The data section where tensors may lie: where it is, if that is aligned. What is sealed is opened elsewhere."""
    flat = np.frombuffer(data, np.uint8)
    if not copied or (flat.size and not flat.ctypes.data % 16):
        return flat
    import torch

    own = torch.empty(flat.size, dtype=torch.uint8, device="cpu").numpy()
    np.copyto(own, flat)
    return own


def nbytes_of(buffers: Sequence[Buffer]) -> int:
    """Bytes of an object in buffers."""
    return sum(memoryview(part).nbytes for part in buffers)

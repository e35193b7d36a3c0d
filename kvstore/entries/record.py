"""An entry as bytes: what lies on disk, in a remote store and in an exported file.

    record = fixed header | safetensors header | data section, raw or in one zstd frame

Without compression, header aside, a record is a safetensors file. The grammar, offsets and a worked example are in
docs/record-format.md; the bytes are frozen by tests/golden. Invariant: nothing is parsed before its checksum matched,
and every checksum covers the key, so neither damage nor a record of another key is ever taken for a value.
Pure: no clock, no disk. Bit-exact for every dtype, NaN payloads, 0-d and zero-size tensors.
Leaves out: what encodings mean (`codecs`), whether compressing pays (`compression`), where records are kept (`tiers`).
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from kvstore.arrays import ENTRY_MAX_NBYTES, TENSORS_MAX, as_bytes
from kvstore.boundary import Blaming
from kvstore.dtypes import BY_NAME, FROM_SAFETENSORS, TensorSpec
from kvstore.entries.compact import Layout, PackedTensors, layout_of
from kvstore.entries.compression import Compression, compress, decompress_into
from kvstore.entries.entry import Described, EncodedTensor, Entry, basis_in, error_in
from kvstore.entries.safetensors_header import (  # fmt: skip
    HEADER_MAX_NBYTES,
    PARTS_MAX,
    Part,
    Row,
    Slot,
    header_nbytes,
    header_text,
    parse_header,
    tensor_rows,
    write_header,
)
from kvstore.entries.sealing import NO_SEALS, Seals, sealed_nbytes
from kvstore.entries.sealing import Key as SealKey
from kvstore.errors import EntryTooLarge, InvalidEntry, RecordCorrupt
from kvstore.keys import Key, check_key
from kvstore.metadata.meta import Meta
from kvstore.printable import printable

MAGIC = b"KVSR"
VERSION = 1
_FIXED = struct.Struct("<4sHHQ16sdddQIBBHQQQ")
FIXED_NBYTES = _FIXED.size
_CHECKED_FROM = 16
_PREFIX = struct.Struct("<4sHHQ")
HEAD_MAX_NBYTES = FIXED_NBYTES + 8 + HEADER_MAX_NBYTES
DECODED_MAX_RATIO = 256
"""Bytes decoded for a byte encoded: nf4 has 8, and no codec of KV has a hundred."""
_SIDE_NBYTES = 1 << 20
"""Data allowed beyond twice the value's bytes: scales of the smallest tensors. A record that claims more is a bomb."""

# Flags. Do not renumber.
_SLIDING, _PINNED, _EXACT, _LOSSY, _SEALED = 1, 2, 4, 8, 16
_BOUND = slice(_CHECKED_FROM, 80)
"""The part of the fixed header that sealed data is bound to: the fields known before sealing."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Head:
    """A record's fixed header, checked. Times are Unix seconds.

    json_nbytes: of the safetensors header, its length field included. data_nbytes: of the data section once
    decompressed, stored_nbytes: as stored.
    """

    created_at: float
    expires_at: float
    ttl_s: float
    value_nbytes: int
    json_nbytes: int
    compression: Compression
    flags: int
    data_nbytes: int
    stored_nbytes: int
    data_xxh3: int

    @property
    def lossy(self) -> bool:
        """Whether a tensor ever went through a lossy codec."""
        return bool(self.flags & _LOSSY)

    @property
    def exact(self) -> bool:
        """Whether it was put to stay exact."""
        return bool(self.flags & _EXACT)

    @property
    def sealed(self) -> bool:
        """Whether the data section is encrypted."""
        return bool(self.flags & _SEALED)

    @property
    def nbytes(self) -> int:
        """Bytes before the data section."""
        return FIXED_NBYTES + self.json_nbytes

    def check(self, known: "Sizes") -> None:
        """Raise RecordCorrupt for a record of other sizes."""
        nbytes = self.nbytes + self.stored_nbytes
        if self.nbytes != known.head_nbytes or nbytes != known.nbytes:
            raise RecordCorrupt(f"record of {nbytes} bytes, its row says {known.nbytes}")
        if known.value_nbytes not in (0, self.value_nbytes):
            raise RecordCorrupt(f"value of {self.value_nbytes} bytes, its row says {known.value_nbytes}")


class Sizes(NamedTuple):
    """What a row says of a record. value_nbytes: of its tensors once decoded, 0 where nobody told."""

    head_nbytes: int
    nbytes: int
    value_nbytes: int


@dataclass(frozen=True, slots=True)
class Record:
    """A packed entry: `head`, then the buffers of `data`, one behind the other.

    The buffers share memory with the entry, so that a writer can hand them to the kernel without a copy.
    """

    head: bytes
    data: tuple[Bytes, ...]
    compression: Compression

    @property
    def nbytes(self) -> int:
        """Bytes of the whole record."""
        return len(self.head) + sum(part.size for part in self.data)

    def to_bytes(self) -> bytes:
        """One contiguous copy."""
        return b"".join((self.head, *(part.data for part in self.data)))


def pack(entry: Entry, meta: Meta, *, compression: Compression | None = None, seal: SealKey | None = None) -> Record:
    """The record of an entry. compression: the way to store the data section; None: what a sample says pays.

    seal: a key to encrypt the data section with. The head stays clear.
    Raises EntryTooLarge when names and attributes pass the limit of the header.
    """
    slots, metadata, chunks = _lay_out(entry)
    data_nbytes = sum(chunk.size for chunk in chunks)
    used, stored = compress(chunks, _widest(entry), compression)
    header = write_header(slots, metadata)
    flags = _flags(meta, entry) | _SEALED * (seal is not None)

    def fixed(stored_nbytes: int, data_xxh3: int) -> bytes:
        return _FIXED.pack(
            MAGIC, VERSION, FIXED_NBYTES, 0, _key_hash(entry.key), meta.created_at, meta.expires_at, meta.ttl_s,
            entry.value_nbytes, len(header), used, flags, len(entry.key), data_nbytes, stored_nbytes, data_xxh3,
        )  # fmt: skip

    if seal is not None:
        stored = seal.seal(stored, entry.key + fixed(0, 0)[_BOUND] + header)
    digest = xxhash.xxh3_64()
    for chunk in stored:
        digest.update(chunk.data)
    checked = fixed(sum(chunk.size for chunk in stored), digest.intdigest())[_CHECKED_FROM:] + header
    prefix = _PREFIX.pack(MAGIC, VERSION, FIXED_NBYTES, xxhash.xxh3_64_intdigest(checked))
    return Record(prefix + checked, tuple(stored), used)


def record_nbytes(entry: Entry, *, sealed: bool = False) -> int:
    """Bytes of the record of an entry, worked out without making it: exact, or too many by what compression saves.

    For a budget: an entry that waits to be written is counted with the size it will have. Chunks of a namespace are
    alike, so the size of the parts that all entries of one layout share is cached. For an entry that `pack` refuses
    this is the size of its data.
    """
    layout = layout_of(entry)
    try:
        text_nbytes = _text_nbytes(layout, len(entry.key), entry.lossy) + _attrs_nbytes(entry)
    except (EntryTooLarge, ValueError, TypeError):
        text_nbytes = 0
    data_nbytes = layout.nbytes
    stored_nbytes = sealed_nbytes(data_nbytes) if sealed else data_nbytes
    return FIXED_NBYTES + header_nbytes(text_nbytes) + stored_nbytes


@lru_cache(maxsize=1024)
def _text_nbytes(layout: Layout, key_nbytes: int, lossy: bool) -> int:  # noqa: FBT001 - a key of the cache
    """Bytes of the header's JSON without the attributes of the tensors."""
    tensors = [
        _Tensor(name, spec, encoding, {part.suffix: part.spec for part in layout.parts if part.tensor == at}, {})
        for at, (name, spec, encoding) in enumerate(zip(layout.names, layout.specs, layout.encodings, strict=True))
    ]
    slots, metadata, _ = _table(Key(bytes(key_nbytes)), tensors, lossy=lossy)
    return len(header_text(slots, metadata))


def _attrs_nbytes(entry: Entry) -> int:
    """Bytes that the attributes add: JSON, escaped as text within JSON."""
    tensors = entry.tensors
    found = tensors.attrs if isinstance(tensors, PackedTensors) else [t.attrs for t in tensors.values()]
    said = "".join(f',"attrs":{_json(dict(attrs))}' for attrs in found if attrs)
    return len(_json(said).encode()) - 2


def unpack(
    record: bytes | bytearray | memoryview,
    key: Key,
    *,
    limit_nbytes: int = ENTRY_MAX_NBYTES,
    seals: Seals = NO_SEALS,
) -> Entry:
    """The entry of a contiguous record; it shares no memory with the record. Raises RecordCorrupt.

    limit_nbytes: a record that decodes to more, by its header, is refused before anything is allocated. seals: keys
    for sealed records.
    """
    view = memoryview(record).cast("B")
    head = parse_head(view[:HEAD_MAX_NBYTES], key, limit_nbytes=limit_nbytes)
    if len(view) != head.nbytes + head.stored_nbytes:
        raise RecordCorrupt(f"record has {len(view)} bytes, its header says {head.nbytes + head.stored_nbytes}")
    stored = torch.empty(head.stored_nbytes, dtype=torch.uint8, device="cpu").numpy()
    if head.stored_nbytes:
        np.copyto(stored, np.frombuffer(view[head.nbytes :], np.uint8))
    digest = xxhash.xxh3_64_intdigest(stored.data)
    with Blaming(RecordCorrupt, "record"):  # the boundary: a checksum keeps damage out, not an author who computes it
        return assemble(head, bytes(view[: head.nbytes]), stored, key, digest, seals)


def parse_head(
    data: bytes | memoryview, key: Key, *, limit_nbytes: int = ENTRY_MAX_NBYTES, known: Sizes | None = None
) -> Head:
    """The checked fixed header, from bytes that hold at least the record's head. Raises RecordCorrupt.

    known: its row's sizes; it is corrupt where it has others.
    """
    if len(data) < FIXED_NBYTES:
        raise RecordCorrupt(f"record of {len(data)} bytes is shorter than its {FIXED_NBYTES}-byte header")
    fields = _FIXED.unpack_from(data)
    magic, version, fixed_nbytes, head_xxh3, key_hash, created_at, expires_at, ttl_s, value_nbytes = fields[:9]
    json_nbytes, compression, flags, key_nbytes, data_nbytes, stored_nbytes, data_xxh3 = fields[9:]
    if magic != MAGIC or version != VERSION or fixed_nbytes != FIXED_NBYTES:
        raise RecordCorrupt(f"not a record of version {VERSION}: magic {magic!r}, version {version}")
    if json_nbytes > HEADER_MAX_NBYTES + 8 or FIXED_NBYTES + json_nbytes > len(data):
        raise RecordCorrupt(f"header of {json_nbytes} bytes, {len(data) - FIXED_NBYTES} are there")
    if xxhash.xxh3_64_intdigest(data[_CHECKED_FROM : FIXED_NBYTES + json_nbytes]) != head_xxh3:
        raise RecordCorrupt("checksum of the header does not match")
    if key_hash != _key_hash(key) or key_nbytes != len(key):
        raise RecordCorrupt("record belongs to another key")
    if flags >= 2 * _SEALED:
        raise RecordCorrupt(f"flags {flags} of a later version")
    largest = max(data_nbytes, stored_nbytes, value_nbytes)
    # Twice: the scales of an encoding may be larger than a small value.
    if largest > 2 * limit_nbytes or compression > max(Compression):
        raise RecordCorrupt(f"data of {largest} bytes, at most {2 * limit_nbytes}, stored as kind {compression}")
    if data_nbytes > 2 * value_nbytes + _SIDE_NBYTES:
        raise RecordCorrupt(f"data of {data_nbytes} bytes for a value of {value_nbytes}")
    head = Head(
        created_at, expires_at, ttl_s, value_nbytes, json_nbytes, Compression(compression), flags, data_nbytes,
        stored_nbytes, data_xxh3,
    )  # fmt: skip
    if known is not None:
        head.check(known)
    return head


def assemble(head: Head, head_bytes: bytes, stored: Bytes, key: Key, data_xxh3: int, seals: Seals = NO_SEALS) -> Entry:
    """The entry of a checked head and its data section; uses `stored` itself if it is not compressed.

    head_bytes: the record's first `head.nbytes` bytes. stored: `head.stored_nbytes` bytes that nothing else uses,
    aligned to 16. data_xxh3: the xxh3_64 computed over them. Raises RecordCorrupt, and whatever parsing what a stranger
    has written raises: `Blaming` is its caller's.
    """
    if data_xxh3 != head.data_xxh3:
        raise RecordCorrupt("checksum of the data does not match")
    slots, facts = parse_header(head_bytes[FIXED_NBYTES:], head.data_nbytes)
    rows = tensor_rows(facts)
    if head.flags & _SEALED:
        stored = seals.open(stored, key + head_bytes[_BOUND] + head_bytes[FIXED_NBYTES:])
    if head.compression is Compression.NONE:
        if stored.size != head.data_nbytes:
            raise RecordCorrupt(f"{stored.size} bytes stored, {head.data_nbytes} described")
        data = torch.from_numpy(stored)
    else:
        data = torch.empty(head.data_nbytes, dtype=torch.uint8, device="cpu")
        decompress_into(data.numpy(), stored, head.compression)
    tensors = _tensors(rows, slots, data)
    if tensors.value_nbytes != head.value_nbytes:
        raise RecordCorrupt(f"tensors of {tensors.value_nbytes} bytes, header says {head.value_nbytes}")
    return Entry(key, tensors, lossy=head.lossy)


def to_safetensors(entry: Entry, meta: Meta) -> bytes:
    """An entry as a plain safetensors file; the metadata says how the parts of encoded tensors belong together."""
    return pack(entry, meta, compression=Compression.NONE).to_bytes()[FIXED_NBYTES:]


def from_safetensors(file: bytes) -> Entry:
    """The entry of a file that `to_safetensors` wrote; its tensors share memory with nothing. Raises RecordCorrupt.

    It has no checksum: the values are not verified, only the structure is.
    """
    with Blaming(RecordCorrupt, "file"):  # the boundary: any program may have written the file
        length = int.from_bytes(file[:8], "little")
        if length > HEADER_MAX_NBYTES:
            raise RecordCorrupt(f"safetensors header of {length} bytes, at most {HEADER_MAX_NBYTES}")
        slots, facts = parse_header(file[: 8 + length], len(file) - 8 - length)
        data = torch.empty(len(file) - 8 - length, dtype=torch.uint8, device="cpu")
        np.copyto(data.numpy(), np.frombuffer(file, np.uint8)[8 + length :])
        try:
            key = Key(check_key(bytes.fromhex(facts["kvstored.key"])))
        except (KeyError, ValueError, InvalidEntry) as error:
            raise RecordCorrupt(f"not a file that was exported from here: {printable(repr(error)):.200}") from None
        return Entry(key, _tensors(tensor_rows(facts), slots, data), lossy=facts.get("kvstored.lossy") == "true")


def specs_of(head: Head, head_bytes: bytes) -> dict[str, Described]:
    """The tensors' descriptions, from a checked head alone. Raises RecordCorrupt."""
    with Blaming(RecordCorrupt, "record"):  # the boundary, as in `unpack`
        _, facts = parse_header(head_bytes[FIXED_NBYTES:], head.data_nbytes)
        rows = tensor_rows(facts)
        nbytes = sum(row.nbytes for row in rows)
        if nbytes != head.value_nbytes or nbytes > DECODED_MAX_RATIO * (head.data_nbytes + _SIDE_NBYTES):
            raise RecordCorrupt(f"tensors of {nbytes} bytes, header says {head.value_nbytes}, of {head.data_nbytes}")
        return {
            row.name: Described(row.spec, row.encoding, error_in(row.encoding, row.attrs), basis_in(row.attrs))
            for row in rows
        }


def _key_hash(key: bytes) -> bytes:
    return xxhash.xxh3_128_digest(key)


def _flags(meta: Meta, entry: Entry) -> int:
    return _SLIDING * meta.sliding | _PINNED * meta.pinned | _EXACT * meta.exact | _LOSSY * entry.lossy


def _widest(entry: Entry) -> int:
    """Bytes of an element of the entry's largest raw part; 1 when another encoding holds more than half the bytes."""
    largest = max((t for t in entry.tensors.values()), key=lambda t: t.nbytes, default=None)
    if largest is None or largest.encoding != "raw":
        return 1
    return BY_NAME[largest.spec.dtype].itemsize


class _Tensors(dict[str, EncodedTensor]):
    """The tensors of a record. value_nbytes: as `Entry` has it."""

    __slots__ = ("value_nbytes",)
    value_nbytes: int


def _tensors(rows: Sequence[Row], slots: Mapping[str, Slot], data: torch.Tensor) -> _Tensors:
    """The tensors of all rows. Raises RecordCorrupt unless each slot is one part of one tensor."""
    tensors = _Tensors((row.name, tensor_of(row, slots, data)) for row in rows)
    used = [part.slot for row in rows for part in row.parts.values()]
    if len(tensors) != len(rows) or len(used) != len(slots) or len(set(used)) != len(used):
        raise RecordCorrupt("tensors and parts do not add up")
    tensors.value_nbytes = sum(row.nbytes for row in rows)
    return tensors


def tensor_of(row: Row, slots: Mapping[str, Slot], data: torch.Tensor) -> EncodedTensor:
    """The tensor of a row, with parts that are views of `data`. Raises RecordCorrupt if row and slots disagree."""
    parts = {suffix: _view(part, slots, data) for suffix, part in row.parts.items()}
    if row.encoding == "raw" and (parts.keys() != {""} or spec_of_part(parts[""]) != row.spec):
        raise RecordCorrupt(f"tensor {row.name!r:.80} is not {row.spec}")
    return EncodedTensor(row.spec, row.encoding, parts, row.attrs)


def spec_of_part(x: torch.Tensor) -> TensorSpec:
    """Type and shape of a part."""
    return TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))


def _view(part: Part, slots: Mapping[str, Slot], data: torch.Tensor) -> torch.Tensor:
    slot = slots.get(part.slot)
    if slot is None:
        raise RecordCorrupt(f"part {part.slot!r:.80} is missing")
    code, shape, begin, end = slot
    if part.spec is None:  # as the slot says, whose size `parse_header` has checked
        dtype = _TORCH_BY_CODE[code]
    elif part.spec.nbytes != end - begin:
        raise RecordCorrupt(f"part {part.slot!r:.80} of {end - begin} bytes is not {part.spec}")
    else:
        dtype, shape = getattr(torch, part.spec.dtype), part.spec.shape
    if begin == end:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if begin % dtype.itemsize:
        raise RecordCorrupt(f"part {part.slot!r:.80} is not aligned")
    flat = data[begin:end] if dtype is torch.uint8 else data[begin:end].view(dtype)
    return flat if len(shape) == 1 else flat.view(shape)


_TORCH_BY_CODE: dict[str, torch.dtype] = {code: getattr(torch, kind.name) for code, kind in FROM_SAFETENSORS.items()}


class _Tensor(NamedTuple):
    """A tensor in a record's header: like `EncodedTensor`, with the specs of the parts instead of the parts."""

    name: str
    spec: TensorSpec
    encoding: str
    parts: Mapping[str, TensorSpec]
    attrs: Mapping[str, object]


def _lay_out(entry: Entry) -> tuple[dict[str, Slot], dict[str, str], list[Bytes]]:
    """Slots, the metadata, and the bytes of the slots in their order."""
    held = dict(entry.tensors)
    tensors = [
        _Tensor(name, t.spec, t.encoding, {suffix: spec_of_part(x) for suffix, x in t.parts.items()}, t.attrs)
        for name, t in held.items()
    ]
    slots, metadata, order = _table(entry.key, tensors, lossy=entry.lossy)
    return slots, metadata, [as_bytes(held[name].parts[suffix]) for name, suffix in order]


def _table(
    key: Key, tensors: Sequence[_Tensor], *, lossy: bool
) -> tuple[dict[str, Slot], dict[str, str], list[tuple[str, str]]]:
    """Slots, the metadata, and which (tensor, part) lies in each slot.

    Widest elements first, so that every part lies aligned in the data section.
    """
    if len(tensors) > TENSORS_MAX:
        raise EntryTooLarge(f"an entry has at most {TENSORS_MAX} tensors, got {len(tensors)}")
    taken = {tensor.name for tensor in tensors}
    rows: list[dict[str, object]] = []
    found: list[_Found] = []
    for tensor in tensors:
        row, parts = _describe(tensor, taken)
        rows.append(row)
        found += parts
    found.sort(key=lambda part: -BY_NAME[part.spec.dtype].itemsize)
    slots: dict[str, Slot] = {}
    at = 0
    for part in found:
        code = BY_NAME[part.spec.dtype].safetensors
        nbytes = part.spec.nbytes
        slots[part.slot] = Slot(code or "U8", part.spec.shape if code else (nbytes,), at, at + nbytes)
        at += nbytes
    metadata = {"format": "pt", "kvstored.key": key.hex(), "kvstored.tensors": _json(rows)}
    if lossy:
        metadata["kvstored.lossy"] = "true"
    return slots, metadata, [(part.tensor, part.suffix) for part in found]


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class _Found(NamedTuple):
    """A part to be placed in the data section: its slot, its tensor and its suffix."""

    slot: str
    spec: TensorSpec
    tensor: str
    suffix: str


def _describe(tensor: _Tensor, taken: set[str]) -> tuple[dict[str, object], list[_Found]]:
    """A tensor's row of the metadata, and its parts."""
    name = tensor.name
    if len(tensor.parts) > PARTS_MAX:
        raise EntryTooLarge(f"tensor {name!r}: at most {PARTS_MAX} parts, got {len(tensor.parts)}")
    parts: dict[str, object] = {}
    found = []
    for suffix, spec in tensor.parts.items():
        slot = name if suffix == "" else _free_name(f"{name}.{suffix}", taken)
        uncoded = BY_NAME[spec.dtype].safetensors is None
        parts[suffix] = [slot, spec.dtype, spec.shape] if uncoded else [slot]
        found.append(_Found(slot, spec, name, suffix))
    row: dict[str, object] = {
        "name": name,
        "encoding": tensor.encoding,
        "dtype": tensor.spec.dtype,
        "shape": tensor.spec.shape,
        "parts": parts,
    }
    if tensor.attrs:
        row["attrs"] = dict(tensor.attrs)
    return row, found


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or `name~1`, `name~2`...: a tensor may itself be called `k.absmax`."""
    free, n = name, 0
    while free in taken:
        n += 1
        free = f"{name}~{n}"
    taken.add(free)
    return free

"""The header of a safetensors file, and the tensors that a record's names in its metadata, written and parsed strictly.

The safetensors library accepts duplicate names, dimensions of 2**62 next to a zero, and headers that take seconds and
hundreds of MiB to parse. Here the size is limited before a byte is parsed, and only a layout without gaps is accepted:
tensors one behind the other from 0 to the end, each with exactly the bytes of its dtype and shape.
Pure, except `open_regular`: bytes in, plain objects out, no torch. The format: 8 bytes little-endian length n, n bytes
of JSON (`{name: {"dtype", "shape", "data_offsets"}}`, with text facts under `__metadata__`), then the data.
"""

import json
import os
import stat
from collections.abc import Mapping
from functools import lru_cache
from math import isfinite, prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kvstore.arrays import ATTRS_MAX_NBYTES, ENTRY_MAX_NBYTES, TENSORS_MAX, check_name
from kvstore.dtypes import BY_NAME, FROM_SAFETENSORS, TensorSpec
from kvstore.errors import EntryTooLarge, InvalidEntry, RecordCorrupt
from kvstore.printable import printable

HEADER_MAX_NBYTES = 256 << 10
"""256 tensors with 64-byte names, four parts and their attributes each, fit; parsing it takes about 2 ms."""
RANK_MAX = 8
DIM_MAX = 4 << 30
METADATA = "__metadata__"
PARTS_MAX = 64
"""Parts of one encoded tensor: nf4 has 3, nf4-kv2 up to 8 of keys, and `layers` those of 8 runs."""
_SLOT_FIELDS = {"dtype", "shape", "data_offsets"}
_ATTRS_DEPTH_MAX = 6
"""The deepest attributes are those of `layers`: a list of runs, each a list that holds a codec's own attributes."""
_INT_LIMIT = 1 << 63
_ENCODING_MAX_NBYTES = 32
_ALIGN = 8
_LENGTH_NBYTES = 8


class Slot(NamedTuple):
    """Where a tensor lies: bytes [begin, end) of the data section. dtype: a safetensors code."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """An untrusted file, open for reading. Raises OSError, and InvalidEntry unless it is a regular file.

    Opens without blocking: opening a pipe that has no writer would wait forever, and a device may have no end. follow:
    go where a symbolic link at `path` leads; else it is refused as an OSError.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    file = open(os.open(path, flags), "rb")  # noqa: PTH123, SIM115 - a descriptor
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InvalidEntry(f"{path} is not a regular file")
    return file


def write_header(slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON, padded with spaces to 8 bytes. Raises EntryTooLarge over HEADER_MAX_NBYTES."""
    text = header_text(slots, metadata)
    text += b" " * (-len(text) % _ALIGN)
    if len(text) > HEADER_MAX_NBYTES:
        raise EntryTooLarge(f"names and attributes of a record have at most {HEADER_MAX_NBYTES} bytes, got {len(text)}")
    return len(text).to_bytes(_LENGTH_NBYTES, "little") + text


def header_text(slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> bytes:
    """The JSON alone, not padded."""
    table: dict[str, object] = {METADATA: dict(metadata)}
    for name, slot in slots.items():
        table[name] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": (slot.begin, slot.end)}
    return json.dumps(table, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def header_nbytes(text_nbytes: int) -> int:
    """Bytes of a whole header, with length field and padding, whose JSON has `text_nbytes` bytes."""
    return _LENGTH_NBYTES + text_nbytes + -text_nbytes % _ALIGN


def parse_header(header: bytes, data_nbytes: int) -> tuple[dict[str, Slot], dict[str, str]]:
    """Slots by name, and the metadata, of a whole header (length included) before `data_nbytes` of data.

    Raises RecordCorrupt for anything that `write_header` would not write, except the other types of `FROM_SAFETENSORS`.
    """
    length = int.from_bytes(header[:_LENGTH_NBYTES], "little")
    if not 2 <= length <= HEADER_MAX_NBYTES or len(header) != _LENGTH_NBYTES + length:
        raise RecordCorrupt(f"safetensors header says {length} bytes, has {len(header) - _LENGTH_NBYTES}")
    table = _parse_json(header[_LENGTH_NBYTES:])
    metadata = _text_facts(table.pop(METADATA, {}))
    slots = {name: _slot(name, row) for name, row in table.items()}
    _check_layout(slots, data_nbytes)
    return slots, metadata


def _parse_json(text: bytes) -> dict[str, Any]:
    if text[:1] != b"{":
        raise RecordCorrupt("safetensors header does not begin with {")
    try:
        return dict(_DECODER.decode(text.decode()))
    except (ValueError, RecursionError) as error:
        raise RecordCorrupt(f"safetensors header is not JSON: {printable(repr(error)):.120}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary, for `object_pairs_hook`. Raises ValueError for a name given twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _text_facts(facts: Any) -> dict[str, str]:
    if not isinstance(facts, dict) or not all(isinstance(v, str) for v in facts.values()):
        raise RecordCorrupt("safetensors __metadata__ is not text by text")
    return facts


def _slot(name: str, row: Any) -> Slot:
    if not isinstance(row, dict) or row.keys() != _SLOT_FIELDS:
        raise RecordCorrupt(f"tensor {name!r:.80}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    kind = FROM_SAFETENSORS.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise RecordCorrupt(f"tensor {name!r:.80}: unknown dtype {dtype!r:.40}")
    if not isinstance(shape, list) or len(shape) > RANK_MAX or not _are_sizes(shape, DIM_MAX):
        raise RecordCorrupt(f"tensor {name!r:.80}: bad shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_sizes(offsets, 1 << 62):
        raise RecordCorrupt(f"tensor {name!r:.80}: bad data_offsets {offsets!r:.80}")
    begin, end = offsets
    if end - begin != prod(shape) * kind.itemsize:
        raise RecordCorrupt(f"tensor {name!r:.80}: {dtype} {tuple(shape)} is not {end - begin} bytes")
    return Slot(dtype, tuple(shape), begin, end)


def _are_sizes(numbers: list[Any], limit: int) -> bool:
    for number in numbers:  # noqa: SIM110 - all() of a generator takes twice as long, and a record has twenty lists
        if type(number) is not int or not 0 <= number <= limit:
            return False
    return True


def _check_layout(slots: Mapping[str, Slot], data_nbytes: int) -> None:
    """No overlap, no hole, nothing left over."""
    at = 0
    for begin, end in sorted([(slot.begin, slot.end) for slot in slots.values()]):
        if begin != at:
            raise RecordCorrupt(f"safetensors data has a hole or an overlap at byte {at}")
        at = end
    if at != data_nbytes:
        raise RecordCorrupt(f"safetensors header describes {at} bytes of data, there are {data_nbytes}")


class Part(NamedTuple):
    """One part of one tensor: its slot, and its real type where safetensors has no code for it."""

    slot: str
    spec: TensorSpec | None


class Row(NamedTuple):
    """One tensor, as the metadata describes it. nbytes: of its values."""

    name: str
    spec: TensorSpec
    nbytes: int
    encoding: str
    parts: Mapping[str, Part]
    attrs: Mapping[str, object]


def tensor_rows(facts: Mapping[str, str]) -> list[Row]:
    """The tensors that a record's metadata names. Raises RecordCorrupt for rows that `record.pack` never writes."""
    try:
        rows = _DECODER.decode(facts["kvstored.tensors"])
        if not isinstance(rows, list) or not 1 <= len(rows) <= TENSORS_MAX:
            raise ValueError(f"expected 1 to {TENSORS_MAX} tensors")
        return [_row(row) for row in rows]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, InvalidEntry) as error:
        raise RecordCorrupt(f"kvstored.tensors cannot be read: {printable(repr(error)):.120}") from None


_known_name = lru_cache(maxsize=1024)(check_name)


def _row(row: dict[str, Any]) -> Row:
    name, parts = _known_name(row["name"]), {suffix: _part_of(p) for suffix, p in row["parts"].items()}
    attrs, encoding = row.get("attrs", {}), row["encoding"]
    if not isinstance(attrs, dict) or len(parts) > PARTS_MAX:
        raise ValueError("bad parts or attrs")
    _check_fact(attrs, _ATTRS_DEPTH_MAX)
    if attrs and len(json.dumps(attrs)) > ATTRS_MAX_NBYTES:
        raise ValueError(f"attributes of over {ATTRS_MAX_NBYTES} bytes")
    if not isinstance(encoding, str) or not encoding.isascii() or not encoding.isprintable():
        raise ValueError(f"bad encoding {encoding!r:.40}")
    if not 1 <= len(encoding) <= _ENCODING_MAX_NBYTES:
        raise ValueError(f"an encoding's name has 1 to {_ENCODING_MAX_NBYTES} characters, got {len(encoding)}")
    return Row(name, *_spec_of(row["dtype"], row["shape"]), encoding, parts, attrs)


def _part_of(part: object) -> Part:
    match part:
        case [str(slot)]:
            return Part(slot, None)
        case [str(slot), str(dtype), list(shape)]:
            return Part(slot, _spec_of(dtype, shape)[0])
    raise ValueError(f"not a part: {part!r:.80}")


def _check_fact(value: object, depth: int) -> None:
    """Raise ValueError for an attribute that no codec writes: later code could not write it as JSON, or overflow."""
    if depth == 0:
        raise ValueError(f"attributes are nested more than {_ATTRS_DEPTH_MAX} deep")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_fact(inner, depth - 1)
    elif (isinstance(value, int) and not -_INT_LIMIT <= value < _INT_LIMIT) or (
        isinstance(value, float) and not isfinite(value)
    ):
        raise ValueError(f"an attribute is a finite number of 64 bits, got {value!r:.40}")


def _spec_of(dtype: object, shape: object) -> tuple[TensorSpec, int]:
    """A spec, and the bytes of its values. Raises ValueError."""
    if not isinstance(dtype, str) or dtype not in BY_NAME or not isinstance(shape, list) or len(shape) > RANK_MAX:
        raise ValueError(f"bad spec {dtype!r:.40}")
    if not _are_sizes(shape, ENTRY_MAX_NBYTES) or prod(shape) > 1 << 62:
        raise ValueError(f"bad shape {shape!r:.80}")
    return _known_spec(dtype, tuple(shape))


@lru_cache(maxsize=1024)
def _known_spec(dtype: str, shape: tuple[int, ...]) -> tuple[TensorSpec, int]:
    spec = TensorSpec(dtype, shape)
    return spec, spec.nbytes

"""The header of a safetensors file, written and parsed strictly.

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
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from kvstore.dtypes import FROM_SAFETENSORS, DType
from kvstore.errors import EntryTooLarge, InvalidEntry, RecordCorrupt
from kvstore.printable import printable

HEADER_MAX_NBYTES = 256 << 10
"""256 tensors with 64-byte names, four parts and their attributes each, fit; parsing it takes about 2 ms."""
RANK_MAX = 8
DIM_MAX = 4 << 30
METADATA = "__metadata__"
_ALIGN = 8
_LENGTH_NBYTES = 8


@dataclass(frozen=True, slots=True)
class Slot:
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


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary, for `object_pairs_hook`. Raises ValueError for a name given twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


_DECODER = json.JSONDecoder(object_pairs_hook=no_duplicates)


def _text_facts(facts: Any) -> dict[str, str]:
    if not isinstance(facts, dict) or not all(isinstance(v, str) for v in facts.values()):
        raise RecordCorrupt("safetensors __metadata__ is not text by text")
    return facts


def _is_size(x: object, limit: int = DIM_MAX) -> bool:
    return type(x) is int and 0 <= x <= limit


def _slot(name: str, row: Any) -> Slot:
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise RecordCorrupt(f"tensor {name!r:.80}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    kind = FROM_SAFETENSORS.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise RecordCorrupt(f"tensor {name!r:.80}: unknown dtype {dtype!r:.40}")
    if not isinstance(shape, list) or len(shape) > RANK_MAX or not all(_is_size(d) for d in shape):
        raise RecordCorrupt(f"tensor {name!r:.80}: bad shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o, 1 << 62) for o in offsets):
        raise RecordCorrupt(f"tensor {name!r:.80}: bad data_offsets {offsets!r:.80}")
    slot = Slot(dtype, tuple(shape), offsets[0], offsets[1])
    _check_size(name, slot, kind)
    return slot


def _check_size(name: str, slot: Slot, kind: DType) -> None:
    if slot.end - slot.begin != prod(slot.shape) * kind.itemsize:
        raise RecordCorrupt(f"tensor {name!r:.80}: {slot.dtype} {slot.shape} is not {slot.end - slot.begin} bytes")


def _check_layout(slots: Mapping[str, Slot], data_nbytes: int) -> None:
    """No overlap, no hole, nothing left over."""
    at = 0
    for slot in sorted(slots.values(), key=lambda s: (s.begin, s.end)):
        if slot.begin != at:
            raise RecordCorrupt(f"safetensors data has a hole or an overlap at byte {at}")
        at = slot.end
    if at != data_nbytes:
        raise RecordCorrupt(f"safetensors header describes {at} bytes of data, there are {data_nbytes}")

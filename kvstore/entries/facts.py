"""The metadata of a record, parsed strictly: its tensors, their encodings and their parts. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import torch

from kvstore.arrays import ATTRS_MAX_NBYTES, ENTRY_MAX_NBYTES, TENSORS_MAX, check_name
from kvstore.dtypes import BY_NAME, FROM_SAFETENSORS, TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.entries.safetensors_header import (  # fmt: skip
    RANK_MAX,
    Slot,
    no_duplicates,
)
from kvstore.errors import InvalidEntry, RecordCorrupt
from kvstore.printable import printable

PARTS_MAX = 64
"""Parts of one encoded tensor: nf4 has 3, nf4-kv2 up to 8 of keys, and `layers` those of 8 runs."""


_ATTRS_DEPTH_MAX = 6
"""The deepest attributes are those of `layers`: a list of runs, each a list that holds a codec's own attributes."""


_INT_LIMIT = 1 << 63


_ENCODING_MAX_NBYTES = 32


@dataclass(frozen=True, slots=True)
class Part:
    """One part of one tensor: its slot, and its real type where safetensors has no code for it."""

    slot: str
    spec: TensorSpec | None


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor, as the metadata describes it."""

    name: str
    spec: TensorSpec
    encoding: str
    parts: Mapping[str, Part]
    attrs: Mapping[str, object]

    def tensor(self, slots: Mapping[str, Slot], data: torch.Tensor) -> EncodedTensor:
        """The tensor, with parts that are views of `data`. Raises RecordCorrupt if metadata and slots disagree."""
        parts = {suffix: _view(part, slots, data) for suffix, part in self.parts.items()}
        if self.encoding == "raw":
            whole = parts.get("")
            if len(parts) != 1 or whole is None or spec_of_part(whole) != self.spec:
                raise RecordCorrupt(f"tensor {self.name!r:.80} is not {self.spec}")
        return EncodedTensor(self.spec, self.encoding, parts, self.attrs)


def spec_of_part(x: torch.Tensor) -> TensorSpec:
    """Type and shape of a part."""
    return TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))


def _view(part: Part, slots: Mapping[str, Slot], data: torch.Tensor) -> torch.Tensor:
    slot = slots.get(part.slot)
    if slot is None:
        raise RecordCorrupt(f"part {part.slot!r:.80} is missing")
    spec = part.spec
    if spec is None:  # as the slot says, whose size `parse_header` has checked
        spec = TensorSpec(_BY_CODE[slot.dtype], slot.shape)
    elif spec.nbytes != slot.end - slot.begin:
        raise RecordCorrupt(f"part {part.slot!r:.80} of {slot.end - slot.begin} bytes is not {spec}")
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if slot.begin == slot.end:
        return torch.empty(spec.shape, dtype=dtype, device="cpu")
    if slot.begin % BY_NAME[spec.dtype].itemsize:
        raise RecordCorrupt(f"part {part.slot!r:.80} is not aligned")
    return data[slot.begin : slot.end].view(dtype).view(spec.shape)


_BY_CODE = {code: d.name for code, d in FROM_SAFETENSORS.items()}


def tensor_rows(facts: Mapping[str, str]) -> list[Row]:
    """The rows of all tensors. Raises RecordCorrupt for rows that `pack` never writes."""
    try:
        rows = json.loads(facts["kvstored.tensors"], object_pairs_hook=no_duplicates)
        if not isinstance(rows, list) or not 1 <= len(rows) <= TENSORS_MAX:
            raise ValueError(f"expected 1 to {TENSORS_MAX} tensors")
        names = [check_name(row["name"]) for row in rows]
        return [_row(name, row) for name, row in zip(names, rows, strict=True)]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, InvalidEntry) as error:
        raise RecordCorrupt(f"kvstored.tensors cannot be read: {printable(repr(error)):.120}") from None


def _row(name: str, row: dict[str, Any]) -> Row:
    parts = {suffix: _part_of(p) for suffix, p in row["parts"].items()}
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
    return Row(name, _spec_of(row["dtype"], row["shape"]), encoding, parts, attrs)


def _part_of(part: object) -> Part:
    match part:
        case [str(slot)]:
            return Part(slot, None)
        case [str(slot), str(dtype), list(shape)]:
            return Part(slot, _spec_of(dtype, shape))
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


def _spec_of(dtype: object, shape: object) -> TensorSpec:
    if not isinstance(dtype, str) or dtype not in BY_NAME or not isinstance(shape, list) or len(shape) > RANK_MAX:
        raise ValueError(f"bad spec {dtype!r:.40}")
    if not all(type(d) is int and 0 <= d <= ENTRY_MAX_NBYTES for d in shape) or prod(shape) > 1 << 62:
        raise ValueError(f"bad shape {shape!r:.80}")
    return TensorSpec(dtype, tuple(shape))

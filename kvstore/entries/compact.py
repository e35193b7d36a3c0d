"""Encoded tensors of one entry in one piece of memory.

A torch tensor costs 640 bytes in addition to its values, and NF4 makes three of each tensor. For a block of 4 KiB of
codes that is a third of its size, and the warm tier holds fewer blocks for it. So small encoded entries are kept as one
`bytearray`. One `Layout` describes all entries of one shape (a namespace's chunks are alike). The tensors are made when
they are asked for, as views, without a copy.
"""

from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor, Entry, error_in

PACK_MAX_NBYTES = 256 << 10
"""Above this size the overhead is under 1%, and one more copy would cost more than it saves."""
PACKED_OVERHEAD_NBYTES = 224
"""Counted on top of the bytes: the mapping, its bytearray, the attributes (tests/kvstore/entries/test_overhead.py)."""
_ALIGN = 16


Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Part:
    """Where one part lies: its tensor and suffix, its type, shape and bytes."""

    tensor: int
    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def spec(self) -> TensorSpec:
        """The part's type, by name, and its shape."""
        return TensorSpec(str(self.dtype).removeprefix("torch."), self.shape)


@dataclass(frozen=True, eq=False)
class Layout:
    """The description that all entries of one shape share: one object per shape, as long as it is in use."""

    names: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    encodings: tuple[str, ...]
    attrs: tuple[tuple[str, ...], ...]
    parts: tuple[Part, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all parts, without the gaps between them."""
        return sum(part.stop - part.start for part in self.parts)

    @cached_property
    def by_name(self) -> Mapping[str, TensorSpec]:
        """Types and shapes of the tensors once decoded."""
        return MappingProxyType(dict(zip(self.names, self.specs, strict=True)))

    @cached_property
    def tensors(self) -> Mapping[str, "TensorLayout"]:
        """What each tensor is made of."""
        starts = [0, *accumulate(map(len, self.attrs))]
        return {
            name: TensorLayout(
                self.specs[at],
                self.encodings[at],
                self.attrs[at],
                slice(starts[at], starts[at + 1]),
                tuple(part for part in self.parts if part.tensor == at),
            )
            for at, name in enumerate(self.names)
        }


class TensorLayout(NamedTuple):
    """One tensor of a layout. attrs: the names of its attributes; values: where theirs are among those of an entry."""

    spec: TensorSpec
    encoding: str
    attrs: tuple[str, ...]
    values: slice
    parts: tuple[Part, ...]


class PackedTensors(Mapping[str, EncodedTensor]):
    """The tensors of an entry, by name, made when asked for. specs, encodings: as `Entry` has them."""

    __slots__ = ("_attrs", "_data", "encodings", "layout", "specs")
    device = torch.device("cpu")

    def __init__(self, layout: Layout, data: bytearray, attrs: tuple[object, ...]) -> None:
        self.layout = layout
        self.specs = layout.by_name
        self.encodings = layout.encodings
        self._data = data
        self._attrs = attrs

    @property
    def nbytes(self) -> int:
        """Bytes counted against a budget."""
        return len(self._data) + PACKED_OVERHEAD_NBYTES

    @property
    def receipt(self) -> dict[str, float]:
        """`Entry.receipt`, without making the tensors."""
        return {
            name: error_in(tensor.encoding, attrs)
            for (name, tensor), attrs in zip(self.layout.tensors.items(), self.attrs, strict=True)
        }

    @property
    def attrs(self) -> list[dict[str, object]]:
        """Each tensor's attributes."""
        values = self._attrs
        return [dict(zip(t.attrs, values[t.values], strict=True)) for t in self.layout.tensors.values()]

    @property
    def payload(self) -> list[Bytes]:
        """The bytes of each part, not copied."""
        whole = np.frombuffer(self._data, dtype=np.uint8)
        return [whole[part.start : part.stop] for part in self.layout.parts]

    def __getitem__(self, name: str) -> EncodedTensor:
        tensor, data = self.layout.tensors[name], self._data
        parts: dict[str, torch.Tensor] = {}
        for part in tensor.parts:
            if part.start == part.stop:
                parts[part.suffix] = torch.empty(part.shape, dtype=part.dtype, device="cpu")
                continue
            count = (part.stop - part.start) // part.dtype.itemsize
            flat = torch.frombuffer(data, dtype=part.dtype, count=count, offset=part.start)
            parts[part.suffix] = flat if len(part.shape) == 1 else flat.view(part.shape)
        attrs = dict(zip(tensor.attrs, self._attrs[tensor.values], strict=True))
        return EncodedTensor(tensor.spec, tensor.encoding, parts, attrs)

    def items(self) -> ItemsView[str, EncodedTensor]:
        """Names and tensors, all of them made at once."""
        return {name: self[name] for name in self.layout.names}.items()

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout.names)


def packed(entry: Entry) -> Entry:
    """The entry with its tensors in one piece; the same entry if it is raw, large, packed already, or not in RAM."""
    parts = [part for tensor in entry.tensors.values() for part in tensor.parts.values()]
    nbytes = sum(part.numel() * part.element_size() for part in parts)
    if isinstance(entry.tensors, PackedTensors) or entry.encoding == "raw" or nbytes > PACK_MAX_NBYTES:
        return entry
    if any(part.device.type != "cpu" for part in parts):
        return entry
    layout = layout_of(entry)
    data = bytearray(max((part.stop for part in layout.parts), default=0))
    whole = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device="cpu")
    for part, values in zip(layout.parts, parts, strict=True):
        whole[part.start : part.stop].copy_(values.contiguous().view(-1).view(torch.uint8))
    attrs = tuple(value for tensor in entry.tensors.values() for value in tensor.attrs.values())
    return Entry(entry.key, PackedTensors(layout, data, attrs), lossy=entry.lossy)


def payload_of(entry: Entry) -> list[Bytes]:
    """The bytes of each part of an entry, packed or not; not copied where they are in RAM."""
    if isinstance(entry.tensors, PackedTensors):
        return entry.tensors.payload
    parts = [part for tensor in entry.tensors.values() for part in tensor.parts.values()]
    return [part.cpu().reshape(-1).view(torch.uint8).numpy() for part in parts]


def layout_of(entry: Entry) -> Layout:
    """The layout of an entry's tensors, packed or not."""
    if isinstance(entry.tensors, PackedTensors):
        return entry.tensors.layout
    return _layout_of(
        tuple(
            (
                name,
                tensor.spec,
                tensor.encoding,
                tuple(tensor.attrs),
                tuple((suffix, part.dtype, tuple(part.shape)) for suffix, part in tensor.parts.items()),
            )
            for name, tensor in entry.tensors.items()
        )
    )


_Described = tuple[
    tuple[str, TensorSpec, str, tuple[str, ...], tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]], ...
]


@lru_cache(maxsize=1024)
def _layout_of(described: _Described) -> Layout:
    parts: list[Part] = []
    start = 0
    for at, (*_, tensor_parts) in enumerate(described):
        for suffix, dtype, shape in tensor_parts:
            start = -(-start // _ALIGN) * _ALIGN
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            parts.append(Part(at, suffix, dtype, shape, start, stop))
            start = stop
    return Layout(
        tuple(row[0] for row in described),
        tuple(row[1] for row in described),
        tuple(row[2] for row in described),
        tuple(row[3] for row in described),
        tuple(parts),
    )

"""Encoded tensors of one entry in one piece of memory.

A torch tensor costs 640 bytes in addition to its values, and NF4 makes three of each tensor. For a block of 4 KiB of
codes that is a third of its size, and the warm tier holds fewer blocks for it. So small encoded entries are kept as one
`bytearray`. One `Layout` describes all entries of one shape (a namespace's chunks are alike). The tensors are made when
they are asked for, as views, without a copy.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor, Entry, error_in

PACK_MAX_NBYTES = 256 << 10
"""Above this size the overhead is under 1%, and one more copy would cost more than it saves."""
PACKED_OVERHEAD_NBYTES = 224
"""Counted on top of the bytes: the mapping, its bytearray, the attributes (tests/kvstore/entries/test_overhead.py)."""
_ALIGN = 16


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


class PackedTensors(Mapping[str, EncodedTensor]):
    """The tensors of an entry, by name, made when asked for."""

    __slots__ = ("_attrs", "_data", "layout")
    device = torch.device("cpu")

    def __init__(self, layout: Layout, data: bytearray, attrs: tuple[object, ...]) -> None:
        self.layout = layout
        self._data = data
        self._attrs = attrs

    @property
    def nbytes(self) -> int:
        """Bytes counted against a budget."""
        return len(self._data) + PACKED_OVERHEAD_NBYTES

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """`Entry.specs`, without making the tensors."""
        return dict(zip(self.layout.names, self.layout.specs, strict=True))

    @property
    def encodings(self) -> Collection[str]:
        """`Entry.encodings`, without making the tensors."""
        return self.layout.encodings

    @property
    def receipt(self) -> dict[str, float]:
        """`Entry.receipt`, without making the tensors."""
        layout = self.layout
        return {
            name: error_in(encoding, attrs)
            for name, encoding, attrs in zip(layout.names, layout.encodings, self.attrs, strict=True)
        }

    @property
    def attrs(self) -> list[dict[str, object]]:
        """Each tensor's attributes."""
        return [self._attrs_of(at) for at in range(len(self.layout.names))]

    @property
    def payload(self) -> "list[np.ndarray[Any, np.dtype[np.uint8]]]":
        """The bytes of each part, not copied."""
        whole = np.frombuffer(self._data, dtype=np.uint8)
        return [whole[part.start : part.stop] for part in self.layout.parts]

    def __getitem__(self, name: str) -> EncodedTensor:
        layout = self.layout
        try:
            at = layout.names.index(name)
        except ValueError:
            raise KeyError(name) from None
        parts = {part.suffix: self._view(part) for part in layout.parts if part.tensor == at}
        return EncodedTensor(layout.specs[at], layout.encodings[at], parts, self._attrs_of(at))

    def _attrs_of(self, at: int) -> dict[str, object]:
        names = self.layout.attrs
        first = sum(map(len, names[:at]))
        return dict(zip(names[at], self._attrs[first : first + len(names[at])], strict=True))

    def _view(self, part: Part) -> torch.Tensor:
        if part.start == part.stop:
            return torch.empty(part.shape, dtype=part.dtype, device="cpu")
        count = (part.stop - part.start) // part.dtype.itemsize
        flat = torch.frombuffer(self._data, dtype=part.dtype, count=count, offset=part.start)
        return flat if len(part.shape) == 1 else flat.view(part.shape)

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

"""Entries that travel encoded: what this process decodes itself, and how it does.

The codecs are the store's own, so the bits are those that the daemon would have sent. They need torch, which a worker
has; with the compiled kernel they decode faster than the network or a second copy brings the decoded bytes. Nothing
here imports torch before an encoded entry came, and none comes unless it was asked for. Any thread.
"""

import os
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from kvstore import arrays
from kvstore.dtypes import BY_NAME
from kvstore.errors import CodecError, InvalidEntry, KvstoreError
from kvstore.hit import TensorInfo
from kvstore.packed import ENCODINGS, PackedTensor
from kvstore.shm.layout import layout
from kvstored_client.aside import Aside, Job, call_off
from kvstored_client.buffers import Target, Window
from kvstored_client.interrupts import damage
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import BadFrame, Bytes, Scatter
from kvstored_client.wire.messages import read_specs
from kvstored_client.wire.packed import Coded, attrs_of, check_ratio, coded_of, parts_of

Decode = Literal["auto", "client", "daemon"]
DECODES: tuple[Decode, ...] = ("auto", "client", "daemon")
SHM_FROM_NBYTES = 8 << 20
"""Decoded bytes from which decoding here beats decoding by a daemon on the same host (bench/RESULTS.md, get.nf4); from
another host 13% (of float32) or 27% (of 16 bits) of the bytes is worth it at any size."""
SHAPE_MAX_NBYTES = 4 << 10
"""Of a shape that is remembered, as it is described on the wire."""


def accepted(decode: Decode) -> tuple[str, ...]:
    """The encodings to ask for. "auto": those of the codecs where torch is imported and the kernel can be used.

    Without the kernel the daemon's decoding and four to eight times the bytes are faster: plain torch decodes 0.2 GB/s.
    """
    if decode == "daemon" or (decode == "auto" and not ("torch" in sys.modules and _has_kernel())):
        return ()
    return ENCODINGS


@cache
def _has_kernel() -> bool:
    if find_spec("kvstored_kernel") is None:
        return False
    from kvstore.kernels.cpu import LIBRARY

    return LIBRARY is not None  # one of another ABI is as good as none


@dataclass(frozen=True, slots=True)
class Shape:
    """What the headers of all entries of one kind say alike, checked.

    specs, sizes, nbytes: of the tensors decoded. coded: one for each of them where they travel encoded. lying: (spec,
    start, nbytes) of the tensors, or of the parts of all that are encoded, in a block of block_nbytes.
    """

    specs: Mapping[str, TensorInfo]
    sizes: tuple[int, ...]
    nbytes: int
    coded: tuple[Coded, ...]
    lying: Mapping[str, tuple[TensorInfo, int, int]]
    block_nbytes: int


def shape_of(header: pb.GetHeader) -> Shape:
    """The shape a header describes. Raises InvalidEntry for what cannot be."""
    alike = pb.GetHeader(tensors=header.tensors, packed=header.packed)
    for message in alike.packed:
        message.ClearField("attrs")
    described = alike.SerializeToString()
    # A namespace's chunks are alike: checking one again costs 0.1 ms, and 0.5 where its code has gone cold.
    return _known_shape(described) if len(described) <= SHAPE_MAX_NBYTES else _new_shape(described)


def _new_shape(described: bytes) -> Shape:
    header = pb.GetHeader.FromString(described)
    specs = read_specs(header.tensors)
    nbytes = arrays.check_specs(specs)
    sizes = tuple(spec.nbytes for spec in specs.values())
    if not header.packed:
        return Shape(specs, sizes, nbytes, (), *_lying(specs))
    if len(header.packed) != len(specs):
        raise InvalidEntry(f"{len(specs)} tensors packed as {len(header.packed)}")
    coded = tuple(coded_of(spec, message) for spec, message in zip(specs.values(), header.packed, strict=True))
    check_ratio(nbytes, coded)  # before anything is allocated for what would be decoded
    return Shape(specs, sizes, nbytes, coded, *_lying(parts_of(coded)))


def _lying(specs: Mapping[str, TensorInfo]) -> tuple[dict[str, tuple[TensorInfo, int, int]], int]:
    places, nbytes = layout(specs)
    return {name: (spec, *places[name]) for name, spec in specs.items()}, nbytes


_known_shape = lru_cache(maxsize=256)(_new_shape)


class Packed:
    """What a header says of an entry that travels encoded.

    tensors: by name, in order, each with its attributes. sizes: the bytes of each part of all of them.
    """

    def __init__(self, header: pb.GetHeader, shape: Shape) -> None:
        """shape: the header's. Raises InvalidEntry for what cannot be."""
        self.nbytes = sum(coded.nbytes for coded in shape.coded)
        self.sizes = [nbytes for coded in shape.coded for nbytes in coded.sizes]
        self.tensors = {
            name: (coded, attrs_of(message))
            for name, coded, message in zip(shape.specs, shape.coded, header.packed, strict=True)
        }

    @property
    def parts(self) -> dict[str, TensorInfo]:
        """The parts of all tensors, numbered."""
        return parts_of(coded for coded, _ in self.tensors.values())

    def given_out(self, parts: Iterable[Any]) -> dict[str, Any]:
        """The entry as its caller gets it who wants it packed. parts: arrays, one for each of `parts`."""
        left = iter(parts)
        found: dict[str, Any] = {}
        for name, (coded, attrs) in self.tensors.items():
            own = {suffix: next(left) for suffix in coded.parts}
            raw = coded.encoding == "raw"
            found[name] = own[""] if raw else PackedTensor(coded.spec, coded.encoding, own, dict(attrs))
        return found

    def decode(self, parts: Sequence[Bytes], targets: Mapping[str, Bytes]) -> None:
        """Fill targets, flat and of the tensors' sizes, by name. Raises CodecError for parts that do not fit."""
        start = 0
        whole: list[_Whole] = []
        for name, (coded, attrs) in self.tensors.items():
            stop = start + len(coded.parts)
            if name in targets:
                whole.append((coded, attrs, parts[start:stop], targets[name]))
            start = stop
        _decode(whole)


class Parts(Target):
    """Where the parts of an entry go whose caller wants it packed. bytes: by number."""

    unfinished = True

    def __init__(self, packed: Packed, framework: str) -> None:
        super().__init__(packed.parts, packed.sizes, framework, None)
        self._packed = packed

    def finish(self) -> None:
        """All bytes are filled: the tensors are made of them. Raises CodecError, where torch is there to tell."""
        self.tensors = self._packed.given_out(self.tensors.values())
        if "torch" in sys.modules:
            check(self.tensors)


def unpacked(x: Any) -> Any:
    """A tensor, decoded on the host if it is packed. Raises CodecError."""
    if not isinstance(x, PackedTensor):
        return x
    from kvstore.codecs.packing import decoded

    return decoded(x)


def check(tensors: Mapping[str, Any]) -> None:
    """Raise CodecError for packed tensors whose parts do not belong together."""
    from kvstore.codecs.packing import check_parts

    check_parts(tensors)


_Whole = tuple[Coded, Mapping[str, object], Sequence[Bytes], Bytes]
"""A tensor whose bytes are there: its attributes, its parts, and where it is decoded to."""


class Unpacking:
    """Decodes an entry that comes in pieces: each tensor as soon as its bytes are there.

    In another thread while more bytes are on their way, here once all have come. over: `finish` has nothing to do.
    """

    def __init__(self, packed: Packed, targets: Mapping[str, Bytes]) -> None:
        """targets: as for `Packed.decode`."""
        self._due = deque((*coded, targets[name]) for name, coded in packed.tensors.items())
        self._left_nbytes = packed.nbytes
        self._filling: tuple[Bytes, Scatter] | None = None
        self._running: list[Job] = []
        self._damage: CodecError | None = None
        self.over = False

    def take(self, chunk: memoryview) -> None:
        """The next bytes: a view of a message's own. Raises BadFrame for more than are due."""
        if len(chunk) > self._left_nbytes:
            raise BadFrame(f"{len(chunk)} more bytes where {self._left_nbytes} are due")
        self._left_nbytes -= len(chunk)
        whole: list[_Whole] = []
        lent: Bytes | None = None  # the rest of the chunk, from the first tensor that is whole in it
        while self._due and (chunk or not self._due[0][0].nbytes):
            nbytes = self._due[0][0].nbytes
            if self._filling is None and len(chunk) >= nbytes:
                lent = _borrowed(chunk) if lent is None else lent
                whole.append(self._next(lent[:nbytes]))
                chunk, lent = chunk[nbytes:], lent[nbytes:]
                continue
            if self._filling is None:
                data = np.empty(nbytes, dtype=np.uint8)
                self._filling = data, Scatter([data])
            data, scatter = self._filling
            piece = chunk[: nbytes - scatter.filled_nbytes]
            scatter.write(piece)
            chunk = chunk[len(piece) :]
            lent = None
            if scatter.filled_nbytes == nbytes:
                whole.append(self._next(data))
                self._filling = None
        if whole and self._left_nbytes:
            _aside().start(self._running, _decode, whole)
        elif whole:
            try:
                _decode(whole)
            except CodecError as error:
                self._damage = error
            self.over = not (self._due or self._running or self._damage)

    def _next(self, data: Bytes) -> _Whole:
        coded, attrs, target = self._due.popleft()
        return coded, attrs, _cut(coded, data), target

    def finish(self) -> None:
        """Wait for the rest. Raises BadFrame if bytes are missing, CodecError for parts that do not fit."""
        self.take(memoryview(b""))
        if self._left_nbytes:
            raise BadFrame(f"an entry ended {self._left_nbytes} bytes early")
        for job in self._running:
            job.wait()
        if self._damage is not None:
            raise self._damage

    def call_off(self) -> None:
        """Return once nothing is being decoded."""
        call_off(self._running)


def _cut(coded: Coded, data: Bytes) -> list[Bytes]:
    """A tensor's bytes as those of each part; a copy where a part would not lie as its type asks for."""
    parts: list[Bytes] = []
    start, address = 0, data.ctypes.data
    for spec, nbytes in zip(coded.parts.values(), coded.sizes, strict=True):
        part = data[start : start + nbytes]
        parts.append(part.copy() if (address + start) % BY_NAME[spec.dtype].itemsize else part)
        start += nbytes
    return parts


def _borrowed(view: memoryview) -> Bytes:
    """The bytes of a message, not copied. Never written to, and marked as if they could be: torch warns otherwise."""
    if not view:
        return np.empty(0, dtype=np.uint8)
    return Window(np.frombuffer(view, dtype=np.uint8).ctypes.data, len(view), view, writable=True).array


@cache
def _aside() -> Aside:
    return Aside(_stay_single)


def _stay_single() -> None:
    """What comes next needs a processor too, and is what everybody waits for."""
    from kvstore.kernels.cpu import stay_single

    stay_single()


os.register_at_fork(after_in_child=_aside.cache_clear)


def _decode(whole: Iterable[_Whole]) -> None:
    """Decode tensors. Raises CodecError for whatever a codec makes of parts that no codec wrote."""
    from kvstore.codecs import codec_named
    from kvstore.dtypes import TensorSpec
    from kvstore.entries.entry import EncodedTensor

    encoding = ""
    made: list[tuple[EncodedTensor, Any]] = []
    try:
        for coded, attrs, parts, target in whole:
            encoding = coded.encoding
            tensors = {
                suffix: arrays.from_bytes(spec, part, "torch")
                for (suffix, spec), part in zip(coded.parts.items(), parts, strict=True)
            }
            encoded = EncodedTensor(TensorSpec(coded.spec.dtype, coded.spec.shape), encoding, tensors, attrs)
            made.append((encoded, arrays.from_bytes(coded.spec, target, "torch")))
        for encoded, out in made:
            encoding = encoded.encoding
            codec_named(encoding).decode(encoded, out)
    except KvstoreError as error:
        raise CodecError(str(error)) from None
    except Exception as error:
        damaged = damage(error, f"a tensor encoded as {encoding}")
        if damaged is error:
            raise
        raise CodecError(str(damaged)) from None

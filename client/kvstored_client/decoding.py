"""Entries that travel encoded: what this process decodes itself, and how it does.

The codecs are the store's own, so the bits are those that the daemon would have sent. They need torch, which a worker
has; with the compiled kernel they decode faster than the network or a second copy brings the decoded bytes. Nothing
here imports torch before an encoded entry came, and none comes unless it was asked for. Any thread.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any, Literal

from kvstore import arrays
from kvstore.dtypes import BY_NAME
from kvstore.errors import InvalidEntry
from kvstore.hit import TensorInfo
from kvstored_client._pb import cache_pb2 as pb
from kvstored_client.frames import Bytes
from kvstored_client.messages import read_specs

Decode = Literal["auto", "client", "daemon"]
DECODES: tuple[Decode, ...] = ("auto", "client", "daemon")
ENCODINGS = ("nf4", "nf4-kv", "int8")
NEAR_FROM_NBYTES = 8 << 20
"""Decoded bytes from which decoding here beats decoding by a daemon on the same host (bench/RESULTS.md, get.nf4); from
another host an eighth of the bytes is worth it at any size."""
PARTS_MAX = 16
"""Parts of one tensor; nf4-kv has at most 10."""
ATTRS_MAX_NBYTES = 4 << 10


def accepted(decode: Decode) -> tuple[str, ...]:
    """The encodings to ask for. "auto": those of the codecs where torch is imported and the kernel is installed.

    Without the kernel the daemon's decoding and eight times the bytes are faster: plain torch decodes 0.2 GB/s.
    """
    if decode == "daemon" or (decode == "auto" and not ("torch" in sys.modules and _has_kernel())):
        return ()
    return ENCODINGS


@cache
def _has_kernel() -> bool:
    return find_spec("kvstored_kernel") is not None


@dataclass(frozen=True, slots=True)
class Coded:
    """One tensor on the wire. parts: type and shape by suffix."""

    spec: TensorInfo
    encoding: str
    parts: Mapping[str, TensorInfo]
    attrs: Mapping[str, object]


class Packed:
    """What a header says of an entry that travels encoded. parts: of all tensors, in the order of their bytes."""

    def __init__(self, header: pb.GetHeader, specs: Mapping[str, TensorInfo]) -> None:
        """specs: the decoded tensors, checked. Raises InvalidEntry for what cannot be."""
        if len(header.packed) != len(specs):
            raise InvalidEntry(f"{len(specs)} tensors packed as {len(header.packed)}")
        self._tensors = {
            name: _coded(spec, message) for (name, spec), message in zip(specs.items(), header.packed, strict=True)
        }
        parts = [part for coded in self._tensors.values() for part in coded.parts.values()]
        self.parts = {str(i): part for i, part in enumerate(parts)}
        decoded = sum(prod(spec.shape) * BY_NAME[spec.dtype].itemsize for spec in specs.values())
        if self.nbytes > decoded + 4096 * len(parts):
            raise InvalidEntry(f"{decoded} bytes packed as {self.nbytes}")

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(map(_nbytes, self.parts.values()))

    def decode(self, parts: Sequence[Bytes], targets: Mapping[str, Bytes]) -> None:
        """Fill targets, flat and of the tensors' sizes, by name. Raises CodecError for parts that do not fit."""
        from kvstore.codecs import codec_named
        from kvstore.entry import EncodedTensor, TensorSpec

        left = iter(parts)
        for name, coded in self._tensors.items():
            tensors = {suffix: arrays.from_bytes(spec, next(left), "torch") for suffix, spec in coded.parts.items()}
            encoded = EncodedTensor(
                TensorSpec(coded.spec.dtype, coded.spec.shape), coded.encoding, tensors, coded.attrs
            )
            target: Any = arrays.from_bytes(coded.spec, targets[name], "torch")
            codec_named(coded.encoding).decode(encoded, target)


def _coded(spec: TensorInfo, message: pb.PackedTensor) -> Coded:
    if message.encoding not in (*ENCODINGS, "raw"):
        raise InvalidEntry(f"packed as {message.encoding!r:.40}, which was not asked for")
    parts = read_specs(message.parts)
    if not 1 <= len(parts) <= PARTS_MAX or len(message.attrs) > ATTRS_MAX_NBYTES:
        raise InvalidEntry(f"{len(parts)} parts and {len(message.attrs)} bytes of attributes")
    for suffix, part in parts.items():
        arrays.check_specs({suffix or "-": part})
    try:
        attrs = json.loads(message.attrs) if message.attrs else {}
    except ValueError as error:
        raise InvalidEntry(f"attributes: {error}") from None
    if not isinstance(attrs, dict):
        raise InvalidEntry("attributes are a JSON object")
    return Coded(spec, message.encoding, parts, attrs)


def _nbytes(spec: TensorInfo) -> int:
    return prod(spec.shape) * BY_NAME[spec.dtype].itemsize
